"""logfile.pdf and report.html of a job: collecting the facts and writing both.

Results come first: a job calls this when everything else is written, and a report that can't be
made is a warning with its reason, never a failed job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.report_facts import (
    label_facts,
    options_text,
    run_facts,
    select_command,
    set_facts,
)
from relion_cryofilter.commands.report_images import (
    galleries_of_errors,
    galleries_of_scores,
    pictures_of,
)
from relion_cryofilter.commands.report_table import (
    micrograph_table,
    pick_maps,
    read_columns,
    trends,
)
from relion_cryofilter.commands.subsets import describe_counts, table_of
from relion_cryofilter.data.labelled import LabelledSet
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.files import read_csv
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.options import MetricsOptions, ScoreOptions, TrainOptions
from relion_cryofilter.progress import duration
from relion_cryofilter.result_files import ALL, LOGFILE, REPORT
from relion_cryofilter.results.cuts import cuts_of, histogram_of
from relion_cryofilter.results.metrics import Evaluation, curves
from relion_cryofilter.results.report_data import (
    FeatureMap,
    Measured,
    Report,
    feature_map,
)
from relion_cryofilter.results.selftests import SelfTest

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class Scored:
    """What `score` knows when its files are written.

    Attributes
    ----------
    options, particles, models
        What was asked, of which particles; the models in words.
    scores, values
        As the models gave them, and (n,) as they are written: rounded, unusable ones 0.
    threshold, reason, accepted
        The cut, why, and (n,) who passed.
    """

    options: ScoreOptions
    particles: ParticleSet
    models: str
    scores: Scores
    values: np.ndarray
    threshold: float
    reason: str
    accepted: np.ndarray


def write_score_report(scored: Scored) -> tuple[Output, ...]:
    """Write the report of `score` into ``--o``; without such a folder there is none."""
    folder = scored.options.o
    if folder is None:
        return ()
    return _write(folder, lambda: _score_report(scored, folder))


@dataclass(frozen=True, eq=False)
class Tested:
    """What `train` and `metrics` know when their files are written.

    Attributes
    ----------
    mode, options
        Which of them, and what was asked.
    labelled, values
        The particles that were measured, and their (n,) scores.
    evaluation, reason
        Of them; the reason for the threshold.
    models, part
        The models and the part of the data, in words.
    sources
        Where the labels are from.
    self_tests, history, kept_epoch
        Of a training: the tests, the file of its epochs, and that whose weights are kept, 0 for
        those before any training.
    scores
        Of `metrics`, with a sample of features by the rows of the set before bad images were
        left out.
    """

    mode: str
    options: TrainOptions | MetricsOptions
    labelled: LabelledSet
    values: np.ndarray
    evaluation: Evaluation
    models: str
    part: str
    reason: str = ""
    sources: Sequence[str] = ()
    self_tests: Sequence[SelfTest] = ()
    history: Path | None = None
    kept_epoch: int = 0
    scores: Scores | None = field(default=None, repr=False)


def write_test_report(folder: Path, tested: Tested) -> tuple[Output, ...]:
    """Write the report of `train` or `metrics` into `folder`."""
    return _write(folder, lambda: _test_report(tested))


def _write(folder: Path, collect: Callable[[], Report]) -> tuple[Output, ...]:
    """Write both files, or say why not and leave no report of an earlier run."""
    from relion_cryofilter.results.report_html import write_html
    from relion_cryofilter.results.report_pdf import chart_pages, write_pdf

    start = time.monotonic()
    try:
        report = collect()
        pages = chart_pages(report)
        write_pdf(folder / LOGFILE, report, pages)
        write_html(folder / REPORT, report, pages)
    except Exception as error:  # whatever it is, the results are there and must stay a success
        for name in (LOGFILE, REPORT):
            (folder / name).unlink(missing_ok=True)
        log.warning(
            "No report (%s, %s) could be made: %s: %s. The results themselves are complete; "
            "--verbose shows where it failed.", LOGFILE, REPORT, type(error).__name__,
            " ".join(str(error).split()),
        )  # fmt: skip
        log.debug("The report failed here:", exc_info=error)
        return ()
    log.debug("The report took %s.", duration(time.monotonic() - start))
    return (Output(LOGFILE, "log"),)


def _score_report(scored: Scored, folder: Path) -> Report:
    particles, values, accepted = scored.particles, scored.values, scored.accepted
    usable = np.setdiff1d(np.arange(len(particles)), scored.scores.bad.rows)
    chosen = galleries_of_scores(values, accepted, usable)
    pictures, galleries = pictures_of(particles, values, usable, chosen, scored.options.threads)
    table = read_columns(particles)
    found, notes = trends(table, accepted)
    label = scored.options.score_label
    files = table_of(particles, label)
    return Report(
        title=f"Scores of {set_facts(particles)[0][1]}",
        facts=_score_facts(scored, folder),
        notes=[*_score_notes(scored), *notes],
        cuts=cuts_of(values, scored.threshold, int(accepted.sum())),
        histogram=histogram_of(values, scored.threshold),
        pictures=pictures,
        galleries=galleries,
        micrographs=micrograph_table(particles, accepted),
        trends=found,
        pick_maps=pick_maps(particles, table, accepted),
        features=_features(scored.scores, values, len(particles)),
        command=select_command(folder, f"{Path(ALL).stem}{files.suffix}", label) if files else "",
    )


def _score_facts(scored: Scored, folder: Path) -> list[tuple[str, str]]:
    n, seconds = len(scored.values) - scored.scores.n_known, scored.scores.seconds
    bad = scored.scores.bad
    return [
        *set_facts(scored.particles),
        ("Model", scored.models),
        ("Threshold", f"{scored.threshold:g} ({scored.reason})"),
        ("Result", describe_counts(scored.accepted)),
        *([("Unusable images", bad.summary().splitlines()[0])] if len(bad) else []),
        ("Results in", f"{folder}/"),
        ("Options", options_text("score", scored.options)),
        ("Time", f"{duration(seconds)}, {n / max(seconds, 1e-9):,.0f} particles/s"),
        *run_facts(scored.options),
    ]


def _score_notes(scored: Scored) -> list[str]:
    notes = []
    if not scored.options.weights:
        notes.append(
            "The bundled model knows simulated particles only: look at both sides of the cut "
            "before anything is discarded, and train a model on your own choices."
        )
    if scored.accepted.all() or not scored.accepted.any():
        which = "All" if scored.accepted.all() else "No"
        notes.append(f"{which} particles are accepted at this threshold.")
    if scored.values.min() == scored.values.max():
        notes.append("All scores are equal, so no threshold can sort these particles.")
    if not scored.particles.has_micrographs:
        notes.append("The input names no micrographs; image stacks stand in for them.")
    return notes


def _features(scores: Scores, values: np.ndarray, n: int) -> FeatureMap | None:
    if not scores.features.size:
        return None
    return feature_map(scores.features, values[scores.sampled], n)


def _test_report(tested: Tested) -> Report:
    labelled, values, evaluation = tested.labelled, tested.values, tested.evaluation
    labels, particles = labelled.labels, labelled.particles
    accepted = values >= evaluation.threshold
    everyone = np.arange(len(labelled))
    chosen = {
        **galleries_of_errors(values, accepted, labels),
        **galleries_of_scores(values, accepted, everyone),
    }
    kinds = [f", labelled {'good' if good else 'bad'}" for good in labels.tolist()]
    threads = tested.options.threads
    pictures, galleries = pictures_of(particles, values, everyone, chosen, threads, kinds)
    scores = tested.scores
    features = None
    if scores is not None:
        features = _features(scores, np.round(scores.values, 6), len(scores.values))
    return Report(
        title=f"{'Training, measured' if tested.mode == 'train' else 'Measured'} on {tested.part}",
        facts=_test_facts(tested),
        cuts=cuts_of(values, evaluation.threshold, int(accepted.sum()), labels),
        histogram=histogram_of(values, evaluation.threshold, labels),
        pictures=pictures,
        galleries=galleries,
        micrographs=micrograph_table(particles, accepted),
        features=features,
        measured=Measured(
            evaluation,
            curves(labels, values),
            tested.self_tests,
            _history(tested.history),
            tested.kept_epoch,
        ),
        sources=tested.sources,
    )


def _test_facts(tested: Tested) -> list[tuple[str, str]]:
    evaluation = tested.evaluation
    why = f" ({tested.reason})" if tested.reason else ""
    return [
        *set_facts(tested.labelled.particles),
        *label_facts(tested.labelled),
        ("Measured on", tested.part),
        ("Model", tested.models),
        ("Threshold", f"{evaluation.threshold:g}{why}"),
        ("AUC", str(evaluation.auc)),
        ("Recall", str(evaluation.sensitivity)),
        ("Precision", str(evaluation.precision)),
        ("Options", options_text(tested.mode, tested.options)),
        *run_facts(tested.options),
    ]


def _history(path: Path | None) -> list[dict[str, float]]:
    rows = read_csv(path) if path else []
    return [{name: float(value) for name, value in row.items()} for row in rows]

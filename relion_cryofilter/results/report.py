"""What a report shows of a job, collected as one value; `report_files` writes it.

Reports stand on the values that recipes compute; nothing is read back but the particle table's
own columns and the few dozen images that are shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from relion_cryofilter.evaluation import curves
from relion_cryofilter.files import ALL, SCORE_LABEL
from relion_cryofilter.images.thumbnails import LOW_PASS_ANGSTROM, read_thumbnails
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.nn.adaptation import said_of_noise
from relion_cryofilter.nn.home import FAR
from relion_cryofilter.nn.measurement import Measured
from relion_cryofilter.nn.model import NOISE_ACCEPTED, SIMULATED, Models
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.nn.training import Trained
from relion_cryofilter.options import JobOptions, MetricsOptions, ScoreOptions, TrainOptions
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.splits import clusters_of
from relion_cryofilter.particles.star import CLASS_NUMBER
from relion_cryofilter.processes import versions
from relion_cryofilter.progress import counted, duration
from relion_cryofilter.results import charts, loss_charts, summaries
from relion_cryofilter.results.averages import Averages, averages_of
from relion_cryofilter.results.report_files import Pictures, Report
from relion_cryofilter.results.views import Views, views_of
from relion_cryofilter.thresholds import CURVE, Chosen, share_interval

GALLERY, MOST_SOURCES = 24, 3
SPREAD, SHOW_ALL = 160, 250
"""Pictures at even ranks, from which the slider takes those nearest a threshold; up to 250: all."""
CUT = "{cut}"
"""Stands for the threshold in a `select` command that report.html fills in."""

Facts = list[tuple[str, str]]


def score_report(
    options: ScoreOptions, particles: ParticleSet, models: Models, scores: Scores, chosen: Chosen
) -> Report:
    """Collect the report of `score`, whose files are in ``--o``.

    In order: counts; the threshold and what it keeps; averages of the rejected; kept shares by
    class, micrograph, defocus and view; good particles lost; the rest.
    """
    values, accepted, bad = chosen.values, chosen.accepted, scores.bad

    # The scores, and pictures on both sides of the threshold.
    cuts = summaries.cuts_of(values, chosen.threshold, int(accepted.sum()))
    histogram = summaries.histogram_of(values, chosen.threshold, int(accepted.sum()))
    usable = np.setdiff1d(np.arange(len(particles)), bad.rows)
    pictures, galleries = pictures_of(particles, chosen, usable, options.threads)
    averages = averages_of(particles, models.members[0], chosen, usable, options.threads)

    # What the particle table says besides.
    classes = _classes(particles, accepted)
    micrographs = summaries.micrographs_of(particles.micrographs, particles.micrograph_of, accepted)
    trends, unknown = summaries.trends(particles, accepted)
    views = views_of(particles.table.views() if particles.table else None, accepted)
    pick_maps, features = summaries.pick_maps(particles, accepted), _features(scores, values)

    # In words.
    seconds, n = scores.seconds, len(values) - scores.n_known - len(scores.bad)
    facts = [
        *set_facts(particles),
        ("Model", models.describe()),
        ("Threshold", f"{chosen.threshold:g} ({chosen.reason})"),
        ("Result", chosen.describe()),
        *([("Unusable images", bad.summary().splitlines()[0])] if len(bad) else []),
        ("Results in", f"{options.o}/"),
        ("Options", options_text("score", options)),
        ("Time", f"{duration(seconds)}, {n / max(seconds, 1e-9):,.0f} particles/s"),
        *run_facts(options),
    ]
    command = ""
    if particles.table is not None and options.o is not None:
        name = f"{Path(ALL).stem}{particles.table.suffix}"
        command = select_command(options.o, name, options.score_label)
    return Report(
        title=f"Scores of {facts[0][1]}",
        facts=facts,
        cuts=cuts,
        histogram=histogram,
        charts=[
            *charts.score_charts(histogram, cuts),
            *_loss_charts(averages, classes, charts.set_charts(micrographs, trends), views),
        ],
        further=charts.feature_charts(pick_maps, features),
        pictures=pictures,
        galleries=galleries,
        notes=[*_score_notes(models, particles, scores, chosen, views), *unknown],
        sections=[
            ("Good particles lost", list(_lost(particles, models, chosen))),
            *([("Classes", classes.table())] if classes else []),
            *micrographs.in_words(),
            *(views.in_words() if views else []),
        ],
        command=command,
    )


def _loss_charts(
    averages: Sequence[Averages],
    classes: summaries.Classes | None,
    of_the_set: Sequence[charts.Chart],
    views: Views | None,
) -> Iterator[charts.Chart]:
    """Yield the charts of what was thrown away, about those of micrographs and trends."""
    yield from map(loss_charts.average_chart, averages)
    if classes:
        yield loss_charts.CLASSES.of(classes)
    yield from of_the_set
    if views:
        yield loss_charts.VIEWS.of(views)


def _classes(particles: ParticleSet, accepted: NDArray[np.bool_]) -> summaries.Classes | None:
    """Return the kept share of each class, where the input has classes."""
    table = particles.table
    if table is None or not {CLASS_NUMBER, "alignments2D/class"} & set(table.labels):
        return None
    return summaries.classes_of(table.classes(), accepted)


def _lost(particles: ParticleSet, models: Models, chosen: Chosen) -> Iterator[str]:
    """Say how many good particles are rejected, by the scores and by the model's validation."""
    if models.adapted:
        yield (
            "Not to be told: the model was adapted without labels, so its scores are no "
            "probabilities."
        )
        return
    first = models.members[0]
    clusters, unit = clusters_of(particles)
    lost = summaries.good_lost(chosen.values, chosen.accepted, clusters)
    if lost is not None:
        yield (
            f"{lost} By the scores, taken as probabilities; an interval is over {unit}s, and knows "
            "nothing of a model that errs on this set."
        )
        if SIMULATED in first.provenance:
            yield "They are more: the bundled model rates weak particles low, to keep noise out."
    if len(models) == 1 and CURVE in first.provenance and first.curve.n_positive:
        kept = share_interval(first.curve.recall_at(chosen.threshold), first.curve.n_positive)
        simulated = " simulated" if SIMULATED in first.provenance else ""
        yield (
            f"Of the{simulated} good particles that the model was measured on, unseen in training, "
            f"this threshold loses {100 * (1 - kept.value):.1f} % [{100 * (1 - kept.high):.1f}, "
            f"{100 * (1 - kept.low):.1f}]."
        )


def _score_notes(
    models: Models,
    particles: ParticleSet,
    scores: Scores,
    chosen: Chosen,
    views: Views | None,
) -> Iterator[str]:
    if scores.outside > FAR:
        yield (
            f"Features lie outside those of the model's training for {scores.outside:.0%} of the "
            "particles: scores may mean nothing."
        )
    if views is not None and views.cones:
        yield views.warning()
    provenance = models.members[0].provenance
    if models.adapted:
        yield (
            "The model was adapted to a set of particles without labels; it would accept "
            f"{said_of_noise(provenance[NOISE_ACCEPTED])}. Look at both sides of the cut before "
            "anything is discarded."
        )
    elif SIMULATED in provenance:
        yield (
            "The bundled model knows simulated particles and few real ones: look at both sides of "
            "the cut before anything is discarded, and train a model on your own choices."
        )
    if chosen.accepted.all() or not chosen.accepted.any():
        which = "All" if chosen.accepted.all() else "No"
        yield f"{which} particles are accepted at this threshold."
    if chosen.values.min() == chosen.values.max():
        yield "All scores are equal, so no threshold can sort these particles."
    if not particles.has_micrographs:
        yield "The input names no micrographs; image stacks stand in for them."


def train_report(options: TrainOptions, trained: Trained) -> Report:
    """Collect the report of `train`: what particles that were unseen in training say."""
    measured, noise, suspects = trained.measured, trained.label_noise, trained.suspects
    said = [noise.describe()] if noise else []
    if trained.behind:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in trained.behind.items())
        said.append(f"Of the particles behind the labels: {figures}.")
    where = "the validation part" if suspects is None else "out-of-fold scores"
    history = [asdict(epoch) for epoch in trained.histories[0]]
    return _labelled_report(
        options,
        measured,
        title=f"Training, measured on {measured.part}",
        models=trained.models,
        model=", ".join(trained.models.names),
        reason=f"for {options.threshold}, from {where}",
        own_charts=charts.history_charts(history, trained.kept_epochs[0]),
        sections=[
            ("Labels", [*measured.labelled.notes, trained.split]),
            ("Wrong labels", said),
            ("Classes", suspects.table() if suspects else []),
            ("Self-tests", list(map(str, trained.self_tests))),
        ],
    )


def metrics_report(
    options: MetricsOptions, measured: Measured, models: Models, scores: Scores
) -> Report:
    """Collect the report of `metrics`; `scores` are those before bad images were left out."""
    return _labelled_report(
        options,
        measured,
        title=f"Measured on {measured.part}",
        models=models,
        model=models.describe(),
        reason=measured.chosen.reason,
        sections=[("Labels", measured.labelled.notes)],
        features=_features(scores, np.round(scores.values, 6)),
    )


def _labelled_report(
    options: TrainOptions | MetricsOptions,
    measured: Measured,
    *,
    title: str,
    models: Models,
    model: str,
    reason: str,
    sections: Sequence[tuple[str, Sequence[str]]],
    own_charts: Sequence[charts.Chart] = (),
    features: summaries.FeatureMap | None = None,
) -> Report:
    """Collect what the reports of labelled sets share; the keywords are their own."""
    particles, labels = measured.labelled.particles, measured.labelled.labels
    chosen, evaluation, good = measured.chosen, measured.evaluation, int(labels.sum())
    asked = (chosen.values, chosen.threshold, int(chosen.accepted.sum()), labels)
    cuts, histogram = summaries.cuts_of(*asked), summaries.histogram_of(*asked)
    micrographs = summaries.micrographs_of(
        particles.micrographs, particles.micrograph_of, chosen.accepted
    )
    origin, recall = measured.labelled.origin, evaluation.sensitivity
    classes = summaries.classes_of(origin.classes, chosen.accepted) if origin else None
    lost = (
        f"{int((labels & ~chosen.accepted).sum()):,} of the {good:,} labelled good particles are "
        f"rejected: {100 * (1 - recall.value):.1f} % [{100 * (1 - recall.high):.1f}, "
        f"{100 * (1 - recall.low):.1f}]."
    )
    everyone = np.arange(len(labels))
    pictures, galleries = pictures_of(
        particles, chosen, everyone, options.threads, labels, measured.doubted
    )
    averages = averages_of(particles, models.members[0], chosen, everyone, options.threads)
    views = views_of(origin.views() if origin else None, chosen.accepted)
    training = isinstance(options, TrainOptions)
    if classes and not training:  # a training has a table with more in it
        sections = [*sections, ("Classes", classes.table())]
    return Report(
        title=title,
        facts=[
            *set_facts(particles),
            ("Labels", f"{good:,} good, {len(labels) - good:,} bad"),
            ("Measured on", measured.part),
            ("Model", model),
            ("Threshold", f"{chosen.threshold:g} ({reason})"),
            ("AUC", str(evaluation.auc)),
            ("Recall", str(evaluation.sensitivity)),
            ("Precision", str(evaluation.precision)),
            ("Options", options_text("train" if training else "metrics", options)),
            *run_facts(options),
        ],
        cuts=cuts,
        histogram=histogram,
        charts=[
            *charts.score_charts(histogram, cuts),
            *charts.evaluation_charts(curves(labels, chosen.values), evaluation),
            *_loss_charts(averages, classes, charts.set_charts(micrographs), views),
        ],
        further=[*own_charts, *charts.feature_charts(features=features)],
        pictures=pictures,
        galleries=galleries,
        notes=[views.warning()] if views and views.cones else [],
        sections=[
            ("Figures", evaluation.summary().splitlines()),
            ("Good particles lost", [lost]),
            *(section for section in sections if section[1]),
            *micrographs.in_words(),
            *(views.in_words() if views else []),
        ],
    )


def _features(scores: Scores, values: summaries.Floats) -> summaries.FeatureMap | None:
    if not scores.features.size:
        return None
    return summaries.feature_map(scores.features, values[scores.sampled], len(values))


def set_facts(particles: ParticleSet) -> Facts:
    """Return what was read: names and counts."""
    names = particles.source.split(", ") if particles.table is None else [particles.source]
    if particles.table is None and not particles.has_micrographs:
        names = list(dict.fromkeys(particles.stack_names))
    source = ", ".join(names[:MOST_SOURCES])
    if len(names) > MOST_SOURCES:
        source += f" and {len(names) - MOST_SOURCES:,} more"
    return [("Input", source), ("Particles", particles.describe())]


def run_facts(options: JobOptions) -> Facts:
    """Return where and with what it ran."""
    gpus = getattr(options, "gpu", None)
    used = gpu_numbers(gpus) != [] and torch.cuda.is_available()
    where = f"GPU {gpus}" if used else "the processor"
    return [
        ("Computed on", f"{where}, {counted(options.threads, 'thread')}"),
        ("Versions", ", ".join(map(" ".join, versions("matplotlib").items()))),
        ("Made", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def options_text(mode: str, options: JobOptions) -> str:
    """Return the options that differ from their defaults, as they would be typed."""
    words = [mode]
    for item in fields(options):
        value = getattr(options, item.name)
        if value == item.default or item.name in ("quiet", "verbose"):
            continue
        words.append(f"--{item.name}")
        if isinstance(value, tuple) and value and isinstance(value[0], int):
            words.append(",".join(map(str, value)))
        elif value is not True:
            several = value if isinstance(value, tuple) else [value]
            words += [shlex.quote(str(item)) for item in several]
    return " ".join(words)


def select_command(folder: Path, scored: str, label: str) -> str:
    """Return the command that sorts `scored` in `folder` again, with `CUT` for its threshold."""
    number = "_threshold_"  # for CUT, whose braces would be quoted
    words = ["relion_cryofilter", "select", "--in_parts", str(folder / scored)]
    words += ["--threshold", number, "--o", f"{folder}/cut_{number}/"]
    if label != SCORE_LABEL:
        words += ["--score_label", label]
    return shlex.join(words).replace(number, CUT)


def pictures_of(
    particles: ParticleSet,
    chosen: Chosen,
    usable: NDArray[np.int64],
    threads: int,
    labels: NDArray[np.bool_] | None = None,
    suspects: NDArray[np.int64] | None = None,
) -> tuple[Pictures, dict[str, list[int]]]:
    """Read pictures for galleries, and more at even ranks for the slider, of the rows `usable`.

    With `labels`, (n,) True for good particles, errors come first, and before them `suspects`, rows
    whose label is contradicted most. Returns the pictures, and by
    the title of each gallery the numbers of those in it.
    """
    # Which rows stand where.
    values, accepted = chosen.values, chosen.accepted
    order = usable[np.argsort(-values[usable], kind="stable")]
    kept = int(accepted[order].sum())
    rows_of: dict[str, NDArray[np.int64]] = {}
    if labels is not None:
        false_positive = order[(accepted & ~labels)[order]]
        false_negative = order[(~accepted & labels)[order]][::-1]
        rows_of = {
            "False positives: labelled bad, accepted (highest scores)": false_positive[:GALLERY],
            "False negatives: labelled good, rejected (lowest scores)": false_negative[:GALLERY],
        }
    if suspects is not None and len(suspects):
        title = "Labels that scores contradict most (suspicious_labels.star)"
        rows_of = {title: suspects[:GALLERY], **rows_of}
    rows_of |= {
        "Best scores": order[:GALLERY],
        "Worst scores": order[::-1][:GALLERY],
        "Accepted, nearest the threshold": order[max(0, kept - GALLERY) : kept][::-1],
        "Rejected, nearest the threshold": order[kept : kept + GALLERY],
    }

    # Every image once, by falling score.
    ranks = np.linspace(0, len(order) - 1, SPREAD).astype(int) if len(order) > SHOW_ALL else ...
    rows = np.unique(np.concatenate([order[ranks], *rows_of.values()]).astype(np.int64))
    rows = rows[np.argsort(-values[rows], kind="stable")]
    kinds = np.full(len(values), "")
    if labels is not None:
        kinds = np.where(labels, ", labelled good", ", labelled bad")
    names = [
        f"{particles.image_name(row)}\nscore {values[row]:.6f}{kinds[row]}\n"
        f"{particles.micrographs[particles.micrograph_of[row]]}"
        for row in rows.tolist()
    ]

    # How they are shown.
    shown = particles.take(rows)
    known = all(group.pixel_size_angstrom for group in shown.optics_used)
    filtered = f"to {LOW_PASS_ANGSTROM:g} Å" if known else "(pixel size unknown)"
    about = f"Low-passed {filtered}, equal contrast; the score is under each."
    images = read_thumbnails(shown, threads)
    place = {row: number for number, row in enumerate(rows.tolist())}
    galleries = {title: [place[row] for row in found.tolist()] for title, found in rows_of.items()}
    return Pictures(images, values[rows], names, about), galleries

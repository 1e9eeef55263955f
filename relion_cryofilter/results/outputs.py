"""The files that jobs leave for RELION, for scripts and for CryoSPARC, and the end of run.out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relion_cryofilter.errors import UsageError
from relion_cryofilter.evaluation import curves
from relion_cryofilter.files import (
    ACCEPTED,
    ALL,
    HISTORY,
    METRICS,
    PREDICTIONS,
    RANDOM,
    REJECTED,
    SCORE_LABEL,
    SUSPICIOUS,
    numbered,
    require_ours,
    write_text,
)
from relion_cryofilter.locks import own
from relion_cryofilter.particles.particles import Table
from relion_cryofilter.progress import counted
from relion_cryofilter.results.charts import SCORE_HISTOGRAM, evaluation_charts, history_charts
from relion_cryofilter.results.summaries import histogram_of

if TYPE_CHECKING:
    from relion_cryofilter.nn.measurement import Measured
    from relion_cryofilter.nn.suspects import Suspects
    from relion_cryofilter.nn.trainer import Epoch

FEATURE_SAMPLE = 20_000  # particles whose features are kept for the report's map of features

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class Output:
    """A result that the next RELION job can use."""

    file_name: str  # in the job's folder
    kind: str  # particles or log


def results_folder(*named: Path | None) -> Path:
    """Return the first folder that is named (``--o``, or its 2020 name), made and made ours."""
    folder = next(filter(None, named), None)
    if folder is None:
        raise UsageError("Say where the results go: --o FOLDER/.")
    own(folder)
    return folder


def subset_names() -> list[str]:
    """Return the names of all files that `write_subsets` may write."""
    ends = (".star", ".cs", ".csg", "_passthrough.cs")
    return [Path(name).stem + end for name in (ALL, ACCEPTED, REJECTED, RANDOM) for end in ends]


def refuse_to_overwrite(
    sources: Iterable[Path | None], results: Iterable[Path], kind: str = ""
) -> None:
    """Raise a UsageError if a result would replace an input, or what is not ours.

    With `kind`, a result named by the user must be one of this kind (see `files.require_ours`).
    """
    results = list(results)
    targets = {os.path.realpath(path) for path in results}
    for source in sources:
        if source is not None and os.path.realpath(source) in targets:
            raise UsageError(
                f"The results would overwrite the input {source}. Choose another folder for --o."
            )
    for path in results if kind else ():
        require_ours(path, kind)


def write_subsets(
    folder: Path,
    table: Table,
    accepted: np.ndarray,
    scores: np.ndarray | None = None,
    label: str = SCORE_LABEL,
    drawn: np.ndarray | None = None,
) -> tuple[tuple[Output, ...], dict[str, str]]:
    """Write the accepted and the rejected of n particles, whose rows stay what they are.

    With `scores` (n,) all of them are written too, and the scores are added as the column `label`;
    with `drawn` (n,) True those, as particles_random.star.
    Returns the STAR files, which RELION should know, and what each file holds, for `log_files`.
    """
    subsets = {ACCEPTED: accepted, REJECTED: ~accepted}
    if drawn is not None:
        subsets[RANDOM] = drawn
    if scores is not None:
        subsets[ALL] = np.ones_like(accepted)
    filled, holds = {}, {}
    for name, mask in subsets.items():
        path = (folder / name).with_suffix(table.suffix)
        holds[path.name] = counted(int(mask.sum()), "particle")
        if mask.any():
            filled[path] = mask
        else:  # relion_refine crashes on empty files
            table.remove(path)
            log.warning("No particles for %s, so it is not written.", path.name)
    table.write(filled, scores, label)
    if scores is not None:
        everything = Path(ALL).with_suffix(table.suffix).name
        holds = {everything: f"{holds.pop(everything)} with scores", **holds}
    outputs = tuple(Output(path.name, "particles") for path in filled)
    return (outputs if table.suffix == ".star" else ()), holds


def write_measured(folder: Path, measured: Measured, figures: Mapping[str, Any]) -> None:
    """Write metrics.json, which holds `figures`, predictions.csv and the charts."""
    labels, chosen = measured.labelled.labels, measured.chosen
    write_text(folder / METRICS, f"{json.dumps(figures, indent=2)}\n")
    write_table(folder / PREDICTIONS, measured.to_frame(), "%.6f")
    kept = int(chosen.accepted.sum())
    histogram = histogram_of(chosen.values, chosen.threshold, kept, labels)
    charts = evaluation_charts(curves(labels, chosen.values), measured.evaluation)
    for chart in [*charts, SCORE_HISTOGRAM.of(histogram)]:
        chart.save(folder)


def write_suspects(folder: Path, measured: Measured, suspects: Suspects) -> dict[str, str]:
    """Write and log the particles whose labels scores contradict, and the classes of the labels.

    Their rows as they are in the table that labels come from, with the scores as one more column;
    image and micrograph names where labels come from several files. Returns what the file holds,
    for `log_files`; nothing where no label is contradicted.
    """
    labelled, scores, rows = measured.labelled, measured.chosen.values, suspects.rows
    if suspects.classes:
        log.info("Classes, by out-of-fold scores:\n%s", "\n".join(suspects.table()))
        wrong = [str(item.number) for item in suspects.classes if item.mislabelled]
        if wrong:
            log.warning(
                "Classes that look mislabelled: %s. Look at them before you rely on the model.",
                ", ".join(wrong),
            )  # fmt: skip
    origin, path = labelled.origin, folder / SUSPICIOUS
    if origin is not None:
        path = path.with_suffix(origin.table.suffix)
        origin.table.remove(path)
    path.unlink(missing_ok=True)
    if not len(rows):
        return {}
    if origin is not None:
        n = origin.count
        mask, values = np.zeros(n, bool), np.zeros(n)
        mask[origin.rows[rows]], values[origin.rows] = True, scores
        origin.table.write({path: mask}, values)
    else:
        particles = labelled.particles
        lines = [
            f"{particles.image_name(row)} {particles.micrographs[particles.micrograph_of[row]]} "
            f"{scores[row]:.6f}"
            for row in rows.tolist()
        ]
        names = ("rlnImageName", "rlnMicrographName", SCORE_LABEL)
        head = "".join(f"_{name} #{number}\n" for number, name in enumerate(names, 1))
        write_text(path, f"\ndata_\n\nloop_\n{head}" + "\n".join(lines) + "\n\n")
    good = int(labelled.labels[rows].sum())
    return {
        path.name: f"the {good:,} good and {len(rows) - good:,} bad labels that scores contradict "
        "most"
    }


def write_history(folder: Path, number: int, history: Sequence[Epoch]) -> None:
    """Write the epochs of model `number` so far as history.csv (history_2.csv …)."""
    import pandas as pd  # slow to import

    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([asdict(epoch) for epoch in history])
    write_table(folder / numbered(HISTORY, number), table, "%.6g")


def write_history_chart(folder: Path, number: int, history: Sequence[Epoch], kept: int) -> None:
    """Draw the epochs of model `number` as history.png; `kept` is the one whose weights it has."""
    for chart in history_charts([asdict(epoch) for epoch in history], kept):
        replace(chart, name=Path(numbered(HISTORY, number)).stem).save(folder)


def write_table(path: Path, table: Any, numbers: str) -> None:
    """Write a pandas table as CSV through `files.replacing`; `numbers` is the format of floats."""
    write_text(path, table.to_csv(index=False, float_format=numbers, lineterminator="\n"))


def log_files(folder: Path, holds: Mapping[str, str], conclusion: str) -> None:
    """Log which of the files in `holds` are in `folder`, with what each holds, then the conclusion.

    RELION's window shows the last few lines of run.out, so the conclusion comes last.
    """
    there = {name: text for name, text in holds.items() if (folder / name).is_file()}
    width = max(map(len, there), default=0)
    lines = "".join(f"\n  {name:<{width}}  {text}".rstrip() for name, text in there.items())
    log.info("Results are in %s/%s", folder, f":{lines}" if lines else "")
    log.info("%s", conclusion)

"""What Doppio's results tab shows: read from the files that the job wrote."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Any

from gemmi import cif
from pipeliner.display_tools import create_results_display_object, mini_montage_from_starfile
from pipeliner.results_display_objects import ResultsDisplayObject

from relion_cryofilter.data.star_labels import SCORE_LABEL
from relion_cryofilter.files import read_csv
from relion_cryofilter.result_files import (
    ACCEPTED,
    ALL,
    HISTORY,
    LOGFILE,
    METRICS,
    REJECTED,
    REPORT,
    SCORES_CSV,
)

SUBSETS = {ACCEPTED: "accepted", REJECTED: "rejected", ALL: "scored"}
"""The STAR files of a score job and their node keywords."""

REPORTS = {LOGFILE: "pdffile", REPORT: "html"}
"""Reports that a job may write, and the pipeliner's kind of display for them."""

FIGURES = {
    "roc.png": "ROC curve",
    "precision_recall.png": "Precision and recall",
    "score_histogram.png": "Scores of good and bad particles",
    "reliability.png": "Reliability of the scores",
    "confusion_matrix.png": "Confusion matrix",
}
N_BINS, N_IMAGES, N_COLUMNS = 40, 40, 10
INTERVAL = ("value", "low", "high")


def of_scores(folder: str) -> list[ResultsDisplayObject]:
    """Return histogram and table of a score job, and images of its accepted and rejected ones."""
    path = Path(folder) / SCORES_CSV
    with path.open() as file:
        scores = [float(score) for _, score in csv.reader(file)]
    shown = [
        create_results_display_object(
            "histogram", title="Scores of all particles", data_to_bin=scores,
            bin_edges=[n / N_BINS for n in range(N_BINS + 1)], xlabel="Score",
            ylabel="Particles", associated_data=[str(path)],
        ),
        _counts(folder, len(scores)),
    ]  # fmt: skip
    sides = [name for name in (ACCEPTED, REJECTED) if _is_file(folder, name)]
    return [*shown, *(_gallery(folder, name) for name in sides)]


def _counts(folder: str, total: int) -> ResultsDisplayObject:
    rows, files = [], []
    for name in (ACCEPTED, REJECTED):
        count = _n_particles(folder, name) if _is_file(folder, name) else 0
        rows.append([SUBSETS[name], f"{count:,}", f"{100 * count / max(total, 1):.1f} %"])
        files += [f"{folder}{name}"] if count else []
    return create_results_display_object(
        "table", title="Accepted and rejected particles", headers=["Subset", "Particles", "Share"],
        table_data=[*rows, ["all", f"{total:,}", "100.0 %"]], associated_data=files,
    )  # fmt: skip


def _gallery(folder: str, name: str) -> ResultsDisplayObject:
    """Return the first images of a subset, with their scores."""
    table = _particles(folder, name)
    scores = list(islice(table.find_values(f"_{SCORE_LABEL}"), N_IMAGES))
    labels = [f"{float(score):.3f}" for score in scores]
    labels += [""] * (-len(labels) % N_COLUMNS)
    title = f"First {SUBSETS[name]} particles, with their scores"
    return mini_montage_from_starfile(
        f"{folder}{name}", table.name, "_rlnImageName", folder, title, N_IMAGES,
        ncols=N_COLUMNS, labels=labels or None,
    )  # fmt: skip


def _n_particles(folder: str, name: str) -> int:
    return len(_particles(folder, name).find_values("_rlnImageName"))


def _particles(folder: str, name: str) -> Any:
    """Return the block of a STAR file that holds the particles."""
    blocks = cif.read_file(f"{folder}{name}")
    return next(block for block in blocks if len(block.find_values("_rlnImageName")))


def of_metrics(folder: str) -> list[ResultsDisplayObject]:
    """Return the figures of metrics.json as a table, and the pictures."""
    path = Path(folder) / METRICS
    found = json.loads(path.read_text())
    rows = [
        [name.replace("_", " "), *(_number(value[part]) for part in INTERVAL)]
        for name, value in found.items()
        if isinstance(value, dict) and set(INTERVAL) <= set(value)
    ]
    about = f"{found['n']:,} particles, {found['n_positive']:,} good; threshold "
    shown = create_results_display_object(
        "table", title=f"{about}{found['threshold']:g}", table_data=rows,
        headers=["Figure", "Value", "95 % from", "to"], associated_data=[str(path)],
    )  # fmt: skip
    return [shown, *_figures(folder)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _figures(folder: str) -> list[ResultsDisplayObject]:
    return [
        create_results_display_object(
            "image", title=title, image_path=f"{folder}{name}", image_desc=title,
            associated_data=[f"{folder}{METRICS}"],
        )
        for name, title in FIGURES.items()
        if _is_file(folder, name)
    ]  # fmt: skip


def of_history(folder: str) -> list[ResultsDisplayObject]:
    """Return loss and AUC of each epoch as graphs."""
    path = Path(folder) / HISTORY
    rows = [{name: float(value) for name, value in row.items()} for row in read_csv(path)]
    graphs = []
    for figure in ("loss", "auc"):
        names = [name for name in rows[0] if name.endswith(figure)]
        graphs.append(
            create_results_display_object(
                "graph", title=f"{figure.upper() if figure == 'auc' else 'Loss'} of each epoch",
                xvalues=[[row["epoch"] for row in rows]] * len(names),
                yvalues=[[row[name] for row in rows] for name in names],
                data_series_labels=[name.replace("_", " ") for name in names],
                xaxis_label="Epoch", yaxis_label=figure, associated_data=[str(path)],
            )
        )  # fmt: skip
    return graphs


def reports(folder: str) -> list[ResultsDisplayObject]:
    """Return the reports that the job wrote, if any."""
    shown = []
    for name, kind in REPORTS.items():
        path = f"{folder}{name}"
        if _is_file(folder, name) and kind == "html":
            shown.append(
                create_results_display_object(
                    kind, title="Report", html_file=path, associated_data=[path]
                )
            )
        elif _is_file(folder, name):
            shown.append(create_results_display_object(kind, title="Report", file_path=path))
    return shown


def _is_file(folder: str, name: str) -> bool:
    return (Path(folder) / name).is_file()

"""What Doppio's results tab shows: read from the files that the job wrote.

A `folder` is the job's, with a slash at its end, as the pipeliner names it.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeliner.display_tools import create_results_display_object, mini_montage_from_starfile
from pipeliner.results_display_objects import ResultsDisplayObject

from relion_cryofilter.files import (
    ACCEPTED,
    ALL,
    HISTORY,
    LOGFILE,
    METRICS,
    REJECTED,
    REPORT,
    SCORE_LABEL,
    SCORES_CSV,
)
from relion_cryofilter.results.charts import EVALUATION, SCORE_HISTOGRAM

SUBSETS = {ACCEPTED: "accepted", REJECTED: "rejected", ALL: "scored"}
"""The STAR files of a score job and their node keywords."""
REPORTS = {LOGFILE: ("pdffile", "file_path"), REPORT: ("html", "html_file")}
"""Reports that a job may write; the pipeliner's kind of display and its word for the file."""
N_BINS, N_IMAGES, N_COLUMNS = 40, 40, 10
INTERVAL = ("value", "low", "high")


def of_scores(folder: str) -> list[ResultsDisplayObject]:
    """Return histogram and table of a score job, and images of its accepted and rejected ones."""
    import pandas as pd  # slow to import
    import starfile

    path = f"{folder}{SCORES_CSV}"
    scores = pd.read_csv(path, header=None)[1].tolist()
    shown = [
        create_results_display_object(
            "histogram", title="Scores of all particles", data_to_bin=scores,
            bin_edges=[n / N_BINS for n in range(N_BINS + 1)], xlabel="Score",
            ylabel="Particles", associated_data=[path],
        )
    ]  # fmt: skip

    # How many there are on either side.
    blocks, rows = {}, []
    for name in (ACCEPTED, REJECTED):
        count = 0
        if Path(folder, name).is_file():
            tables = starfile.read(f"{folder}{name}", always_dict=True)
            blocks[name] = next(item for item in tables.items() if "rlnImageName" in item[1])
            count = len(blocks[name][1])
        rows.append([SUBSETS[name], f"{count:,}", f"{100 * count / max(len(scores), 1):.1f} %"])
    shown.append(
        create_results_display_object(
            "table", title="Accepted and rejected particles",
            headers=["Subset", "Particles", "Share"],
            table_data=[*rows, ["all", f"{len(scores):,}", "100.0 %"]],
            associated_data=[f"{folder}{name}" for name in blocks],
        )
    )  # fmt: skip

    # The first images of each side, with their scores.
    for name, (block, table) in blocks.items():
        labels = []
        if SCORE_LABEL in table:
            labels = [f"{float(score):.3f}" for score in table[SCORE_LABEL][:N_IMAGES]]
            labels += [""] * (-len(labels) % N_COLUMNS)
        title = f"First {SUBSETS[name]} particles, with their scores"
        shown.append(
            mini_montage_from_starfile(
                f"{folder}{name}", block, "_rlnImageName", folder, title, N_IMAGES,
                ncols=N_COLUMNS, labels=labels or None,
            )
        )  # fmt: skip
    return shown


def of_metrics(folder: str) -> list[ResultsDisplayObject]:
    """Return the figures of metrics.json as a table, and the pictures."""
    path = f"{folder}{METRICS}"
    found = json.loads(Path(path).read_text())
    rows = [
        [name.replace("_", " ")]
        + ["–" if value[part] is None else f"{value[part]:.3f}" for part in INTERVAL]
        for name, value in found.items()
        if isinstance(value, dict) and set(INTERVAL) <= set(value)
    ]
    about = f"{found['n']:,} particles, {found['n_positive']:,} good; threshold "
    shown = [
        create_results_display_object(
            "table", title=f"{about}{found['threshold']:g}", table_data=rows,
            headers=["Figure", "Value", "95 % from", "to"], associated_data=[path],
        )
    ]  # fmt: skip
    for chart in (*EVALUATION[:2], SCORE_HISTOGRAM, *EVALUATION[2:]):
        picture = f"{folder}{chart.name}.png"
        if Path(picture).is_file():
            shown.append(
                create_results_display_object(
                    "image", title=chart.title, image_path=picture, image_desc=chart.title,
                    associated_data=[path],
                )
            )  # fmt: skip
    return shown


def of_history(folder: str) -> list[ResultsDisplayObject]:
    """Return loss and, where a part was held back to validate on, AUC of each epoch as graphs."""
    import pandas as pd  # slow to import

    path = f"{folder}{HISTORY}"
    table = pd.read_csv(path).dropna(axis="columns", how="all")
    graphs = []
    for figure, title in (("loss", "Loss"), ("auc", "AUC")):
        names = [name for name in map(str, table.columns) if name.endswith(figure)]
        if not names:
            continue
        graphs.append(
            create_results_display_object(
                "graph", title=f"{title} of each epoch",
                xvalues=[table["epoch"].tolist()] * len(names),
                yvalues=[table[name].tolist() for name in names],
                data_series_labels=[name.replace("_", " ") for name in names],
                xaxis_label="Epoch", yaxis_label=figure, associated_data=[path],
            )
        )  # fmt: skip
    return graphs


def reports(folder: str) -> list[ResultsDisplayObject]:
    """Return the reports that the job wrote, if any."""
    shown = []
    for name, (kind, word) in REPORTS.items():
        path = f"{folder}{name}"
        if Path(path).is_file():
            more = {word: path, "associated_data": [path]} if kind == "html" else {word: path}
            shown.append(create_results_display_object(kind, title="Report", **more))
    return shown

"""A simulated classification and selection: what `train` reads its labels from."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np

from relion_cryofilter.data.simulate.project import PARTICLE_LABELS
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import write_text

CLASS2D, SELECT = "Class2D/job002", "Select/job003"
N_CLASSES, KEPT = 6, (1, 2, 3)
_VERSION = "\n# version 30001\n\n"


def simulate_selection(
    particles_star: str | os.PathLike[str], *, wrong: float = 0.1, seed: int = 0
) -> Path:
    """Add a Class2D job and a Select job to a project of `simulate_project`, as RELION 3.1 would.

    Classes 1 to 3 hold the particles and are kept, 4 to 6 the junk. No images are classified and
    no averages are written: the classes come from the truth, and are wrong for some.

    Parameters
    ----------
    particles_star : what `simulate_project` returned, RELION version 3.1
    wrong : share of the particles, and of the junk, that is in a class of the others

    Returns
    -------
    The particles.star of the Select job

    Raises
    ------
    UsageError : the project has more jobs than the one that was simulated
    """
    source = Path(particles_star)
    project = source.resolve().parents[2]
    pipeline = (project / "default_pipeline.star").read_text()
    if "_rlnPipeLineNodeTypeLabel" in pipeline or not re.search(r"Counter +2\n", pipeline):
        raise UsageError(f"{project}: expected a new project of RELION 3.1 with one Extract job.")
    for job in (CLASS2D, SELECT):
        (project / job).mkdir(parents=True)
        write_text(project / job / "RELION_JOB_EXIT_SUCCESS", "")
    lines = source.read_text().splitlines(keepends=True)
    rows = [line for line in lines if "@" in line]
    label = f"_rlnClassNumber #{len(PARTICLE_LABELS.split()) + 1} \n"
    head = "".join(line for line in lines if "@" not in line).rstrip() + f" \n{label}"
    classes = _classes(project, [row.split()[2] for row in rows], wrong, seed)
    classified = [f"{row.rstrip()} {number:12d} \n" for row, number in zip(rows, classes)]
    kept = [row for row, number in zip(classified, classes) if number in KEPT]
    root = f"{CLASS2D}/run_it025"
    write_text(project / f"{root}_data.star", f"{head}{''.join(classified)} \n")
    write_text(project / SELECT / "particles.star", f"{head}{''.join(kept)} \n")
    write_text(project / SELECT / "class_averages.star", _class_averages(root))
    write_text(project / SELECT / "backup_selection.star", _backup_selection())
    write_text(project / SELECT / "job.star", _job_star(root))
    write_text(project / "default_pipeline.star", _extended(pipeline, root))
    return source.parents[2] / SELECT / "particles.star"


def _classes(project: Path, images: list[str], wrong: float, seed: int) -> list[int]:
    """Return a class for each image: 1 to 3 for particles, 4 to 6 for junk, but for the wrong."""
    with (project / "truth.csv").open() as file:
        real = {row["image"]: row["real"] == "1" for row in csv.DictReader(file)}
    rng = np.random.default_rng(seed)
    good = np.array([real[name] for name in images])
    good ^= rng.random(len(good)) < wrong
    drawn = rng.integers(1, len(KEPT) + 1, len(good))
    numbers: list[int] = np.where(good, drawn, drawn + len(KEPT)).tolist()
    return numbers


def _class_averages(root: str) -> str:
    rows = "".join(f"{n:06d}@{root}_classes.mrcs {n:12d} \n" for n in KEPT)
    return f"{_VERSION}data_\n\nloop_ \n_rlnReferenceImage #1 \n_rlnClassNumber #2 \n{rows} \n"


def _backup_selection() -> str:
    rows = "".join(f"{int(n in KEPT):12d} \n" for n in range(1, N_CLASSES + 1))
    return f"{_VERSION}data_\n\nloop_ \n_rlnSelected #1 \n{rows} \n"


def _job_star(root: str) -> str:
    job = f"{_VERSION}data_job\n\n_rlnJobType 7\n_rlnJobIsContinue 0\n \n"
    options = f'fn_data "" \nfn_model {root}_model.star \n'
    labels = "_rlnJobOptionVariable #1 \n_rlnJobOptionValue #2 \n"
    return f"{job}{_VERSION}data_joboptions_values\n\nloop_ \n{labels}{options} \n"


def _extended(pipeline: str, root: str) -> str:
    """Add the two jobs and their files to a default_pipeline.star."""
    data, chosen = f"{root}_data.star", f"{SELECT}/particles.star"
    added = {
        "processes": f"{CLASS2D}/ None 8 2 \n{SELECT}/ None 7 2 \n",
        "nodes": f"{data} 3 \n{chosen} 3 \n",
        "output_edges": f"{CLASS2D}/ {data} \n{SELECT}/ {chosen} \n",
    }
    for table, rows in added.items():
        place = pipeline.index("\n \n", pipeline.index(f"data_pipeline_{table}\n")) + 1
        pipeline = pipeline[:place] + rows + pipeline[place:]
    return re.sub(r"(Counter +)2\n", r"\g<1>4\n", pipeline)

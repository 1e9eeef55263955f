"""A RELION project on disk, with one finished Extract job of simulated images."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mrcfile.mrcinterpreter import MrcInterpreter

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import replacing, write_text
from relion_cryofilter.simulate.micrograph import (
    MOLECULE_PER_BOX,
    PICKS_PER_MICROGRAPH,
    Boxes,
    CtfParameters,
    extracted_micrographs,
)
from relion_cryofilter.simulate.specimen import PARTICLE, random_molecule

CLASS2D, SELECT = "Class2D/job002", "Select/job003"
N_CLASSES, KEPT = 6, (1, 2, 3)
VERSIONS = {"3.1": 30001, "5": 50001}  # the number on RELION's "# version" lines
OPTICS_LABELS = (
    "OpticsGroupName OpticsGroup MicrographOriginalPixelSize Voltage SphericalAberration "
    "AmplitudeContrast ImagePixelSize ImageSize ImageDimensionality"
)
PARTICLE_LABELS = (
    "CoordinateX CoordinateY ImageName MicrographName OpticsGroup CtfMaxResolution "
    "CtfFigureOfMerit DefocusU DefocusV DefocusAngle CtfBfactor CtfScalefactor PhaseShift "
    "AutopickFigureOfMerit"
)


def simulate_project(
    folder: str | os.PathLike[str],
    *,
    n_micrographs: int = 12,
    particles_per_micrograph: int = PICKS_PER_MICROGRAPH,
    boxes: Boxes | None = None,
    snr: float = 0.05,
    seed: int = 0,
    relion_version: str = "3.1",
    next_job: int = 2,
) -> Path:
    """Write a RELION project with one finished Extract job; return its particles.star.

    The true kinds are in `truth.csv` (image, real, kind), in the order of the stacks; the rows of
    particles.star are shuffled. There is one molecule. The micrographs themselves are not written.

    Parameters
    ----------
    particles_per_micrograph
        All images of a micrograph, junk included.
    boxes, snr
        As in `Boxes` (its defaults if None) and `simulate_micrograph`.
    relion_version, next_job
        ``3.1`` or ``5``, and the number of the job that RELION will make next.

    Raises
    ------
    UsageError
        `folder` holds a project already, or a setting makes no sense.
    """
    folder, job, boxes = Path(folder), "Extract/job001", boxes or Boxes()
    pixel = float(boxes.pixel_size_angstrom)
    if relion_version not in VERSIONS:
        raise UsageError(f"RELION version {relion_version!r}: choose one of {', '.join(VERSIONS)}.")
    if (folder / "default_pipeline.star").exists() or (folder / job).exists():
        raise UsageError(f"{folder} holds a RELION project already. Name a new folder.")
    rng = np.random.default_rng(seed)
    molecule = random_molecule(rng, MOLECULE_PER_BOX * boxes.box_px * pixel)
    sizes = [particles_per_micrograph] * n_micrographs
    rows: list[list[Any]] = []
    truth = ["image,real,kind"]
    simulated = extracted_micrographs(rng, [molecule], sizes, boxes, snr)
    for number, (images, picks, p) in enumerate(simulated, 1):
        stack = f"{job}/Micrographs/mic{number:03d}.mrcs"
        (folder / stack).parent.mkdir(parents=True, exist_ok=True)
        # The interpreter has a stream, as its constructor describes.
        with replacing(folder / stack) as file, MrcInterpreter() as mrc:
            mrc._create_default_attributes()
            mrc._iostream = file
            mrc.set_data(images)
            mrc.set_image_stack()
            mrc.voxel_size = pixel
            mrc.header.label[0] = "simulated by relion_cryofilter"  # mrcfile's own holds the time
        micrograph = f"Micrographs/mic{number:03d}.mrc"
        fit = [rng.uniform(3.5, 6), rng.uniform(0.05, 0.2)]  # resolution and merit of the CTF fit
        defocus = [p.defocus_u_angstrom, p.defocus_v_angstrom, p.defocus_angle_degrees]
        for place, (x, y, kind) in enumerate(zip(picks.x, picks.y, picks.kind, strict=True), 1):
            name, merit = f"{place:06d}@{stack}", rng.uniform(0, 2)
            rows.append([x, y, name, micrograph, 1, *fit, *defocus, 0.0, 1.0, 0.0, merit])
            truth.append(f"{name},{int(kind == PARTICLE)},{kind}")
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    p = CtfParameters()
    microscope = [p.voltage_kv, p.cs_mm, p.amplitude_contrast]
    optics = ["opticsGroup1", 1, pixel, *microscope, pixel, boxes.box_px, 2]
    star = _table(relion_version, "optics", OPTICS_LABELS, [optics])
    star += _table(relion_version, "particles", PARTICLE_LABELS, shuffled)
    write_text(folder / "truth.csv", "\n".join(truth) + "\n")
    write_text(folder / job / "particles.star", star)
    write_text(folder / job / "RELION_JOB_EXIT_SUCCESS", "")
    write_text(folder / "default_pipeline.star", _pipeline_star(relion_version, job, next_job))
    return folder / job / "particles.star"


def _table(version: str, name: str, labels: str, rows: Sequence[Sequence[Any]]) -> str:
    """Return a loop block as RELION's MetaDataTable::write lays it out (src/metadata_table.cpp)."""
    head = [f"_rln{label} #{i} " for i, label in enumerate(labels.split(), 1)]
    widths = {str: ">10", int: "12d"}
    body = [" ".join(f"{v:{widths.get(type(v), '12.6f')}}" for v in row) + " " for row in rows]
    lines = ["", f"# version {VERSIONS[version]}", "", f"data_{name}", "", "loop_ ", *head, *body]
    return "\n".join(lines) + "\n \n"


def _pipeline_star(version: str, job: str, next_job: int) -> str:
    """Return default_pipeline.star of a finished Extract job, as RELION's PipeLine::write does."""
    counter = f"_rlnPipeLineJobCounter {next_job:23d}"
    text = f"\n# version {VERSIONS[version]}\n\ndata_pipeline_general\n\n{counter}\n \n"
    process: dict[str, Any] = {"ProcessName": f"{job}/", "ProcessAlias": "None"}
    node: dict[str, Any] = {"NodeName": f"{job}/particles.star"}
    edge = {"EdgeProcess": f"{job}/", "EdgeToNode": f"{job}/particles.star"}
    if version == "3.1":
        process |= {"ProcessType": 5, "ProcessStatus": 2}
        node |= {"NodeType": 3}
    else:
        process |= {"ProcessTypeLabel": "relion.extract", "ProcessStatusLabel": "Succeeded"}
        node |= {"NodeTypeLabel": "ParticleGroupMetadata.star.relion", "NodeTypeLabelDepth": 1}
    for name, row in {"processes": process, "nodes": node, "output_edges": edge}.items():
        labels = " ".join(f"PipeLine{label}" for label in row)
        text += _table(version, f"pipeline_{name}", labels, [[*row.values()]])
    return text


def simulate_selection(
    particles_star: str | os.PathLike[str], *, wrong: float = 0.1, seed: int = 0
) -> Path:
    """Add a Class2D job and a Select job to a project of `simulate_project`, as RELION 3.1 would.

    Classes 1 to 3 hold the particles and are kept, 4 to 6 the junk. No images are classified and
    no averages are written: the classes come from the truth, and are wrong for the share `wrong`
    of the particles, and of the junk. Returns the particles.star of the Select job; a UsageError
    if the project is none of RELION 3.1 with its one job.
    """
    import starfile  # half a second, with pandas
    from pandas import DataFrame

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
    # Classes 1 to 3 for particles, 4 to 6 for junk, but for the wrong ones.
    with (project / "truth.csv").open() as file:
        real = {row["image"]: row["real"] == "1" for row in csv.DictReader(file)}
    rng = np.random.default_rng(seed)
    good = np.array([real[row.split()[2]] for row in rows])
    good ^= rng.random(len(good)) < wrong
    drawn = rng.integers(1, len(KEPT) + 1, len(good))
    classes = np.where(good, drawn, drawn + len(KEPT)).tolist()
    classified = [f"{row.rstrip()} {number:12d} \n" for row, number in zip(rows, classes)]
    kept = [row for row, number in zip(classified, classes) if number in KEPT]
    root = f"{CLASS2D}/run_it025"
    write_text(project / f"{root}_data.star", f"{head}{''.join(classified)} \n")
    write_text(project / SELECT / "particles.star", f"{head}{''.join(kept)} \n")
    # What the Select job says of the classes and of itself.
    images = [f"{n:06d}@{root}_classes.mrcs" for n in KEPT]
    averages = DataFrame({"rlnReferenceImage": images, "rlnClassNumber": KEPT})
    backup = DataFrame({"rlnSelected": [int(n in KEPT) for n in range(1, N_CLASSES + 1)]})
    names, values = ["fn_data", "fn_model"], ["", f"{root}_model.star"]
    options = DataFrame({"rlnJobOptionVariable": names, "rlnJobOptionValue": values})
    job_star = {"job": {"rlnJobType": 7, "rlnJobIsContinue": 0}, "joboptions_values": options}
    starfile.write({"": averages}, project / SELECT / "class_averages.star")
    starfile.write({"": backup}, project / SELECT / "backup_selection.star")
    starfile.write(job_star, project / SELECT / "job.star")
    # The two jobs and their files in the pipeline.
    data, chosen = f"{root}_data.star", f"{SELECT}/particles.star"
    added = {
        "processes": f"{CLASS2D}/ None 8 2 \n{SELECT}/ None 7 2 \n",
        "nodes": f"{data} 3 \n{chosen} 3 \n",
        "output_edges": f"{CLASS2D}/ {data} \n{SELECT}/ {chosen} \n",
    }
    for table, text in added.items():
        place = pipeline.index("\n \n", pipeline.index(f"data_pipeline_{table}\n")) + 1
        pipeline = pipeline[:place] + text + pipeline[place:]
    pipeline = re.sub(r"(Counter +)2\n", r"\g<1>4\n", pipeline)
    (project / "default_pipeline.star").unlink()  # found above to be that of a new project
    write_text(project / "default_pipeline.star", pipeline)
    return source.parents[2] / SELECT / "particles.star"

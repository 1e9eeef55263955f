"""A RELION project on disk, with one finished Extract job of simulated images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mrcfile.mrcinterpreter import MrcInterpreter

from relion_cryofilter.data.simulate.micrograph import (
    MOLECULE_PER_BOX,
    PICKS_PER_MICROGRAPH,
    CtfParameters,
    Picks,
    check_settings,
    extracted_micrographs,
)
from relion_cryofilter.data.simulate.specimen import Array, random_molecule
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import replacing, write_text

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
    box_px: int = 64,
    pixel_size_angstrom: float = 3.0,
    snr: float = 0.05,
    junk_fraction: float = 0.5,
    seed: int = 0,
    relion_version: str = "3.1",
    next_job: int = 2,
) -> Path:
    """Write a RELION project with one finished Extract job, of images of one molecule.

    The true kinds are in `truth.csv` (image, real, kind), in the order of the stacks; the rows of
    particles.star are shuffled. The micrographs themselves are not written.

    Parameters
    ----------
    particles_per_micrograph : all images of a micrograph, junk included
    snr : as in simulate_micrograph
    junk_fraction : part of each micrograph's images that is junk, 0 to 1
    relion_version : "3.1" or "5"
    next_job : number of the job that RELION will make next

    Returns
    -------
    The path of particles.star

    Raises
    ------
    UsageError : `folder` holds a project already, or a setting makes no sense
    """
    check_settings(min(n_micrographs, particles_per_micrograph), box_px, snr, junk_fraction)
    folder, job = Path(folder), "Extract/job001"
    if relion_version not in VERSIONS:
        raise UsageError(f"RELION version {relion_version!r}: choose one of {', '.join(VERSIONS)}.")
    if (folder / "default_pipeline.star").exists() or (folder / job).exists():
        raise UsageError(f"{folder} holds a RELION project already. Name a new folder.")
    (folder / job / "Micrographs").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    molecule = random_molecule(rng, MOLECULE_PER_BOX * box_px * pixel_size_angstrom)
    sizes = [particles_per_micrograph] * n_micrographs
    rows: list[list[Any]] = []
    truth = ["image,real,kind"]
    field = {"box_px": box_px, "pixel_size_angstrom": pixel_size_angstrom, "snr": snr}
    simulated = extracted_micrographs(rng, [molecule], sizes, junk_fraction, **field)
    for number, (images, picks, parameters) in enumerate(simulated, 1):
        stack = f"{job}/Micrographs/mic{number:03d}.mrcs"
        _write_stack(folder / stack, images, pixel_size_angstrom)
        names = [f"{i:06d}@{stack}" for i in range(1, len(images) + 1)]
        rows += _particle_rows(rng, names, f"Micrographs/mic{number:03d}.mrc", picks, parameters)
        truth += [f"{a},{b},{c}" for a, b, c in zip(names, picks.labels, picks.kind, strict=True)]
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    star = _particles_star(relion_version, shuffled, box_px, pixel_size_angstrom)
    write_text(folder / "truth.csv", "\n".join(truth) + "\n")
    write_text(folder / job / "particles.star", star)
    write_text(folder / job / "RELION_JOB_EXIT_SUCCESS", "")
    write_text(folder / "default_pipeline.star", _pipeline_star(relion_version, job, next_job))
    return folder / job / "particles.star"


def _table(version: str, name: str, labels: str, rows: Sequence[Sequence[Any]]) -> str:
    """One loop block as RELION's MetaDataTable::write lays it out (src/metadata_table.cpp)."""
    head = [f"_rln{label} #{i} " for i, label in enumerate(labels.split(), 1)]
    body = [" ".join(_cell(value) for value in row) + " " for row in rows]
    lines = ["", f"# version {VERSIONS[version]}", "", f"data_{name}", "", "loop_ ", *head, *body]
    return "\n".join(lines) + "\n \n"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"{value:>10}"
    return f"{value:12d}" if isinstance(value, int) else f"{value:12.6f}"


def _particles_star(
    version: str, rows: list[list[Any]], box_px: int, pixel_size_angstrom: float
) -> str:
    p, pixel = CtfParameters(), float(pixel_size_angstrom)
    microscope = [p.voltage_kv, p.cs_mm, p.amplitude_contrast]
    optics = ["opticsGroup1", 1, pixel, *microscope, pixel, box_px, 2]
    head = _table(version, "optics", OPTICS_LABELS, [optics])
    return head + _table(version, "particles", PARTICLE_LABELS, rows)


def _particle_rows(
    rng: np.random.Generator, images: list[str], micrograph: str, picks: Picks, p: CtfParameters
) -> list[list[Any]]:
    fit = [rng.uniform(3.5, 6), rng.uniform(0.05, 0.2)]  # resolution and merit of the CTF fit
    defocus = [p.defocus_u_angstrom, p.defocus_v_angstrom, p.defocus_angle_degrees]
    return [
        [x, y, image, micrograph, 1, *fit, *defocus, 0.0, 1.0, 0.0, rng.uniform(0, 2)]
        for x, y, image in zip(picks.x, picks.y, images, strict=True)
    ]


def _pipeline_star(version: str, job: str, next_job: int) -> str:
    """default_pipeline.star with one finished Extract job (src/pipeliner.cpp, PipeLine::write)."""
    counter = f"_rlnPipeLineJobCounter {next_job:23d}"
    text = f"\n# version {VERSIONS[version]}\n\ndata_pipeline_general\n\n{counter}\n \n"
    star = f"{job}/particles.star"
    processes, nodes = "PipeLineProcessName PipeLineProcessAlias ", "PipeLineNodeName "
    if version == "3.1":
        processes += "PipeLineProcessType PipeLineProcessStatus"
        nodes += "PipeLineNodeType"
        process, node = [f"{job}/", "None", 5, 2], [star, 3]
    else:
        processes += "PipeLineProcessTypeLabel PipeLineProcessStatusLabel"
        nodes += "PipeLineNodeTypeLabel PipeLineNodeTypeLabelDepth"
        process = [f"{job}/", "None", "relion.extract", "Succeeded"]
        node = [star, "ParticleGroupMetadata.star.relion", 1]
    text += _table(version, "pipeline_processes", processes, [process])
    text += _table(version, "pipeline_nodes", nodes, [node])
    edges = "PipeLineEdgeProcess PipeLineEdgeToNode"
    return text + _table(version, "pipeline_output_edges", edges, [[f"{job}/", star]])


def _write_stack(path: Path, images: Array, pixel_size_angstrom: float) -> None:
    # An interpreter without a path, set up as its constructor's documentation tells.
    with replacing(path) as file, MrcInterpreter() as stack:
        stack._create_default_attributes()
        stack._iostream = file
        stack.set_data(images)
        stack.set_image_stack()
        stack.voxel_size = pixel_size_angstrom
        stack.header.label[0] = "simulated by relion_cryofilter"  # mrcfile's own holds the time

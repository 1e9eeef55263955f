"""A second look at what was rejected: a Class2D job of RELION, with the project's own settings."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import (
    BAD_IMAGES,
    PIPELINE_FILE,
    REJECTED,
    SAMPLE,
    claim,
    find_project,
)
from relion_cryofilter.images.bad import usable_in
from relion_cryofilter.options import CheckOptions
from relion_cryofilter.particles.particles import ParticleSet, read_particles
from relion_cryofilter.particles.stacks import read_header
from relion_cryofilter.particles.star import DEFOCUS, Loop
from relion_cryofilter.progress import counted
from relion_cryofilter.relion.nodes import relion_version
from relion_cryofilter.relion.templates import quoted, write_job_file

GUI_FILE = ".gui_class2djob.star"
MOST_CLASSES, FEWEST_CLASSES, PARTICLES_A_CLASS = 50, 4, 100
DIAMETER_PER_BOX = 0.7  # boxes are some one and a half diameters wide
_HEADS = {
    "3.1": "# version 30001\n\ndata_job\n\n_rlnJobType 8\n_rlnJobIsContinue 0\n",
    "4.0": "# version 30001\n\ndata_job\n\n_rlnJobTypeLabel relion.class2d\n"
    "_rlnJobIsContinue 0\n_rlnJobIsTomo 0\n",
    "5.0": "# version 50001\n\ndata_job\n\n_rlnJobTypeLabel relion.class2d\n"
    "_rlnJobIsContinue 0\n_rlnJobIsTomo 0\n",
}
_OPTIONS = "data_joboptions_values\n\nloop_\n_rlnJobOptionVariable #1\n_rlnJobOptionValue #2\n"
_AFRESH = {"fn_cont": ""}  # what a job that was continued says, and a new one must not

log = logging.getLogger("relion_cryofilter")


def write_check(options: CheckOptions, named: str = "") -> None:
    """Write job.star and .gui_class2djob.star of a Class2D job on rejected particles.

    Or, with the words of --o in `named`, one file there.

    Raises
    ------
    CryoFilterError
        There are no rejected particles, or they can't be read.
    """
    # Read what was rejected.
    source = options.in_parts
    if source is None:
        raise UsageError("Say whose rejected particles to classify: --in_parts External/job012/.")
    source = source / REJECTED if source.is_dir() else source
    if source.suffix != ".star" or not source.is_file():
        raise UsageError(
            f"--in_parts {source} is no STAR file of particles. Give the folder of a score job "
            f"that rejected some, e.g. External/job012/, or its {REJECTED}."
        )
    particles = read_particles(source)
    usable = np.flatnonzero(usable_in(particles, source.parent))
    n = min(len(usable), options.sample or len(usable))
    if not n:
        raise UsageError(f"No image of {source} can be used; {BAD_IMAGES} beside it says why.")

    # Draw a sample, or leave out what RELION can't read.
    if n < len(particles):
        drawn = np.zeros(len(particles), bool)
        rng = np.random.default_rng(options.seed)
        drawn[rng.choice(usable, n, replace=False)] = True
        claim(source.parent)
        path = source.with_name(SAMPLE)
        assert particles.table is not None
        particles.table.write({path: drawn})
        log.info("Drew %s of %s: %s", f"{n:,}", counted(len(particles), "particle"), path)
        source = path

    # The settings: those of the project's last Class2D job, or few that RELION completes.
    project = find_project(Path()) or Path()
    last = _last_classification(project)
    values = {**_AFRESH, "fn_img": str(source)}
    if options.j:
        values["nr_threads"] = str(options.j)
    if last is not None:
        text = _changed(last.read_text(), values)
        log.info("Settings as in %s; look at the number of classes.", last.relative_to(project))
    else:
        values |= _guessed(particles, n)
        written = relion_version(source.with_name("job.star"), project / PIPELINE_FILE)
        text = _new(options.relion or written, values)
        log.warning(
            "This project has no Class2D job to take settings from: %s classes and a mask of %s Å "
            "are guesses. Look at them before you run it.",
            values["nr_classes"], values["particle_diameter"],
        )  # fmt: skip
    write_job_file(text, named, GUI_FILE, "2D classification")


def _last_classification(project: Path) -> Path | None:
    """Return the job.star of the Class2D job with the highest number, or None."""
    found = {}
    for path in project.glob("Class2D/job*/job.star"):
        number = re.fullmatch(r"job(\d+)", path.parent.name)
        if number:
            found[int(number[1])] = path
    return found[max(found)] if found else None


def _changed(text: str, values: dict[str, str]) -> str:
    """Return a job.star with other values of options that it has, as a job that begins anew."""
    text = re.sub(r"^(\s*_rlnJobIsContinue\s+)\S+", r"\g<1>0", text, flags=re.M)
    for name, value in values.items():
        line = f"{name} {quoted(value)}".replace("\\", r"\\")
        text, times = re.subn(rf"^[ \t]*{name}[ \t]+\S.*$", line, text, flags=re.M)
        if not times and value:
            raise UsageError(
                f"The job.star of the last Class2D job has no {name}. Run one in RELION, or move "
                "that folder away."
            )
    return text


def _new(version: str, values: dict[str, str]) -> str:
    """Return a job.star for a version of RELION, which has defaults for what is not named."""
    lines = "".join(f"{name} {quoted(value)}\n" for name, value in values.items())
    return f"\n{_HEADS[version]}\n{_OPTIONS}{lines}\n"


def _guessed(particles: ParticleSet, n: int) -> dict[str, str]:
    """Return a number of classes for n particles, a mask for their boxes, and whether CTFs are."""
    classes = min(MOST_CLASSES, max(FEWEST_CLASSES, n // PARTICLES_A_CLASS))
    header = read_header(particles.stacks[particles.stack_of[0]])
    pixel = particles.optics[particles.optics_of[0]].pixel_size_angstrom
    diameter = DIAMETER_PER_BOX * header.nx * (pixel or header.pixel_size_angstrom or 1)
    assert isinstance(particles.table, Loop)
    return {
        "do_ctf_correction": "Yes" if DEFOCUS[0] in particles.table.labels else "No",
        "nr_classes": str(classes),
        "particle_diameter": f"{diameter:.0f}",
    }

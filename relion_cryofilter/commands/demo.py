"""``relion_cryofilter demo``: a simulated RELION project, scored as an External job would."""

from __future__ import annotations

import csv
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from relion_cryofilter.commands import Output
from relion_cryofilter.data.particles import read_particles
from relion_cryofilter.data.simulate import simulate_project
from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.options import DemoOptions

JOB = "External/job002/"
PARTICLES = "Extract/job001/particles.star"
SEED = 2020

log = logging.getLogger("relion_cryofilter")


def demo(
    options: DemoOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Make the project where it is missing, run the job in it, and compare with the truth.

    Raises
    ------
    UsageError
        The folder holds something else.
    CryoFilterError
        The job failed.
    """
    project = options.folder
    _make_project(project)
    words = ["score", "--o", JOB, "--in_parts", PARTICLES]
    words += ["--j", str(options.j)] if options.j else []
    log.info("In %s, as RELION would start it: external_job.py %s\n", project, " ".join(words))
    _run_job(words, project)
    _compare(project)
    return ()


def _make_project(project: Path) -> None:
    if (project / PARTICLES).is_file() and (project / "truth.csv").is_file():
        log.info("%s holds the simulated project already; scoring it again.", project)
        return
    if project.exists() and (not project.is_dir() or any(project.iterdir())):
        raise UsageError(f"{project} exists and is not a demo project. Name a new folder.")
    log.info("Simulating a RELION project in %s …", project)
    project.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{project.name}.", dir=project.parent) as folder:
        made = Path(folder) / "project"
        simulate_project(made, n_micrographs=10, particles_per_micrograph=100, seed=SEED)
        made.replace(project)


def _run_job(words: list[str], project: Path) -> None:
    package_home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_home, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "relion_cryofilter", *words],
        cwd=project, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CryoFilterError("The demo job failed; see the lines above.")


def _compare(project: Path) -> None:
    with (project / "truth.csv").open() as file:
        kinds = {row["image"]: row["kind"] for row in csv.DictReader(file)}
    total = Counter(kinds.values())
    kept: Counter[str] = Counter()
    accepted = project / JOB / "particles_accepted.star"
    if accepted.is_file():
        particles = read_particles(accepted)
        kept.update(kinds[particles.image_name(row)] for row in range(len(particles)))
    log.info("\nAgainst the truth of the simulation, accepted of all:")
    for kind, count in total.most_common():
        log.info("  %-11s %4d of %4d", kind, kept[kind], count)
    log.info(
        "\nLook at %s: particles_accepted.star and particles_rejected.star are ready for the next "
        "job,\nparticles.star holds every particle with its score, rlnParticleFigureOfMerit.",
        project / JOB,
    )

"""``relion_cryofilter demo``: a simulated RELION project, filtered before and after a training."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.files import ACCEPTED, LOGFILE, METRICS, MODEL
from relion_cryofilter.options import DemoOptions
from relion_cryofilter.particles.particles import ParticleSet, read_particles
from relion_cryofilter.progress import counted
from relion_cryofilter.results.outputs import Output
from relion_cryofilter.simulate import PARTICLE, simulate_project

SCORE, TRAIN, SCORE_AGAIN = "External/job002/", "External/job003/", "External/job004/"
PARTICLES = "Extract/job001/particles.star"
GOOD, BAD = "labels/good.star", "labels/bad.star"
MICROGRAPHS, PARTICLES_EACH, LABELLED, SEED = 12, 60, 6, 2020

log = logging.getLogger("relion_cryofilter")


def demo(
    options: DemoOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Make the project where it is missing, run the jobs in it, and compare with the truth.

    Raises
    ------
    UsageError
        The folder holds something else.
    CryoFilterError
        A job failed.
    """
    project = options.folder
    _make_project(project)
    particles = read_particles(project / PARTICLES)
    kinds, labelled = _truth(project, particles)
    threads = ["--j", str(options.j)] if options.j else []
    log.info("\n1. Score with the bundled model.")
    _run_job(["score", "--o", SCORE, "--in_parts", PARTICLES, *threads], project)
    log.info("\n2. Train on labels of %d of the %d micrographs.", LABELLED, MICROGRAPHS)
    _write_labels(project, particles, kinds, labelled)
    words = ["train", "--o", TRAIN, "--pos", GOOD, "--neg", BAD, *threads]
    _run_job([*words, "--quiet"], project)
    found = json.loads((project / TRAIN / METRICS).read_text())
    log.info(
        "Out of fold, on %s only: AUC %.3f against the labels; %s has the rest.",
        counted(found["n_groups"], "micrograph"), found["auc"]["value"], project / TRAIN / LOGFILE,
    )  # fmt: skip
    log.info("\n3. Score with the trained model.")
    model = f"{TRAIN}{MODEL}"
    _run_job(
        ["score", "--o", SCORE_AGAIN, "--in_parts", PARTICLES, "--weights", model, *threads],
        project,
    )
    _compare(project, particles, kinds, labelled)
    return ()


def _make_project(project: Path) -> None:
    if (project / PARTICLES).is_file() and (project / "truth.csv").is_file():
        log.info("%s holds the simulated project already; filtering it again.", project)
        return
    if project.exists() and (not project.is_dir() or any(project.iterdir())):
        raise UsageError(f"{project} exists and is not a demo project. Name a new folder.")
    log.info("Simulating a RELION project in %s …", project)
    project.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{project.name}.", dir=project.parent) as folder:
        made = Path(folder) / "project"
        simulate_project(
            made, n_micrographs=MICROGRAPHS, particles_per_micrograph=PARTICLES_EACH, snr=0.1,
            seed=SEED, next_job=5,
        )  # fmt: skip
        made.replace(project)


def _run_job(words: list[str], project: Path) -> None:
    log.info("In %s: relion_cryofilter %s\n", project, " ".join(words))
    package_home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_home, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "relion_cryofilter", *words],
        cwd=project, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CryoFilterError("The demo job failed; see the lines above.")


def _truth(project: Path, particles: ParticleSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of each row of particles.star and whether its micrograph is labelled."""
    with (project / "truth.csv").open() as file:
        kind_of = {row["image"]: row["kind"] for row in csv.DictReader(file)}
    kinds = np.array([kind_of[particles.image_name(row)] for row in range(len(particles))])
    first = sorted(particles.micrographs)[:LABELLED]
    return kinds, np.isin(np.array(particles.micrographs)[particles.micrograph_of], first)


def _write_labels(
    project: Path, particles: ParticleSet, kinds: np.ndarray, labelled: np.ndarray
) -> None:
    good = kinds == PARTICLE
    (project / GOOD).parent.mkdir(exist_ok=True)
    for name in (GOOD, BAD):  # of an earlier run
        (project / name).unlink(missing_ok=True)
    masks = {project / GOOD: labelled & good, project / BAD: labelled & ~good}
    assert particles.table is not None
    particles.table.write(masks)


def _compare(
    project: Path, particles: ParticleSet, kinds: np.ndarray, labelled: np.ndarray
) -> None:
    row_of = {particles.image_name(row): row for row in range(len(particles))}
    kept = []
    for job in (SCORE, SCORE_AGAIN):
        accepted = project / job / ACCEPTED
        best = read_particles(accepted) if accepted.is_file() else None
        rows = [row_of[best.image_name(n)] for n in range(len(best))] if best else []
        kept.append(Counter(kinds[row] for row in rows if not labelled[row]))
    log.info(
        "\nAccepted on the %d micrographs without labels, against the truth of the simulation:\n"
        "  kind         of all   bundled   trained", MICROGRAPHS - LABELLED,
    )  # fmt: skip
    for kind, count in Counter(kinds[~labelled].tolist()).most_common():
        log.info("  %-11s %7d %9d %9d", kind, count, kept[0][kind], kept[1][kind])
    log.info(
        "\nLook at %s: particles_accepted.star and particles_rejected.star are ready for the next\n"
        "job, particles.star holds every particle with its score, rlnParticleFigureOfMerit, and\n"
        "report.html shows them in a browser. %s holds the model and its own report.",
        project / SCORE_AGAIN, project / TRAIN,
    )  # fmt: skip

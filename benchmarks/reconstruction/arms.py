"""Which picks go into a map: all, a selection of 2D classes, what is filtered, random ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import starfile
from classes import CLASSIFY, mostly_good, particles_of_one_stack, shrunk
from picks import BOX, PICKS_STAR, STACK, Truth

from relion_cryofilter.files import ACCEPTED, MODEL
from relion_cryofilter.files import ALL as SCORED
from relion_cryofilter.particles.particles import ParticleSet, read_particles

SMALL, CLASSES, ITERATIONS = 44, 16, 14
MASK = 1.2
"""Mask diameter / particle diameter."""
ALL, SELECTED, TRAINED = "all picks", "2D classes", "2D classes, then trained on them"
UNLABELLED, ADAPTED = "no labels: bundled model", "no labels: --adapt"
TRUE = "the true particles"


def arms(project: Path, truth: Truth, threads: int) -> dict[str, np.ndarray]:
    """Return the picks (n,) that each arm keeps, with a random subset of each filtered one's size.

    Classes are kept by a rule that nobody has in practice, by the truth: those that hold more
    particles than junk. The model is trained on that selection, and asked for the default recall.
    """
    n = len(truth.kinds)
    classes = _classes(project, truth, threads)
    selected = mostly_good(classes, truth.good)[classes]
    particles = read_particles(project / PICKS_STAR)
    assert particles.table is not None
    labels = {project / "labels/good.star": selected, project / "labels/bad.star": ~selected}
    if not (project / "External/trained" / MODEL).exists():
        (project / "labels").mkdir(exist_ok=True)
        for path in labels:
            path.unlink(missing_ok=True)
        particles.table.write(labels)
        _run(project, f"train --o External/trained/ --pos labels/good.star --neg labels/bad.star "
                      f"--j {threads}")  # fmt: skip
    score = f"score --in_parts {PICKS_STAR} --j {threads} --o"
    trained = _accepted(
        project, particles, "External/filtered",
        f"{score} External/filtered/ --weights External/trained/{MODEL}",
    )  # fmt: skip
    unlabelled = _accepted(
        project, particles, "External/unlabelled", f"{score} External/unlabelled/"
    )
    adapted = _accepted(
        project, particles, "External/adapted", f"{score} External/adapted/ --adapt"
    )
    found = {ALL: np.ones(n, bool), SELECTED: selected, TRAINED: trained,
             UNLABELLED: unlabelled, ADAPTED: adapted}  # fmt: skip
    rng = np.random.default_rng(0)
    for name in (SELECTED, TRAINED, ADAPTED):
        chosen = rng.permutation(n) < found[name].sum()
        found[f"random, as many as: {name}"] = chosen
    return {**found, TRUE: truth.good}


def _run(project: Path, words: str) -> None:
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-m", "relion_cryofilter", *words.split(), "--quiet"],
        cwd=project, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def _accepted(project: Path, particles: ParticleSet, folder: str, words: str) -> np.ndarray:
    """Return (n,) what a score job accepts, which is run where it has not been yet."""
    if not (project / folder / SCORED).exists():
        _run(project, words)
    row_of = {particles.image_name(row): row for row in range(len(particles))}
    kept = np.zeros(len(particles), bool)
    if (project / folder / ACCEPTED).exists():
        found = read_particles(project / folder / ACCEPTED)
        kept[[row_of[found.image_name(row)] for row in range(len(found))]] = True
    return kept


def _classes(project: Path, truth: Truth, threads: int) -> np.ndarray:
    """Return (n,) the class of each pick, 1 to CLASSES, by RELION, of the images at SMALL px."""
    folder = project / "Class2D"
    last = folder / f"run_it{ITERATIONS:03d}_data.star"
    if not last.exists():
        folder.mkdir(exist_ok=True)
        with mrcfile.open(project / STACK) as file:
            small = shrunk(np.asarray(file.data), SMALL)
        pixel_size = truth.pixel_size * BOX / SMALL
        mrcfile.write(folder / "small.mrcs", small, overwrite=True, voxel_size=pixel_size)
        tables = starfile.read(project / PICKS_STAR)
        tables["optics"]["rlnImagePixelSize"], tables["optics"]["rlnImageSize"] = pixel_size, SMALL
        names = tables["particles"]["rlnImageName"].str.partition("@")[0]
        tables["particles"]["rlnImageName"] = names + "@Class2D/small.mrcs"
        starfile.write(tables, folder / "particles.star", overwrite=True)
        relion(
            ["relion_refine", "--i", "Class2D/particles.star", "--o", "Class2D/run"],
            f"{CLASSIFY} --K {CLASSES} --iter {ITERATIONS} --particle_diameter "
            f"{MASK * truth.diameter:.0f} --j {threads}",
            project,
        )  # fmt: skip
    rows, table = particles_of_one_stack(last)
    classes = np.zeros(len(truth.kinds), np.int64)
    classes[rows] = table["rlnClassNumber"]
    return classes


def relion(words: list[str], more: str, project: Path) -> None:
    """Run a program of RELION, or go on where it was stopped; its words go to run.out."""
    stem = project / words[words.index("--o") + 1]
    # RELION cannot go on from iteration 0, and the files of the last one may be unfinished
    finished = sorted(stem.parent.glob(f"{stem.name}_it*_optimiser.star"))[1:-1]
    if finished:
        at = words.index("relion_refine" if "relion_refine" in words else "relion_refine_mpi")
        last = str(finished[-1].relative_to(project))
        words = [*words[: at + 1], "--continue", last, "--o", str(stem.relative_to(project))]
        more = f"--j {more.rpartition('--j ')[2]}"
    with (stem.parent / "run.out").open("a") as out:
        subprocess.run(
            [*words, *more.split()], cwd=project, check=True, stdout=out, stderr=subprocess.STDOUT
        )

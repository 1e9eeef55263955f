"""How long the report of a large set takes, and how large it is: python benchmarks/report.py.

A simulated STAR file of --n particles on 2,000 micrographs, whose images are those of one small
stack, with made-up scores and features: what is measured is the report alone, without scoring.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

from relion_cryofilter.files import LOGFILE, REPORT
from relion_cryofilter.images.bad import BadImages
from relion_cryofilter.nn.model import read_models
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.options import ScoreOptions
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.results.outputs import FEATURE_SAMPLE
from relion_cryofilter.results.report import score_report
from relion_cryofilter.results.report_files import write_report
from relion_cryofilter.thresholds import Chosen

MICROGRAPHS, IMAGES, BOX_PX = 2000, 500, 128
LABELS = (
    "CoordinateX", "CoordinateY", "ImageName", "MicrographName", "OpticsGroup",
    "CtfMaxResolution", "CtfFigureOfMerit", "DefocusU", "DefocusV", "DefocusAngle",
    "CtfBfactor", "CtfScalefactor", "PhaseShift", "AutopickFigureOfMerit",
)  # fmt: skip
HEAD = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2
_rlnImageSize #3
1 1.5 128

# version 30001

data_particles

loop_
"""


def main() -> None:
    """Make the set, write its report, print time, memory and sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as folder:
        path = write_set(Path(folder), n)
        particles = read_particles(path)
        made = made_up(particles, path.parent)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, start_cpu = time.monotonic(), time.process_time()
        write_report(path.parent, lambda: score_report(*made))
        seconds, cpu = time.monotonic() - start, time.process_time() - start_cpu
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{n:,} particles: {seconds:.1f} s ({cpu:.1f} s of the processor)")
        print(f"memory {before / 1024:,.0f} MB before, {after / 1024:,.0f} MB at most")
        for name in (LOGFILE, REPORT):
            print(f"{name}: {(path.parent / name).stat().st_size / 1e6:.2f} MB")


def write_set(folder: Path, n: int) -> Path:
    """Write the STAR file and its stack; return the STAR file."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(IMAGES, BOX_PX, BOX_PX)).astype(np.float32)
    with mrcfile.new(folder / "stack.mrcs") as file:
        file.set_data(images)
        file.set_image_stack()
    labels = "".join(f"_rln{name} #{place}\n" for place, name in enumerate(LABELS, 1))
    path = folder / "particles.star"
    defocus = rng.uniform(8e3, 25e3, MICROGRAPHS)
    with path.open("w") as file:
        file.write(HEAD + labels)
        for row, (x, y, merit) in enumerate(rng.random((n, 3)).tolist()):
            micrograph = row * MICROGRAPHS // n
            u = defocus[micrograph]
            file.write(
                f"{4000 * x:12.6f} {4000 * y:12.6f} {row % IMAGES + 1:06d}@{folder}/stack.mrcs "
                f"MotionCorr/job002/Micrographs/mic{micrograph:05d}.mrc 1 "
                f"{3 + u / 1e4:.6f} 0.1 {u:.6f} {u - 200:.6f} 12.0 0.0 1.0 0.0 {2 * merit:.6f} \n"
            )
    return path


def made_up(particles, folder: Path) -> tuple[Any, ...]:
    """Return what `score` knows: scores as a filter gives them, and features to match."""
    rng = np.random.default_rng(1)
    n = len(particles)
    quality = rng.beta(2, 2, MICROGRAPHS)[particles.micrograph_of]
    logits = np.where(rng.random(n) < quality, 2.5, -3) + 1.5 * rng.normal(size=n)
    values = np.round(1 / (1 + np.exp(-logits)), 6)
    sampled = np.sort(rng.choice(n, min(n, FEATURE_SAMPLE), replace=False))
    features = rng.normal(size=(len(sampled), 64)) + logits[sampled, None] * rng.normal(size=64)
    scores = Scores(
        values, BadImages(particles), 100.0, sampled=sampled, features=features.astype(np.float32)
    )
    options = ScoreOptions(in_parts=folder / "particles.star", o=folder, j=1)
    chosen = Chosen(values, values >= 0.5, 0.5, "as asked")
    return options, particles, read_models(), scores, chosen


if __name__ == "__main__":
    main()

"""Memory that scoring needs beyond torch and the model, for many particles.

    python benchmarks/memory.py [--n 200000] [--box 64]

Makes stacks of noise in a temporary folder (200,000 images of 64 x 64 px are 3.3 GB), scores
them as a job would, and prints the peak of the resident memory above that of a process that has
imported torch, loaded the model and scored one batch of nothing.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import mrcfile
import numpy as np

PER_STACK = 2000


def make(folder: Path, n: int, box: int) -> None:
    """Write the project: stacks of `PER_STACK` images and one STAR file, rows interleaved."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(PER_STACK, box, box)).astype(np.float32)
    stacks = -(-n // PER_STACK)
    for number in range(stacks):
        with mrcfile.new(folder / f"{number:05d}.mrcs") as file:
            file.set_data(np.roll(images, number, axis=2))
            file.set_image_stack()
    rows = (f"{i // stacks + 1:06d}@{i % stacks:05d}.mrcs mic{i % stacks}.mrc\n" for i in range(n))
    with (folder / "particles.star").open("w") as star:
        star.write("data_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n")
        star.writelines(rows)


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def score(folder: str) -> None:
    """Score the project in this process and print the memory before and after."""
    import torch

    from relion_cryofilter import ScoreOptions, load_model
    from relion_cryofilter import score as score_job
    from relion_cryofilter.nn.model import BUNDLED_MODEL

    model = load_model(BUNDLED_MODEL)
    model.probabilities(torch.zeros(32, 1, model.network.dim, model.network.dim))
    before = peak_mb()
    score_job(ScoreOptions(in_parts=f"{folder}/particles.star", o=f"{folder}/out", j=2))
    print(f"torch and model {before:.0f} MB, peak {peak_mb():.0f} MB: "
          f"{peak_mb() - before:.0f} MB for the job")  # fmt: skip


def main() -> None:
    """Make the data, score them in a process of their own, print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        score(options.score)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.n, options.box)
        print(f"{options.n:,} particles of {options.box} x {options.box} px", flush=True)
        subprocess.run([sys.executable, __file__, "--score", folder], check=True, cwd=folder)


if __name__ == "__main__":
    main()

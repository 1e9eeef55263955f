"""How long `train` takes, by the number of labels: whole runs of the command, report included.

    python benchmarks/training_time.py --work FOLDER [--labels 300 2500 100000] [--j 2]

Simulated images of 64 px in micrographs of 84; of more than 4,032 each is shown again with new
noise upon it. Labels are the truth, but for every tenth. Wall-clock and CPU seconds; nothing else
should run.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))

from sets import FLIPS, LabelledImages

from relion_cryofilter.simulate import simulate_images

ROOT = Path(__file__).resolve().parents[1]
BOX, PICKS, SIMULATED, SNR = 64, 84, 4032, 0.05


def make(folder: Path, n: int) -> tuple[Path, Path]:
    """Write a stack of n images, and good.star and bad.star of it, unless they are there."""
    good, bad = folder / "good.star", folder / "bad.star"
    if bad.exists():
        return good, bad
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    made = simulate_images(0, min(n, SIMULATED), BOX, SNR)
    of = np.arange(n) % len(made.labels)
    with mrcfile.new_mmap(folder / "all.mrcs", (n, BOX, BOX), mrc_mode=2) as stack:
        stack.set_image_stack()
        for first in range(0, n, SIMULATED):
            part = made.images[: min(SIMULATED, n - first)]
            noise = rng.normal(size=part.shape).astype(np.float32) if first else 0
            stack.data[first : first + len(part)] = part + 0.5 * noise
    names = np.array([f"{row // PICKS:05d}.mrc" for row in range(n)])
    data = LabelledImages(str(n), folder / "all.mrcs", names, made.labels[of] == 1, made.kinds[of])
    data.write_labels(folder, np.arange(n), data.noisy_labels(0.1, 0, FLIPS))
    return good, bad


def main() -> None:
    """Make what is missing, train, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[300, 2500, 100_000])
    parser.add_argument("--j", type=int, default=2)
    out = Path(__file__).parent / "results/training_time.md"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    rows = []
    for n in options.labels:
        good, bad = make(options.work / str(n), n)
        folder = options.work / f"{n}/trained_{time.time():.0f}"
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        words = ["train", "--pos", good, "--neg", bad, "--o", folder, "--j", str(options.j)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-m", "relion_cryofilter", *words, "--quiet"],
            check=True, env=environment,
        )  # fmt: skip
        wall, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        rows.append(f"| {n:,} | {wall:.0f} | {cpu:.0f} | {used.ru_maxrss / 1e6:.1f} |")
        print(rows[-1], flush=True)
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    options.out.write_text(
        "# How long a training takes\n\n"
        f"`python benchmarks/training_time.py`, {options.j} threads, "
        f"torch {torch.__version__}, {platform.machine()}. {about}\n"
        "| labels | wall, s | CPU, s | memory, GB (of all so far) |\n|---|---|---|---|\n"
        + "\n".join(rows) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()

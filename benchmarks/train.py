"""An epoch of training: small images kept in memory against the 2020 program's algorithm.

    python benchmarks/train.py --work FOLDER [--n 1200] [--box 256]

The 2020 program read, blurred and resized every image again for every batch (scikit-image), and
trained with batches of 32. CPU seconds an epoch, the same network (roberts, 28 px) and images;
and the default network, which 2020 did not have. Reading the images once comes before the first
epoch and is given apart.
"""

import argparse
import logging
import platform
import resource
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch
from program_2020 import prepared
from torch.nn.functional import binary_cross_entropy_with_logits

from relion_cryofilter import TrainOptions, train
from relion_cryofilter.nn.networks import build_network

DIM = 28


def make(folder: Path, n: int, box: int) -> tuple[Path, Path]:
    """Write good.mrcs (noise and a blob) and bad.mrcs (noise), unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:box, :box] - (box - 1) / 2
    blob = np.exp(-(x**2 + y**2) / (0.05 * box**2)).astype(np.float32)
    rng = np.random.default_rng(0)
    paths = folder / "good.mrcs", folder / "bad.mrcs"
    for path, strength in zip(paths, (1, 0)):
        if not path.exists():
            with mrcfile.new(path) as file:
                noise = rng.normal(size=(n // 2, box, box)).astype(np.float32)
                file.set_data(noise + strength * blob)
                file.set_image_stack()
    return paths


def ours(paths: tuple[Path, Path], out: Path, model: dict[str, str]) -> float:
    """Return CPU seconds an epoch: the difference of a long and a short training."""
    used = []
    for epochs in (2, 8):
        start = time.process_time()
        train(TrainOptions(
            pos=paths[:1], neg=paths[1:], o=out / f"{epochs}", epochs=epochs, patience=99,
            split=0.8, j=1, any_contrast=True, **model,
        ))  # fmt: skip
        used.append(time.process_time() - start)
        for leftover in (out / f"{epochs}").iterdir():
            leftover.unlink()
    return (used[1] - used[0]) / 6


def as_in_2020(paths: tuple[Path, Path]) -> float:
    """Return CPU seconds of one epoch over the same number of training images."""
    torch.manual_seed(0)
    network = build_network("roberts", f=32, dim=DIM)
    optimiser = torch.optim.Adam(network.parameters(), 1e-4)
    files = [mrcfile.mmap(path, permissive=True) for path in paths]
    names = [(kind, row) for kind in (0, 1) for row in range(int(0.8 * len(files[kind].data)))]
    names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    start = time.process_time()
    for first in range(0, len(names), 32):
        batch = names[first : first + 32]
        maps = np.stack([prepared(files[kind].data[row], DIM) for kind, row in batch])
        targets = torch.tensor([1.0 - kind for kind, _ in batch])
        loss = binary_cross_entropy_with_logits(network(torch.from_numpy(maps)), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return time.process_time() - start


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1200)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("relion_cryofilter").setLevel(logging.ERROR)
    paths = make(options.work / "train", options.n, options.box)
    old = as_in_2020(paths)
    lines = [f"| 2020's algorithm, roberts | {old:.2f} | 1.0 |"]
    for name, model in (("roberts", {"model": "roberts"}), ("default", {})):
        seconds = ours(paths, options.work / "train", model)
        lines.append(f"| {name} | {seconds:.2f} | {old / seconds:.1f} |")
    print("\n".join(lines))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    options.out.write_text(
        f"# An epoch of training\n\nMade by `benchmarks/train.py`: {int(0.8 * options.n):,} "
        f"training images of {options.box} x {options.box} px, one thread, torch "
        f"{torch.__version__}, Python {platform.python_version()}; validation included in ours, "
        f"not in 2020's. Peak {peak:,.0f} MB.\n\n"
        "| training | CPU s an epoch | times faster |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()

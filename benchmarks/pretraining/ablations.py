"""What would make a better pre-training: sizes, widths, whitening, a second band.

    python benchmarks/pretraining/ablations.py --real FOLDER --work FOLDER [--images 3e5]

--work holds the simulated images of pretrain.py, of which the first --shards are used. Every
network begins anew and sees as many of them, in the same order, at the same rate; of real images
only the ice below some. Two figures: AUC on the validation images of pretrain.py, whose micrographs
all differ in molecule, detector and noise, and on the half of KLH that the pre-training may see
(here it does not). Whitened images have the mean power spectrum of their set divided out, by rings:
of the micrograph in the simulations, of all images of KLH. The second band is the power of what
48 px leave out of 64, at the same places. Results are kept in FOLDER/ablations; a stopped run goes
on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from export import logits_of
from pool import BOX_PX, encoded, shard_path
from pretrain import Training
from real_images import UNIT, split_real
from sklearn.metrics import roc_auc_score
from torch import Tensor

from relion_cryofilter.files import write_text
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.d4 import D4, D4Conv
from relion_cryofilter.nn.networks import Network

BATCH, RATE, SEED = 64, 3e-3, 1
CROPS_PX = range(52, 65, 2)
"""A random one of these of each batch's 64 px is looked at, so that particles vary in size."""


class TwoBands(D4):
    """D4 whose stem takes two channels."""

    channels = 2

    def __init__(self, widths: tuple[int, int, int], dim: int) -> None:
        super().__init__(widths, dim)
        self.stem = D4Conv(2, widths[0], size=6, stride=2, lifting=True)

    def stemmed(self, x: Tensor) -> Tensor:
        """Return what the stem makes of both channels."""
        return self.stem(x)


class Crop:
    """The network's input of boxes (n, h, w): as in the package, or with the power of the rest."""

    def __init__(self, dim: int, second: bool) -> None:
        self.recipe, self.second = FourierCrop(dim), second

    def __call__(self, boxes: Tensor) -> Tensor:
        """Return (n, channels, dim, dim)."""
        small = self.recipe(boxes)
        if not self.second:
            return small
        spectrum = torch.fft.rfft2(boxes)
        rows, columns = (torch.fft.fftfreq(size).abs() for size in boxes.shape[1:])
        edge = self.recipe.dim / (2 * boxes.shape[-1])
        low = (rows[:, None] < edge) & (columns[None, : spectrum.shape[-1]] < edge)
        rest = torch.fft.irfft2(spectrum * ~low, s=boxes.shape[1:])
        return torch.cat([small, self.recipe(rest.square())], dim=1)


@dataclass(frozen=True)
class Variant:
    """What is different from the bundled networks."""

    name: str
    widths: tuple[int, int, int] = (4, 8, 16)
    dim: int = 48
    whitened: bool = False
    second: bool = False


VARIANTS = (
    Variant("as bundled: 4-8-16, 48 px"),
    Variant("whitened", whitened=True),
    Variant("a second band", second=True),
    Variant("64 px", dim=64),
    Variant("64 px, 3-6-12", widths=(3, 6, 12), dim=64),
    Variant("3-6-12", widths=(3, 6, 12)),
    Variant("6-12-16", widths=(6, 12, 16)),
)


@dataclass(frozen=True, eq=False)
class Images:
    """Boxes (n, 64, 64) int8 in units of σ / 24, targets (n,), and the set (n,) each is of."""

    boxes: np.ndarray
    targets: np.ndarray
    sets: np.ndarray

    def whitened(self) -> Images:
        """Return the images with the mean spectrum of their set divided out, by rings."""
        boxes = np.empty_like(self.boxes)
        f = np.hypot(np.fft.fftfreq(BOX_PX)[:, None], np.fft.rfftfreq(BOX_PX)[None])
        ring = np.minimum(np.rint(f * BOX_PX).astype(int), BOX_PX // 2)
        for one in np.unique(self.sets):
            rows = np.flatnonzero(self.sets == one)
            spectra = np.fft.rfft2(self.boxes[rows].astype(np.float32))
            power = (np.abs(spectra) ** 2).mean(0)
            of_ring = np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())
            of_ring = np.maximum(of_ring, 1e-3 * of_ring.max())
            flat = np.fft.irfft2(spectra / np.sqrt(of_ring[ring]), s=(BOX_PX, BOX_PX))
            boxes[rows] = encoded(flat)
        return Images(boxes, self.targets, self.sets)


def simulated(work: Path, validation: bool, numbers: range) -> Images:
    """Return the images of some shards; micrographs are the sets."""
    parts = []
    for number in numbers:
        with np.load(shard_path(work, validation, number)) as shard:
            parts.append((shard["images"], shard["targets"].astype(np.float32),
                          shard["micrographs"]))  # fmt: skip
    return Images(*(np.concatenate(column) for column in zip(*parts)))


def trained(variant: Variant, images: Images, seen: int, folder: Path) -> Network:
    """Return the averaged network after `seen` images; nothing is written to the folder."""
    options = Namespace(
        seed=SEED, init=None, learning_rate=RATE, images=seen, hours=1e9, bf16=True,
        work=folder, name="none",
    )  # fmt: skip
    torch.manual_seed(SEED)
    make = TwoBands if variant.second else D4
    training = Training(options, make(variant.widths, variant.dim))
    crop, rng = Crop(variant.dim, variant.second), np.random.default_rng(SEED)
    while training.images < seen:
        rows = rng.integers(0, len(images.targets), BATCH)
        size = int(rng.choice(CROPS_PX))
        y, x = (BOX_PX - size) // 2 + rng.integers(-1, 2, 2) * (size < BOX_PX)
        boxes = torch.from_numpy(images.boxes[rows, y : y + size, x : x + size]).float() / UNIT
        training.step(crop(boxes), torch.from_numpy(images.targets[rows]))
    return training.averaged_network()


def auc(network: Network, crop: Crop, images: Images) -> float:
    """Return the AUC on images; soft targets count as good from one half."""
    logits = logits_of(network, crop, images.boxes.astype(np.float32))
    return float(roc_auc_score(images.targets >= 0.5, logits))


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=float, default=3e5, help="That each network sees.")
    parser.add_argument("--shards", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablations.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.work / "ablations"
    folder.mkdir(exist_ok=True)
    real, _ = split_real(options.real)
    klh = real.take(np.flatnonzero(np.char.startswith(real.micrographs, "klh_far")))
    sets = {
        "training": simulated(options.work, False, range(options.shards)),
        "validation": simulated(options.work, True, range(6)),
        "KLH": Images(klh.images, klh.good.astype(np.float32), np.zeros(len(klh), int)),
    }
    lines = []
    for variant in VARIANTS:
        path = folder / f"{variant.name.replace(' ', '_')}_{options.images:g}.json"
        if not path.exists():
            began = time.process_time()
            used = (
                {name: part.whitened() for name, part in sets.items()} if variant.whitened else sets
            )
            network = trained(variant, used["training"], int(options.images), folder)
            seconds = time.process_time() - began
            crop = Crop(variant.dim, variant.second)
            found = [auc(network, crop, used[name]) for name in ("validation", "KLH")]
            write_text(path, json.dumps({"auc": found, "seconds": seconds}))
        facts = json.loads(path.read_text())
        figures = " | ".join(f"{value:.4f}" for value in facts["auc"])
        lines.append(f"| {variant.name} | {figures} | {facts['seconds']:.0f} |")
        print(lines[-1], flush=True)
    head = ["| network | validation, AUC | KLH, AUC | CPU seconds |", "|---|---|---|---|"]
    about = f"# {__doc__}\nOne seed, {options.images:,.0f} images each. "
    about += "On KLH, which no network has seen, one seed says little.\n\n"
    write_text(options.out, about + "\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    sys.exit(main())

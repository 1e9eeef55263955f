"""The images of the pre-training: shards that are simulated once, and batches drawn from them.

A shard holds 1,200 boxes of 64 px as int8 in units of σ / 24, 5 MB; half a million take 2 GB. A
batch mixes simulated, composite, real and noise images and varies them once more, so that no two
passes are alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import mrcfile
import numpy as np
import torch
from real_images import ICE, UNIT, RealImages, split_real
from textures import pure_noise
from torch import Tensor
from variety import molecule_of_map, simulate_varied

from relion_cryofilter.files import replacing
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.networks import Network
from relion_cryofilter.simulate.specimen import Molecule

BOX_PX, PICKS, MICROGRAPHS = 64, 60, 20
HELD_OUT = ("1u6g", "4v4r_30S", "5gjv")
"""Maps that stay unseen, so that the benchmarks can test on them."""

SEED, VALIDATION_SEED = 11, 12
VALIDATION_KINDS = ("simulated",) * 6 + ("composite", "noise")
SHARES = {"noise": 0.05, "composite": 0.1, "real": 0.11, "phases": 0.04}
"""Of a batch; the rest is simulated. ``phases`` are images of all kinds with random phases: noise
of the spectra that images have."""

REAL_GOOD = 0.45
"""Of the real images of a batch."""


def kind_of_shard(number: int) -> str:
    """Return what a shard holds, so that each kind is there early."""
    return {0: "noise", 3: "composite", 11: "composite"}.get(number % 16, "simulated")


def training_molecules(maps: Path) -> list[Molecule]:
    """Return the molecules of all maps but those held out."""
    molecules = []
    for path in sorted(maps.glob("*.mrc")):
        if path.stem not in HELD_OUT:
            with mrcfile.open(path, permissive=True) as file:
                molecules.append(molecule_of_map(file.data, float(file.voxel_size.x) or 3.0))
    return molecules


class Simulator:
    """Makes shards: of molecules that are not held out, and on real ice of the training."""

    def __init__(self, maps: Path, real: Path, work: Path) -> None:
        self.work, self.molecules = work, training_molecules(maps)
        images, _ = split_real(real)
        self.backgrounds = images.images[np.isin(images.kinds, ICE) & ~images.good] / UNIT

    def make(self, number: int, *, validation: bool = False) -> None:
        """Make a shard, unless it is there; its number decides what it holds."""
        path = shard_path(self.work, validation, number)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = VALIDATION_SEED if validation else SEED
        kind = VALIDATION_KINDS[number] if validation else kind_of_shard(number)
        micrographs = range(number * MICROGRAPHS, (number + 1) * MICROGRAPHS)
        if kind == "noise":
            rngs = [np.random.default_rng([seed, micrograph]) for micrograph in micrographs]
            boxes = np.concatenate([pure_noise(rng, PICKS, BOX_PX) for rng in rngs])
            targets, kinds = np.zeros(len(boxes), np.float32), np.full(len(boxes), "noise")
        else:
            made = simulate_varied(
                seed, micrographs, picks=PICKS, box_px=BOX_PX, molecules=self.molecules,
                backgrounds=self.backgrounds if kind == "composite" else None,
            )  # fmt: skip
            boxes, targets, kinds = made.images, made.targets, made.kinds
        with replacing(path) as file:
            np.savez(
                file, images=encoded(boxes), targets=targets.astype(np.float16), kinds=kinds,
                micrographs=np.repeat(micrographs, PICKS), kind=kind,
            )  # fmt: skip

    def make_next(self, most: int) -> None:
        """Make the first shard that is missing, if there are fewer than `most`."""
        for number in range(most):
            if not shard_path(self.work, False, number).exists():
                self.make(number)
                return


def simulate_shards(
    maps: Path, real: Path, work: Path, numbers: Sequence[int], parent: int
) -> None:
    """Make the shards that are not there yet, while the parent process lives."""
    torch.set_num_threads(1)
    simulator = Simulator(maps, real, work)
    for number in numbers:
        if os.getppid() != parent:
            return
        simulator.make(number)


def shard_path(work: Path, validation: bool, number: int) -> Path:
    """Return where a shard is."""
    return work / "shards" / f"{'validation' if validation else 'shard'}_{number:05d}.npz"


def encoded(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (n, h, w) as int8, each of zero mean and in units of its σ / 24."""
    centred = boxes - boxes.mean((1, 2), keepdims=True)
    sigma = np.maximum(centred.std((1, 2), keepdims=True), 1e-6)
    return np.clip(np.rint(UNIT * centred / sigma), -127, 127).astype(np.int8)


class Pool:
    """The images that are there: shards by kind, and the real ones."""

    def __init__(self, work: Path, real: RealImages | None, *, validation: bool) -> None:
        self.real, self.validation, self.work = real, validation, work
        self.kinds_of_shard: dict[str, list[dict[str, np.ndarray]]] = {}
        self._read: set[Path] = set()
        # Rare kinds of real images more often, as the root of their number.
        self._chances: dict[bool, tuple[np.ndarray, np.ndarray]] = {}
        for good in (True, False) if real else ():
            rows = np.flatnonzero(real.good == good)
            _, of, counts = np.unique(real.kinds[rows], return_inverse=True, return_counts=True)
            weights = np.cumsum(counts[of] ** -0.5)
            self._chances[good] = rows, weights / weights[-1]
        self.grow()

    def __len__(self) -> int:
        return sum(len(shard["images"]) for kind in self.kinds_of_shard.values() for shard in kind)

    def grow(self) -> None:
        """Read the shards that are new."""
        pattern = shard_path(self.work, self.validation, 0).name.replace("00000", "*")
        for path in sorted((self.work / "shards").glob(pattern)):
            if path not in self._read:
                self._read.add(path)
                with np.load(path) as shard:
                    data = dict(shard)
                self.kinds_of_shard.setdefault(str(data["kind"]), []).append(data)

    def draw(self, rng: np.random.Generator, kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return n images (n, 64, 64) int8 of a kind of shard, and their targets (n,)."""
        shards = self.kinds_of_shard[kind]
        images = np.empty((n, BOX_PX, BOX_PX), np.int8)
        targets = np.empty(n, np.float32)
        # The latest more often: the others have had their turns.
        for place, number in enumerate((len(shards) * rng.random(n) ** 0.6).astype(int)):
            row = rng.integers(0, len(shards[number]["targets"]))
            images[place] = shards[number]["images"][row]
            targets[place] = shards[number]["targets"][row]
        return images, targets

    def draw_real(self, rng: np.random.Generator, good: bool, n: int) -> np.ndarray:
        """Return n real images (n, 64, 64) int8."""
        data = self.real
        assert data is not None
        rows, cumulated = self._chances[good]
        return data.images[rows[np.searchsorted(cumulated, rng.random(n))]]

    def column(self, kind: str, name: str) -> np.ndarray:
        """Return a column of all images of a kind of shard."""
        return np.concatenate([shard[name] for shard in self.kinds_of_shard[kind]])

    def targets(self, kind: str) -> np.ndarray:
        """Return the targets (n,) of a kind of shard."""
        return self.column(kind, "targets").astype(np.float32)

    def logits(self, network: Network, recipe: FourierCrop, kind: str) -> np.ndarray:
        """Return the logits (n,) of all images of a kind of shard."""
        parts = []
        with torch.inference_mode():
            for shard in self.kinds_of_shard[kind]:
                for images in torch.from_numpy(shard["images"]).split(64):
                    parts.append(network(recipe(images.float())).double())
        return torch.cat(parts).numpy()


class Batches:
    """Draws batches; the same position gives the same batch of the same pool."""

    def __init__(self, pool: Pool, size: int, recipe: FourierCrop, seed: int) -> None:
        self.pool, self.size, self.recipe, self.seed = pool, size, recipe, seed
        axes = np.fft.fftfreq(BOX_PX)[:, None], np.fft.rfftfreq(BOX_PX)[None]
        self.f = torch.from_numpy(2 * np.hypot(*axes)).float()

    def get(self, position: int) -> tuple[Tensor, Tensor]:
        """Return small images (n, 1, dim, dim) and targets (n,)."""
        rng = np.random.default_rng([self.seed, position])
        count = {name: round(share * self.size) for name, share in SHARES.items()}
        n_good = int(rng.binomial(count["real"], REAL_GOOD))
        n_simulated = self.size - count["noise"] - count["composite"] - count["real"]
        drawn = [
            self.pool.draw(rng, "simulated", n_simulated),
            self.pool.draw(rng, "composite", count["composite"]),
            self.pool.draw(rng, "noise", count["noise"]),
        ]
        images = torch.from_numpy(np.concatenate([part for part, _ in drawn])).float() / UNIT
        targets = torch.from_numpy(np.concatenate([part for _, part in drawn]))
        # Noise of the images' own spectra.
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        of = torch.from_numpy(rng.integers(0, len(images), count["phases"]))
        into = torch.arange(len(of))  # simulated ones, which are many
        images[into] = random_phases(images[of], generator)
        targets[into] = 0
        # A little larger in the box, and up to a pixel off.
        crop = int(rng.integers(26, 33)) * 2
        y, x = (BOX_PX - crop) // 2 + rng.integers(-1, 2, 2) * (crop < BOX_PX)
        varied = self._varied(images, generator)[:, y : y + crop, x : x + crop]
        small = [self.recipe(varied)]
        # Real ones, larger in the box or not; junk is junk beside its place and turned over too.
        negatives = torch.from_numpy(self.pool.draw_real(rng, False, count["real"] - n_good))
        negatives = negatives.float() / UNIT * (1 - 2 * (torch.rand(len(negatives), 1, 1,
                                                generator=generator) < 0.25).float())  # fmt: skip
        positives = torch.from_numpy(self.pool.draw_real(rng, True, n_good)).float() / UNIT
        for part, shift in ((positives, 0), (negatives, 1)):
            if len(part):
                crop = int(rng.integers(22, 33)) * 2
                room = (BOX_PX - crop) // 2
                y, x = room + shift * rng.integers(-room, room + 1, 2)
                varied = self._varied(part, generator)[:, y : y + crop, x : x + crop]
                small.append(self.recipe(varied))
                targets = torch.cat([targets, torch.full((len(part),), 1.0 - shift)])
        return torch.cat(small), targets

    def _varied(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images (n, 64, 64), half with another spectrum, a third with more noise."""
        n = len(images)
        fall, power, chance, noisy, level = torch.rand(5, n, 1, 1, generator=generator)
        images = images.clone()
        some = torch.nonzero(chance.flatten() < 0.4).flatten()
        if len(some):
            gain = torch.exp(-(2.0 * fall[some] - 0.5) * self.f ** (0.6 + 1.4 * power[some]))
            spectra = torch.fft.rfft2(images[some]) * gain
            images[some] = torch.fft.irfft2(spectra, s=(BOX_PX, BOX_PX))
        some = torch.nonzero(noisy.flatten() < 0.25).flatten()
        white = torch.randn((len(some), *images.shape[1:]), generator=generator)
        images[some] += 0.8 * level[some] * white
        return images


def random_phases(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return noise of the spectra of images (n, h, w)."""
    white = torch.fft.rfft2(torch.randn(images.shape, generator=generator))
    spectrum = torch.fft.rfft2(images).abs() * white / white.abs().clamp_min(1e-6)
    return torch.fft.irfft2(spectrum, s=images.shape[1:])

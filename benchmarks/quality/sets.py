"""The labelled sets: real ones, and simulated ones of molecules kept from pre-training."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

from relion_cryofilter.simulate import PARTICLE, Field, Molecule, simulate_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretraining"))

from variety import molecule_of_map

REAL = ("apoferritin_10146", "trpv1_10059")
SIMULATED = {
    # name: map, SNR, box in px, diameter / box, seed
    "sim 1u6g, SNR 0.05": ("1u6g", 0.05, 192, 0.44, 101),
    "sim 5gjv, SNR 0.02": ("5gjv", 0.02, 192, 0.50, 105),
    "sim 4v4r, SNR 0.02": ("4v4r_30S", 0.02, 192, 0.55, 102),
    "sim 1u6g, SNR 0.008": ("1u6g", 0.008, 192, 0.44, 103),
}
"""At 2 to 2.5 Å/px. Neither the maps nor the box, and no micrograph, are in the pre-training."""

N_SIMULATED, N_FURTHER = 2520, 4200
ALIKE, FLIPS = "alike", "flips"
"""Kinds of wrong labels."""
LOOK_ALIKE = ("aggregate", "broken", "off_centre")


@dataclass(frozen=True)
class LabelledImages:
    """A labelled set on disk.

    Attributes
    ----------
    name
        As in the table.
    stack
        The images, (n, box, box).
    micrographs
        (n,) names.
    good
        (n,) bool, the truth.
    kinds
        (n,) ``particle`` or the kind of junk.
    further
        More images of simulated sets, of other micrographs: only to measure what thresholds do.
    """

    name: str
    stack: Path
    micrographs: np.ndarray
    good: np.ndarray
    kinds: np.ndarray
    further: LabelledImages | None = None

    @property
    def simulated(self) -> bool:
        """Whether the kinds of junk are known."""
        return self.name.startswith(("sim", "classified"))

    @property
    def classified(self) -> bool:
        """Whether RELION's classes of the images are known."""
        return self.name.startswith("classified")

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images (len(rows), box, box) float32."""
        with mrcfile.mmap(self.stack, permissive=True) as file:
            return np.asarray(file.data[rows], np.float32)

    def write_labels(self, folder: Path, rows: np.ndarray, labels: np.ndarray) -> list[Path]:
        """Write good.star and bad.star of `rows`, labelled as in `labels` (n,)."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "good.star", folder / "bad.star"]
        for path, kind in zip(paths, (True, False)):
            text = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n"
            for row in rows[labels[rows] == kind]:
                text += f"{row + 1:06d}@{self.stack.resolve()} {self.micrographs[row]}\n"
            path.write_text(text)
        return paths

    def noisy_labels(self, share: float, seed: int, kind: str = ALIKE) -> np.ndarray:
        """Return (n,) labels of which a share is wrong, any of them or those that look alike."""
        if kind == FLIPS:
            flipped = np.random.default_rng([seed, 78]).permutation(len(self.good))
            return np.asarray(self.good ^ (flipped < round(share * len(self.good))))
        return wrong_labels(self.good, self.kinds, share, seed)


def wrong_labels(good: np.ndarray, kinds: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return (n,) labels, wrong as those from classes are.

    `share` of the junk that looks like particles (and falls into their classes) is called good,
    and `share` of the particles bad. Other junk is found by any classification.
    """
    rng, labels = np.random.default_rng([seed, 77]), good.copy()
    alike, particles = np.flatnonzero(np.isin(kinds, LOOK_ALIKE)), np.flatnonzero(good)
    labels[rng.choice(alike, round(share * len(alike)), replace=False)] = True
    labels[rng.choice(particles, round(share * len(particles)), replace=False)] = False
    return labels


def all_sets(real: Path | None, maps: Path, work: Path) -> Iterator[LabelledImages]:
    """Yield the real sets (NAME.csv and NAME.mrcs) and the simulated ones, made once."""
    for name in REAL if real else ():
        with (real / f"{name}.csv").open() as file:  # type: ignore[operator]
            rows = list(csv.DictReader(file))
        good = np.array([row["label"] == "1" for row in rows])
        micrographs = np.array([row["micrograph"] for row in rows])
        kinds = np.where(good, "particle", "junk")
        yield LabelledImages(name, real / f"{name}.mrcs", micrographs, good, kinds)  # type: ignore[operator]
    for name, (molecule, *drawn, seed) in SIMULATED.items():
        density = maps / f"{molecule}.mrc"
        further = _simulated(f"{name} further", density, *drawn, seed + 1000, N_FURTHER, work)
        data = _simulated(name, density, *drawn, seed, N_SIMULATED, work)
        yield replace(data, further=further)


def _simulated(
    name: str, density: Path, snr: float, box: int, size: float, seed: int, n: int, work: Path
) -> LabelledImages:
    """Return n simulated images, made once."""
    stem = work / "sets" / name.replace(" ", "_").replace(",", "")
    stack, table = stem.with_name(stem.name + ".mrcs"), stem.with_name(stem.name + ".npz")
    if not table.exists():
        molecule = map_molecule(density)
        pixel_size = molecule.diameter_angstrom / (size * box)
        # Noise falls with the scale and uneven ice does not: the same ice as at 64 px.
        field = Field(slow_ice_rms=Field.slow_ice_rms * 64 / box)
        made = simulate_images(
            seed, n, box, snr, pixel_size_angstrom=pixel_size, molecules=[molecule], field=field
        )
        write_set(stack, table, made.images, kinds=made.kinds, micrographs=made.micrographs)
    return read_set(name, stack)


def read_set(name: str, stack: Path) -> LabelledImages:
    """Return what `write_set` wrote."""
    made = np.load(stack.with_suffix(".npz"))
    names = np.array([f"{number:03d}.mrc" for number in made["micrographs"]])
    return LabelledImages(name, stack, names, made["kinds"] == PARTICLE, made["kinds"])


def map_molecule(density: Path) -> Molecule:
    """Return the molecule of a map."""
    with mrcfile.open(density, permissive=True) as file:
        return molecule_of_map(file.data, float(file.voxel_size.x) or 3.0)


def write_set(stack: Path, table: Path, images: np.ndarray, **facts: Any) -> None:
    """Write images (n, box, box), and then what is known of them."""
    stack.parent.mkdir(parents=True, exist_ok=True)
    mrcfile.write(stack, images, overwrite=True)
    np.savez(table, **facts)

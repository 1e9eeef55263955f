"""The labelled sets: real ones, and simulated ones of molecules kept from pre-training."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np

from relion_cryofilter.simulate import Field, simulate_images

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

N_SIMULATED = 2520
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
    """

    name: str
    stack: Path
    micrographs: np.ndarray
    good: np.ndarray
    kinds: np.ndarray

    @property
    def simulated(self) -> bool:
        """Whether the kinds of junk are known."""
        return self.name.startswith("sim")

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

    def noisy_labels(self, share: float, seed: int) -> np.ndarray:
        """Return (n,) labels; see `wrong_labels`."""
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
    for name, (molecule, snr, box, size, seed) in SIMULATED.items():
        stem = work / "sets" / name.replace(" ", "_").replace(",", "")
        stack, table = stem.with_name(stem.name + ".mrcs"), stem.with_name(stem.name + ".npz")
        if not table.exists():
            _simulate(maps / f"{molecule}.mrc", snr, box, size, seed, stack, table)
        made = np.load(table)
        names = np.array([f"{number:03d}.mrc" for number in made["micrographs"]])
        yield LabelledImages(name, stack, names, made["kinds"] == "particle", made["kinds"])


def _simulate(
    density: Path, snr: float, box: int, size: float, seed: int, stack: Path, table: Path
) -> None:
    with mrcfile.open(density, permissive=True) as file:
        molecule = molecule_of_map(file.data, float(file.voxel_size.x) or 3.0)
    pixel_size = molecule.diameter_angstrom / (size * box)
    # Noise falls with the scale and uneven ice does not: the same ice as at 64 px.
    field = Field(slow_ice_rms=Field.slow_ice_rms * 64 / box)
    made = simulate_images(
        seed, N_SIMULATED, box, snr, pixel_size_angstrom=pixel_size, molecules=[molecule],
        field=field,
    )  # fmt: skip
    stack.parent.mkdir(parents=True, exist_ok=True)
    mrcfile.write(stack, made.images, overwrite=True)
    np.savez(table, kinds=made.kinds, micrographs=made.micrographs)

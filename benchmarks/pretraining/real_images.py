"""Real images for the pre-training, and those that are kept from it, by micrograph.

A folder of NAME.mrcs (n, 64, 64) int8 in units of σ / 24, and NAME.csv with columns image, and
where known micrograph, label, category or kind. Nothing of other sets than these is read.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np

UNIT = 24.0
"""What one σ of an image is in int8."""

NEGATIVES = ("real_negatives", "junk_textures")
"""Nothing to keep: carbon, gold, ice, liposomes, contamination, cracks, empty fields."""

POSITIVES = ("betagal_tutorial_accepted",)
BOTH = ("klh_far",)
"""Labels 1 and 0; -1 is ambiguous and not used."""

ICE = ("5Empty_ice_no_particles_but_vitreous_ice", "empty")
"""Categories and kinds of the backgrounds that simulated particles are put on."""


@dataclass(frozen=True, eq=False)
class RealImages:
    """Labelled real images.

    Attributes
    ----------
    images
        (n, 64, 64) int8.
    good
        (n,) bool.
    kinds, micrographs
        (n,) names: category of junk or kind of pick; where it is from.
    """

    images: np.ndarray
    good: np.ndarray
    kinds: np.ndarray
    micrographs: np.ndarray

    def __len__(self) -> int:
        return len(self.good)

    def take(self, rows: np.ndarray) -> RealImages:
        """Return some of them."""
        return RealImages(*(part[rows] for part in vars(self).values()))


def read_real(folder: Path, name: str) -> RealImages:
    """Read one set; without labels or categories, all are good."""
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    with mrcfile.open(folder / f"{name}.mrcs", permissive=True) as file:
        images = np.asarray(file.data, np.int8)

    def column(*names: str, default: str = "") -> np.ndarray:
        found = next((name for name in names if name in rows[0]), None)
        return np.array([row[found] if found else default for row in rows])

    label = column("label", default="0" if "category" in rows[0] else "1")
    micrographs = np.char.add(f"{name} ", column("micrograph"))
    kinds = column("category", "kind", default=name)
    known = label != "-1"
    return RealImages(images, label == "1", kinds, micrographs).take(np.flatnonzero(known))


def split_real(folder: Path) -> tuple[RealImages, RealImages]:
    """Return the images to train on, and those kept for tests.

    Of junk, the first and then every third micrograph of a category is kept; of sets with both
    labels every second one. Sets without micrographs are trained on.
    """
    parts: tuple[list[RealImages], list[RealImages]] = ([], [])
    for name in (*NEGATIVES, *POSITIVES, *BOTH):
        data = read_real(folder, name)
        kept = np.zeros(len(data), bool)
        groups = data.kinds if name in NEGATIVES else np.full(len(data), name)
        for group in np.unique(groups):
            inside = groups == group
            names = np.unique(data.micrographs[inside])
            step = 3 if name in NEGATIVES else 2
            if name not in POSITIVES:
                kept |= inside & np.isin(data.micrographs, names[::step])
        for part, rows in zip(parts, (~kept, kept)):
            part.append(data.take(np.flatnonzero(rows)))
    train, test = (
        RealImages(*(np.concatenate(column) for column in zip(*(vars(p).values() for p in part))))
        for part in parts
    )
    return train, test

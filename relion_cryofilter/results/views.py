"""Kept shares over the sphere of viewing directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONES, HALF_ANGLE_DEGREES = 200, 15.0
CELLS, PARTICLES_A_CELL = (6, 12), 20  # bands from pole to pole, the more where particles suffice
SIGNIFICANT, FAR_LESS = 0.01, 0.9
"""Corrected probability of a chance find, and how much of the others' share is still all right."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cone:
    """The particles whose views are within `HALF_ANGLE_DEGREES` of a direction."""

    rot_degrees: float
    tilt_degrees: float
    n: int
    share: float  # kept
    others: float  # kept of all other particles
    p: float  # of so few by chance, corrected for the number of cones

    def __str__(self) -> str:
        """Return the cone as a line of a list."""
        return (
            f"rot {self.rot_degrees:.0f}°, tilt {self.tilt_degrees:.0f}°: "
            f"{100 * self.share:.0f} % of {self.n:,} particles kept, elsewhere "
            f"{100 * self.others:.0f} % (p = {self.p:.1g})"
        )


@dataclass(frozen=True, eq=False)
class Views:
    """Particles and kept ones by viewing direction.

    Attributes
    ----------
    rot_edges, height_edges
        (r + 1,) degrees and (h + 1,) cosines of the tilt: cells of one area.
    total, kept
        (r, h) particles in each cell.
    cones
        Those that keep significantly less than the rest, the least first; overlapping ones once.
    """

    rot_edges: Floats
    height_edges: Floats
    total: Counts
    kept: Counts
    cones: tuple[Cone, ...]

    def in_words(self) -> list[tuple[str, list[str]]]:
        """Return the cones as a section of the report, if there are any."""
        return [("Views that keep less", list(map(str, self.cones)))] if self.cones else []

    def warning(self) -> str:
        """Return what is wrong with the views, "" if nothing is."""
        if not self.cones:
            return ""
        return (
            "Fewer particles of some views are kept than of the others, so the map may lose them: "
            f"{self.cones[0]}."
        )


def views_of(seen: Floats | None, accepted: NDArray[np.bool_]) -> Views | None:
    """Count n particles seen from directions (n, 3), and the accepted (n,), over the sphere.

    None where no directions are known, or all are one, as after 2D classification.
    """
    if seen is None:
        return None
    known = np.isfinite(seen).all(axis=1)
    seen, kept = seen[known], accepted[known]
    if not len(kept) or np.ptp(seen, axis=0).max() == 0:
        return None
    bands = max(CELLS) if len(kept) >= PARTICLES_A_CELL * 2 * max(CELLS) ** 2 else min(CELLS)
    edges = np.linspace(-180, 180, 2 * bands + 1), np.linspace(-1, 1, bands + 1)
    azimuth = np.rad2deg(np.arctan2(seen[:, 1], seen[:, 0]))
    total, good = (
        np.histogram2d(azimuth[rows], np.clip(seen[rows, 2], -1, 1), edges)[0].astype(np.int64)
        for rows in (np.ones_like(kept), kept)
    )
    return Views(*edges, total, good, _poor_cones(seen, kept))


def spread_directions(n: int) -> Floats:
    """Return unit vectors (n, 3) that are evenly spread over the sphere, in a spiral."""
    k = np.arange(n) + 0.5
    height, azimuth = 1 - 2 * k / n, np.pi * (1 + np.sqrt(5)) * k
    flat = np.sqrt(1 - height**2)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), height], axis=1)


def _poor_cones(seen: Floats, kept: NDArray[np.bool_]) -> tuple[Cone, ...]:
    """Return the cones about directions (n, 3) that keep significantly less than the rest."""
    from scipy.stats import binom  # slow to import

    centres = spread_directions(CONES)
    within = np.cos(np.deg2rad(HALF_ANGLE_DEGREES))
    # What each holds, in parts that fit into memory.
    n, good = np.zeros(CONES, np.int64), np.zeros(CONES, np.int64)
    for start in range(0, len(seen), 100_000):
        part = slice(start, start + 100_000)
        inside = seen[part].astype(np.float32) @ centres.T.astype(np.float32) >= within
        n += inside.sum(axis=0)
        good += inside[kept[part]].sum(axis=0)
    rest, all_good = len(seen) - n, int(kept.sum())
    share, others = good / np.maximum(n, 1), (all_good - good) / np.maximum(rest, 1)
    chance = np.minimum(1, CONES * binom.cdf(good, n, others))
    poor = (n > 0) & (rest > 0) & (chance < SIGNIFICANT) & (share < FAR_LESS * others)
    # Of cones that overlap, the one that is least by chance.
    found: list[int] = []
    apart = np.cos(np.deg2rad(2 * HALF_ANGLE_DEGREES))
    for number in sorted(np.flatnonzero(poor).tolist(), key=lambda c: (chance[c], share[c])):
        if all(centres[number] @ centres[other] < apart for other in found):
            found.append(number)
    return tuple(
        Cone(
            float(np.rad2deg(np.arctan2(centres[c, 1], centres[c, 0]))),
            float(np.rad2deg(np.arccos(centres[c, 2]))),
            int(n[c]), float(share[c]), float(others[c]), float(chance[c]),
        )
        for c in sorted(found, key=lambda c: share[c])
    )  # fmt: skip

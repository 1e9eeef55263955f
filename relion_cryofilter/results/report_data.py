"""What a report holds: shares by micrograph, trends, pictures, maps and facts.

All of it is small: no list is as long as the particle set, but for the scores themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.results.cuts import Cuts, Histogram
from relion_cryofilter.results.metrics import Curves, Evaluation
from relion_cryofilter.results.selftests import SelfTest

Floats = NDArray[np.float64]
FEWEST_MICROGRAPHS = 4
BINS, DENSITY_BINS = 12, 40
Z_95 = 1.959964


@dataclass(frozen=True, eq=False)
class Micrographs:
    """Accepted and all particles of each micrograph, (m,) each, and its name."""

    names: Sequence[str]
    total: NDArray[np.int64]
    accepted: NDArray[np.int64]

    @property
    def share(self) -> Floats:
        """(m,) accepted of all."""
        return np.asarray(self.accepted / self.total, dtype=np.float64)

    @property
    def order(self) -> NDArray[np.intp]:
        """(m,) micrographs by rising share."""
        return np.lexsort((-self.total, self.share))

    def outliers(self) -> tuple[list[int], list[int]]:
        """Return micrographs that accept far less, and far more, than the others.

        Far: outside Tukey's fences (1.5 interquartile ranges) and three binomial standard
        deviations from the share of all.
        """
        if len(self.names) < FEWEST_MICROGRAPHS:
            return [], []
        low, high = np.percentile(self.share, (25, 75))
        fence = 1.5 * (high - low)
        mean = self.accepted.sum() / self.total.sum()
        sure = np.abs(self.share - mean) > 3 * np.sqrt(mean * (1 - mean) / self.total)
        order = self.order
        below = [int(m) for m in order if sure[m] and self.share[m] < low - fence]
        above = [int(m) for m in order[::-1] if sure[m] and self.share[m] > high + fence]
        return below, above


def micrographs_of(
    names: Sequence[str], micrograph_of: NDArray[np.integer[Any]], accepted: NDArray[np.bool_]
) -> Micrographs:
    """Count particles by micrograph; micrographs without any are left out."""
    total = np.bincount(micrograph_of, minlength=len(names))
    kept = np.bincount(micrograph_of[accepted], minlength=len(names))
    held = np.flatnonzero(total)
    return Micrographs([names[number] for number in held.tolist()], total[held], kept[held])


@dataclass(frozen=True, eq=False)
class Trend:
    """Share accepted in bins of a quantity, with 95 % intervals (Wilson); (b,) each.

    `density` (d,) counts particles between (d + 1,) even `edges`.
    """

    label: str
    centre: Floats
    share: Floats
    low: Floats
    high: Floats
    density: NDArray[np.int64]
    edges: Floats


def trend_of(
    label: str, values: NDArray[np.floating[Any]], accepted: NDArray[np.bool_]
) -> Trend | None:
    """Bin a quantity by its values if few, else by quantiles.

    None where it is unknown or the same everywhere.
    """
    known = np.isfinite(values)
    x, kept = values[known].astype(np.float64), accepted[known]
    if not x.size or x.min() == x.max():
        return None
    distinct = np.unique(x)
    if len(distinct) <= BINS:
        bins, n_bins = np.searchsorted(distinct, x), len(distinct)
    else:
        edges = np.unique(np.quantile(x, np.linspace(0, 1, BINS + 1)))
        n_bins = len(edges) - 1
        bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, n_bins - 1)
    count = np.bincount(bins, minlength=n_bins)
    held = count > 0
    n = np.maximum(count, 1)
    share = np.bincount(bins, weights=kept, minlength=len(count)) / n
    centre = np.bincount(bins, weights=x, minlength=len(count)) / n
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2)) / (1 + Z_95**2 / n)
    low, high = np.minimum(middle - half, share), np.maximum(middle + half, share)
    return Trend(
        label, centre[held], share[held], low[held], high[held], *np.histogram(x, DENSITY_BINS)
    )


@dataclass(frozen=True, eq=False)
class PickMap:
    """Where the picks of one micrograph are, (p, 2) in its pixels, and which are accepted."""

    name: str
    xy: Floats
    accepted: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """First two principal components (p, 2) of some particles' features, and their scores."""

    xy: Floats
    scores: Floats
    variance: tuple[float, float]
    n: int


def feature_map(features: NDArray[np.floating[Any]], scores: Floats, n: int) -> FeatureMap | None:
    """Project features (p, k) of a sample of n particles on two principal components.

    None where there are fewer than three particles, or all are the same.
    """
    usable = np.isfinite(features).all(axis=1)
    rows = features[usable].astype(np.float64)
    if len(rows) < 3:
        return None
    centred = rows - rows.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    if variances[-1] <= 1e-12 * max(1.0, float((rows**2).sum())):
        return None
    two = axes[:, ::-1][:, :2]
    if two.shape[1] < 2:
        two = np.hstack([two, np.zeros_like(two)])
    two = two * np.where(two[np.abs(two).argmax(axis=0), [0, 1]] < 0, -1, 1)
    parts = [*(variances[::-1][:2] / variances.sum()), 0.0]
    return FeatureMap(centred @ two, scores[usable], (float(parts[0]), float(parts[1])), n)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Small images (m, p, p) uint8 of some particles, by falling score; names of each."""

    images: NDArray[np.uint8]
    scores: Floats
    names: Sequence[str]
    about: str = ""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Gallery:
    """Which of a report's pictures to show under a title."""

    title: str
    members: tuple[int, ...]
    empty: str = "none"


@dataclass(frozen=True, eq=False)
class Measured:
    """What a labelled set adds: its evaluation, curves, self-tests and learning curves."""

    evaluation: Evaluation
    curves: Curves
    self_tests: Sequence[SelfTest] = ()
    history: Sequence[Mapping[str, float]] = ()
    kept_epoch: int = 0


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that logfile.pdf and report.html show.

    Attributes
    ----------
    title
        Of the report: the mode and the input.
    facts
        Names and texts: inputs, models, options, counts, times, versions.
    notes
        Warnings and what is not shown, and why.
    cuts, histogram
        Of the scores.
    noun
        What is counted: ``particle``.
    micrographs, trends, pick_maps, features
        What is known of them.
    pictures, galleries
        The pictures, and what to show of them.
    command
        Words of a `select` with CUT and FOLDER to be filled in; "" where there is none.
    measured
        With labels.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    cuts: Cuts
    histogram: Histogram
    pictures: Pictures
    galleries: Sequence[Gallery]
    notes: Sequence[str] = ()
    micrographs: Micrographs | None = None
    trends: Sequence[Trend] = ()
    pick_maps: Sequence[PickMap] = ()
    features: FeatureMap | None = None
    command: str = ""
    measured: Measured | None = None
    sources: Sequence[str] = field(default=())

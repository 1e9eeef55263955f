"""Scores in short: the values that charts draw, each with the function that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.particles.star import (
    AUTOPICK_FIGURE_OF_MERIT,
    COORDINATES,
    CTF_MAX_RESOLUTION,
    DEFOCUS,
)
from relion_cryofilter.thresholds import Interval, share_interval

if TYPE_CHECKING:
    from relion_cryofilter.particles.particles import ParticleSet

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Numbers = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

QUANTILE_CUTS, EVEN_CUTS = 800, 200
BINS, DENSITY_BINS = 12, 40
FEWEST_MICROGRAPHS, MAPS_A_SIDE = 4, 2
RESAMPLES, MOST_RESAMPLED = 200, 10_000  # draws for an interval, and clusters that are drawn


@dataclass(frozen=True, eq=False)
class Cuts:
    """How many particles are accepted at each of some thresholds, exactly."""

    thresholds: Floats  # (k,) rising, of six decimals
    accepted: Counts  # (k,) particles that score at least that
    good: Counts | None  # (k,) good ones among them; None without labels
    default: int  # which of them is the threshold that was used
    n: int
    n_good: int = 0


def cuts_of(scores: Floats, threshold: float, accepted: int, labels: Mask | None = None) -> Cuts:
    """Count scores (n,) of six decimals at even steps, at their quantiles and at the threshold.

    `accepted` is how many it accepted: unusable images score 0 and never are. `labels` (n,): good.
    """
    ordered = np.sort(scores)
    places = np.linspace(0, len(ordered) - 1, min(QUANTILE_CUTS, len(ordered))).astype(int)
    even = np.linspace(0, 1, EVEN_CUTS + 1)
    thresholds = np.unique(np.round(np.concatenate([even, ordered[places], [threshold]]), 6))
    default = int(np.searchsorted(thresholds, round(threshold, 6)))
    counts = len(ordered) - np.searchsorted(ordered, thresholds, side="left")
    counts[default] = accepted
    if labels is None:
        return Cuts(thresholds, counts, None, default, len(scores))
    good = np.sort(scores[labels])
    held = len(good) - np.searchsorted(good, thresholds, side="left")
    return Cuts(thresholds, counts, held, default, len(scores), len(good))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Numbers of particles by score, with the threshold and how many it accepted."""

    edges: Floats  # (b + 1,)
    counts: Counts  # (b,)
    good: Counts | None  # (b,) good ones among them; None without labels
    threshold: float
    accepted: int

    @property
    def steep(self) -> bool:
        """Whether one bin would flatten the others on a linear axis."""
        held = self.counts[self.counts > 0]
        return len(held) > 2 and bool(held.max() > 50 * np.median(held))


def histogram_of(
    scores: Floats, threshold: float, accepted: int, labels: Mask | None = None
) -> Histogram:
    """Count scores (n,) in 50 bins; `labels` (n,) are True for good particles."""
    edges = histogram_edges(scores, threshold)
    good = None if labels is None else np.histogram(scores[labels], edges)[0]
    return Histogram(edges, np.histogram(scores, edges)[0], good, threshold, accepted)


def histogram_edges(scores: Floats, threshold: float, bins: int = 50) -> Floats:
    """Return (bins + 1,) edges: 0 to 1, or what holds narrow scores (n,) and their threshold."""
    low, high = (float(end(np.append(scores, threshold))) for end in (np.min, np.max))
    if high - low > 0.25:
        return np.linspace(0, 1, bins + 1)
    margin = max(0.1 * (high - low), 0.01)
    return np.linspace(max(0, low - margin), min(1, high + margin), bins + 1)


@dataclass(frozen=True, eq=False)
class Micrographs:
    """How many particles of each of m micrographs are accepted."""

    names: Sequence[str]
    total: Counts  # (m,)
    accepted: Counts  # (m,)

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

    def in_words(self, most: int = 20) -> list[tuple[str, list[str]]]:
        """Return a title and at most `most` lines for the outliers of either side that has any."""
        sections = []
        for side, outliers in zip(("Lowest", "Highest"), self.outliers()):
            lines = [
                f"{self.names[m]}: {self.accepted[m]:,} of {self.total[m]:,} accepted "
                f"({100 * self.share[m]:.0f} %)"
                for m in outliers[:most]
            ]
            more = len(outliers) - most
            lines += [f"… and {more:,} more"] if more > 0 else []
            if lines:
                sections.append((f"{side} acceptance: outlying micrographs", lines))
        return sections


def micrographs_of(
    names: Sequence[str], micrograph_of: NDArray[np.integer[Any]], accepted: Mask
) -> Micrographs:
    """Count n particles by micrograph, or by stack; names without particles are left out."""
    total = np.bincount(micrograph_of, minlength=len(names))
    kept = np.bincount(micrograph_of[accepted], minlength=len(names))
    held = np.flatnonzero(total)
    return Micrographs([names[number] for number in held.tolist()], total[held], kept[held])


@dataclass(frozen=True, eq=False)
class Trend:
    """Share accepted in b bins of a quantity, and d finer bins of particles."""

    label: str  # the quantity, with its unit
    centre: Floats  # (b,) its mean in the bin
    share: Floats  # (b,) accepted of all
    low: Floats  # (b,) ends of the share's 95 % interval (Wilson's)
    high: Floats
    density: Counts  # (d,) particles
    edges: Floats  # (d + 1,) even


def trend_of(label: str, values: Numbers, accepted: Mask) -> Trend | None:
    """Bin acceptance by a quantity (n,), NaN where unknown: by its values if few, or quantiles.

    None where the quantity is unknown or the same everywhere.
    """
    import pandas as pd  # slow to import

    known = np.isfinite(values)
    x = values[known].astype(np.float64)
    if not x.size or x.min() == x.max():
        return None
    table = pd.DataFrame({"x": x, "accepted": accepted[known]})
    bins = table.x if table.x.nunique() <= BINS else pd.qcut(table.x, BINS, duplicates="drop")
    found = table.groupby(bins, observed=True).agg(
        n=("x", "size"), centre=("x", "mean"), kept=("accepted", "sum")
    )
    shares = zip((found.kept / found.n).tolist(), found.n.tolist())
    share, low, high = np.array([share_interval(*share_of) for share_of in shares]).T
    return Trend(label, found.centre.to_numpy(), share, low, high, *np.histogram(x, DENSITY_BINS))


def trends(particles: ParticleSet, accepted: Mask) -> tuple[list[Trend], list[str]]:
    """Bin acceptance (n,) by defocus, CTF fit and picker score, as far as their table tells.

    Returns the trends, and sentences on columns that tell nothing.
    """
    labels = (*DEFOCUS, CTF_MAX_RESOLUTION, AUTOPICK_FIGURE_OF_MERIT)
    table = particles.table.numbers(labels) if particles.table is not None else {}
    quantities: dict[str, Numbers] = {}
    if DEFOCUS[0] in table:
        defocus = [table[label] for label in DEFOCUS if label in table]
        quantities["Defocus (µm)"] = np.mean(defocus, axis=0) / 1e4
    if CTF_MAX_RESOLUTION in table:
        quantities["CTF fit (maximum resolution, Å)"] = table[CTF_MAX_RESOLUTION]
    if AUTOPICK_FIGURE_OF_MERIT in table:
        quantities["Picker score (figure of merit)"] = table[AUTOPICK_FIGURE_OF_MERIT]
    found, notes = [], []
    for label, values in quantities.items():
        trend = trend_of(label, values, accepted)
        if trend is not None:
            found.append(trend)
        else:
            notes.append(
                f"{label.partition(' (')[0]} is unknown or the same for all particles, so "
                "acceptance is not shown against it."
            )
    return found, notes


@dataclass(frozen=True, eq=False)
class PickMap:
    """The p picks of one micrograph."""

    name: str
    xy: Floats  # (p, 2) in pixels of the micrograph
    accepted: Mask  # (p,)


def pick_maps(particles: ParticleSet, accepted: Mask) -> list[PickMap]:
    """Return the picks of the micrographs that accept least and most; none without coordinates.

    Micrographs with less than half of the median number of picks say little and are left out.
    """
    table = particles.table.numbers(COORDINATES) if particles.table is not None else {}
    if not particles.has_micrographs or not all(label in table for label in COORDINATES):
        return []
    counted = micrographs_of(particles.micrographs, particles.micrograph_of, accepted)
    order = counted.order
    order = order[counted.total[order] >= np.median(counted.total) / 2]
    sides = [*order[:MAPS_A_SIDE].tolist(), *order[::-1][:MAPS_A_SIDE].tolist()]
    maps = []
    for number in dict.fromkeys(sides):
        name = counted.names[number]
        rows = np.flatnonzero(particles.micrograph_of == particles.micrographs.index(name))
        xy = np.stack([table[label][rows] for label in COORDINATES], axis=1).astype(np.float64)
        known = np.isfinite(xy).all(axis=1)
        if known.any():
            maps.append(PickMap(name, xy[known], accepted[rows][known]))
    return maps


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Particles in the plane of their features' first two principal components."""

    xy: Floats  # (p, 2)
    scores: Floats  # (p,)
    variance: tuple[float, float]  # the part of it that each component holds
    n: int  # particles of which these are a sample


def feature_map(features: Numbers, scores: Floats, n: int) -> FeatureMap | None:
    """Project features (p, k) of a sample of n particles on two principal components.

    The features of unusable images are NaN. None where there are fewer than three usable particles
    or two features, or all particles are the same.
    """
    from sklearn.decomposition import PCA  # slow to import

    usable = np.isfinite(features).all(axis=1)
    rows = features[usable].astype(np.float64)
    if min(len(rows), rows.shape[1] + 1) < 3:
        return None
    if np.ptp(rows, axis=0).max() <= 1e-6 * max(1.0, np.abs(rows).max()):
        return None
    pca = PCA(2, random_state=0)
    xy = pca.fit_transform(rows)
    first, second = pca.explained_variance_ratio_.tolist()
    return FeatureMap(xy, scores[usable], (first, second), n)


@dataclass(frozen=True, eq=False)
class Classes:
    """How many particles of each of c classes are kept."""

    numbers: Counts  # (c,) rising
    total: Counts  # (c,)
    accepted: Counts  # (c,)

    def table(self) -> list[str]:
        """Return the classes as lines under a head."""
        rows = zip(self.numbers.tolist(), self.total.tolist(), self.accepted.tolist())
        head = f"{'class':>5} {'particles':>10} {'kept':>10} {'share':>7}"
        lines = [f"{c:>5} {n:>10,} {kept:>10,} {100 * kept / n:>5.1f} %" for c, n, kept in rows]
        return [head, *lines]


def classes_of(numbers: NDArray[np.integer[Any]], accepted: Mask) -> Classes | None:
    """Count n particles by their class (n,); None where all are of one class."""
    found, of = np.unique(numbers, return_inverse=True)
    if len(found) < 2:
        return None
    of = of.reshape(-1)
    kept = np.bincount(of[accepted], minlength=len(found))
    return Classes(found.astype(np.int64), np.bincount(of), kept)


@dataclass(frozen=True)
class GoodLost:
    """How many good particles are among the rejected, by the scores; with 95 % intervals."""

    number: Interval
    share: Interval  # of the good ones

    def __str__(self) -> str:
        """Return the estimate as a sentence."""
        number, share = (
            f"{scale * value:,.{digits}f}{unit}"
            + ("" if isnan(low) else f" [{scale * low:,.{digits}f}, {scale * high:,.{digits}f}]")
            for (value, low, high), scale, digits, unit in (
                (self.number, 1, 0, ""),
                (self.share, 100, 1, " %"),
            )
        )
        return f"About {number} good particles are among the rejected: {share} of the good ones."


def good_lost(
    scores: Floats, accepted: Mask, clusters: NDArray[np.integer[Any]], seed: int = 0
) -> GoodLost | None:
    """Estimate how many good particles are rejected: the sum of their scores (n,).

    A score is the probability that a particle is good, as far as the model is calibrated. The
    intervals draw whole clusters (n,), see `splits.clusters_of`; there are none (NaN) with one
    cluster. None where less than one particle is expected to be good.
    """
    together = clusters % MOST_RESAMPLED  # of very many some are drawn together
    good = np.bincount(together, scores)
    if good.sum() < 1:
        return None
    lost = np.bincount(together, np.where(accepted, 0, scores), minlength=len(good))
    held = np.flatnonzero(np.bincount(together))
    good, lost = good[held], lost[held]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(len(good), size=len(good)), minlength=len(good))
        drawn.append((times @ lost, times @ lost / max(float(times @ good), 1e-12)))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    if len(good) < 2:
        low, high = np.full((2, 2), np.nan)
    total = float(lost.sum())
    return GoodLost(
        Interval(total, float(low[0]), float(high[0])),
        Interval(total / float(good.sum()), float(low[1]), float(high[1])),
    )

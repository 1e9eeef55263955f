"""Scores in short: how many particles pass each threshold, and a histogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
QUANTILE_CUTS, EVEN_CUTS = 800, 200


@dataclass(frozen=True, eq=False)
class Cuts:
    """How many particles are accepted at each of some thresholds, exactly.

    Attributes
    ----------
    thresholds
        (k,) rising, of six decimals.
    accepted
        (k,) particles that score at least that.
    good
        (k,) good ones among them; None without labels.
    default
        Which of them is the threshold that was used.
    n, n_good
        Particles, and good ones.
    """

    thresholds: Floats
    accepted: NDArray[np.int64]
    good: NDArray[np.int64] | None
    default: int
    n: int
    n_good: int = 0


def cuts_of(
    scores: Floats, threshold: float, accepted: int, labels: NDArray[np.bool_] | None = None
) -> Cuts:
    """Count at even steps, at quantiles of the scores and at the threshold.

    Parameters
    ----------
    scores
        (n,) rounded to six decimals.
    threshold, accepted
        What was used, and how many it accepted: unusable images score 0 and are never accepted.
    labels
        (n,) True for good particles.
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
    """Numbers of particles (b,) between (b + 1,) edges; of good ones if labels are known."""

    edges: Floats
    counts: NDArray[np.int64]
    good: NDArray[np.int64] | None = None

    @property
    def steep(self) -> bool:
        """Whether one bin would flatten the others on a linear axis."""
        held = self.counts[self.counts > 0]
        return len(held) > 2 and bool(held.max() > 50 * np.median(held))


def histogram_of(
    scores: Floats, threshold: float, labels: NDArray[np.bool_] | None = None
) -> Histogram:
    """Count scores in 50 bins from 0 to 1, or of the range they have if that is narrow."""
    edges = histogram_edges(scores, threshold)
    counts = np.histogram(scores, edges)[0]
    return Histogram(
        edges, counts, None if labels is None else np.histogram(scores[labels], edges)[0]
    )


def histogram_edges(scores: Floats, threshold: float, bins: int = 50) -> Floats:
    """Return (bins + 1,) edges: 0 to 1, or what holds narrow scores and their threshold."""
    low, high = (float(end(np.append(scores, threshold))) for end in (np.min, np.max))
    if high - low > 0.25:
        return np.linspace(0, 1, bins + 1)
    margin = max(0.1 * (high - low), 0.01)
    return np.linspace(max(0, low - margin), min(1, high + margin), bins + 1)

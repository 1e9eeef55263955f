"""Intervals of metrics, from a bootstrap that draws whole micrographs.

Particles of one micrograph share its ice, defocus and contamination: they are not independent. The
intervals come from a bootstrap that draws whole micrographs [1]_. To draw a micrograph twice is to
give its images the weight two, so no image is copied. The plain percentiles of few micrographs are
too narrow; they are expanded as in Student's t [2]_ (with 12 micrographs: 1.1 and 98.9 % instead of
2.5 and 97.5 %).

.. [1] A. C. Davison, D. V. Hinkley, Bootstrap Methods and their Application (1997), 3.8.
.. [2] T. Hesterberg, The American Statistician 69 (2015) 371-386, 5.3: expanded percentiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan, nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RECALL_OF_FPR = 0.95
BIN_EDGES = np.linspace(0, 1, 16)
"""Of the reliability diagram and the ECE: 15 bins of equal width, as Guo et al. (2017) use."""
OUTSIDE_INTERVAL = 0.05


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval; nan where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return ``0.912 [0.894, 0.931]``, without the brackets if there is no interval."""
        if isnan(self.value):
            return "undefined"
        ends = "" if isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{ends}"


@dataclass(frozen=True, eq=False)
class Ranked:
    """Images in order of falling score, and the cuts between them.

    A cut is a number of images: those before it score more than those behind it.

    Parameters
    ----------
    good : ndarray
        (n,) 1 or 0.
    scores : ndarray
        (n,) falling.
    groups : ndarray
        (n,) numbers of the micrographs, 0 to number of groups - 1.
    cuts : ndarray
        (u + 1,) before, between and after the u distinct scores.
    bin_cuts : ndarray
        (16,) between the bins of the ECE, and both ends.
    accepted : int
        The cut at the threshold.
    """

    good: Floats
    scores: Floats
    groups: NDArray[np.intp]
    cuts: NDArray[np.intp]
    bin_cuts: NDArray[np.intp]
    accepted: int


def rank(
    good: NDArray[np.bool_], values: Floats, groups: NDArray[np.intp], accepted: int
) -> Ranked:
    """Sort images by score, once for all resamples.

    Parameters
    ----------
    good
        (n,) True for good images.
    values
        (n,) scores, 0 to 1.
    groups
        (n,) numbers of the micrographs, 0 to number of groups - 1.
    accepted
        Number of images that reach the threshold.
    """
    order = np.argsort(-values, kind="stable")
    scores = values[order]
    higher = np.searchsorted(-scores, -BIN_EDGES[-2:0:-1], side="left")  # above each inner edge
    return Ranked(
        good=good[order].astype(np.float64),
        scores=scores,
        groups=groups[order],
        cuts=np.concatenate([[0], np.flatnonzero(np.diff(scores)) + 1, [len(scores)]]),
        bin_cuts=np.concatenate([[0], higher, [len(scores)]]),
        accepted=accepted,
    )


def bootstrap(
    ranked: Ranked, n_groups: int, resamples: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Yield the metrics of each resample of the micrographs that holds both classes.

    Parameters
    ----------
    ranked
        The images, of both classes.
    n_groups
        Number of micrographs.
    resamples
        Number of resamples to draw; those that lack a class yield nothing.
    rng
        Draws the micrographs.

    Yields
    ------
    ndarray
        In the order of `metrics.METRICS`.
    """
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        weights = drawn[ranked.groups].astype(np.float64)
        if 0 < np.sum(weights * ranked.good) < np.sum(weights):
            yield _weighted_metrics(ranked, weights)


def _weighted_metrics(ranked: Ranked, weights: Floats) -> Floats:
    """Return the metrics, in the order of `metrics.METRICS`, of images with integer weights, (n,).

    The same as scikit-learn's with ``sample_weight``, but sorted once for all resamples: every
    metric comes from sums over the images before a cut. No ``@``: threads of BLAS cost more than
    they bring here, and very much where cores are shared.
    """
    images, good, scores = (
        np.concatenate([[0.0], np.cumsum(values)])
        for values in (weights, weights * ranked.good, weights * ranked.scores)
    )
    n, n_good = images[-1], good[-1]
    true = good[ranked.cuts]
    reached = images[ranked.cuts]
    false = reached - true
    auc = np.sum(np.diff(false) * (true[1:] + true[:-1])) / (2 * n_good * false[-1])
    precision = true[1:] / np.maximum(reached[1:], 1)
    average_precision = np.sum(np.diff(true) * precision) / n_good
    fpr = false[np.searchsorted(true / n_good, RECALL_OF_FPR)] / false[-1]
    bins = ranked.bin_cuts
    ece = np.abs(np.diff(scores[bins]) - np.diff(good[bins])).sum() / n
    tp, all_accepted = good[ranked.accepted], images[ranked.accepted]
    fp, fn = all_accepted - tp, n_good - tp
    accepting = at_threshold(n - tp - fp - fn, fp, fn, tp)
    return np.array([auc, average_precision, fpr, ece, *accepting])


def at_threshold(tn: float, fp: float, fn: float, tp: float) -> tuple[float, ...]:
    """Return accuracy, sensitivity, specificity and precision; nan where undefined.

    Parameters
    ----------
    tn, fp, fn, tp
        Numbers of true and false negatives and positives, or sums of their weights.
    """
    parts = ((tp + tn, tn + fp + fn + tp), (tp, tp + fn), (tn, tn + fp), (tp, tp + fp))
    return tuple(part / whole if whole else nan for part, whole in parts)


def intervals(values: Floats, drawn: list[Floats], n_groups: int) -> list[Interval]:
    """Return each metric with the percentiles of its resampled values, nan left out.

    Parameters
    ----------
    values
        (m,) metrics of the set itself.
    drawn
        (m,) metrics of each resample, as `bootstrap` yields them; empty for no intervals.
    n_groups
        Number of micrographs; with few, the percentiles are expanded.
    """
    tail = expanded_tail(n_groups) if drawn else nan
    columns = np.array(drawn).T if drawn else np.empty((len(values), 0))
    found = []
    for value, column in zip(values.tolist(), columns):
        known = column[~np.isnan(column)]
        defined = known.size and not isnan(value)
        low, high = np.quantile(known, (tail, 1 - tail)).tolist() if defined else (nan, nan)
        found.append(Interval(value, low, high))
    return found


def expanded_tail(n_groups: int) -> float:
    """Return the share of resamples below a 95 % interval: 0.025 of many groups, less of few."""
    from scipy.special import ndtr, stdtrit  # slow to import

    quantile = stdtrit(n_groups - 1, OUTSIDE_INTERVAL / 2)
    return float(ndtr(quantile * np.sqrt(n_groups / (n_groups - 1))))

"""The metrics of scores held against labels, with 95 % intervals.

`evaluate` gives an `Evaluation`, `curves` the points of its charts. Metrics are scikit-learn's.
Particles of one micrograph share its ice, defocus and contamination, so the intervals are
percentiles of a bootstrap that draws whole micrographs [1]_. A micrograph drawn twice gives its
images the weight two: no image is copied, and all are sorted once, which is 20 to 100 times as fast
as scikit-learn's metrics with ``sample_weight``.

.. [1] A. C. Davison, D. V. Hinkley, Bootstrap Methods and their Application (1997), 3.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.progress import counted
from relion_cryofilter.thresholds import Interval, ratio, refuse_not_a_number

Floats = NDArray[np.float64]

MAX_DRAWN_IMAGES = 100_000_000  # resamples × images of a bootstrap; some ten seconds
FEWEST_RESAMPLES = 200
FEW_GROUPS = 20  # with fewer micrographs the intervals may be too narrow
MAX_POINTS = 2000  # of a curve
RECALL_OF_FPR, OUTSIDE_INTERVAL = 0.95, 0.05
BIN_EDGES = np.linspace(0, 1, 16)
"""Of the reliability diagram and the ECE: 15 bins of equal width, as Guo et al. (2017) use."""

METRICS = {
    "auc": "AUC",
    "average_precision": "Average precision",
    "fpr_at_95_recall": "FPR at 95 % recall",
    "ece": "ECE",
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
}
"""The metrics of an evaluation, in order, and their names in print."""
SINCE_2020 = ("precision", "average_precision", "fpr_at_95_recall", "ece")
"""Those that the 2020 program did not print."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a labelled, scored set, in the order of `METRICS`."""

    n: int  # images
    n_positive: int  # good ones
    n_negative: int
    n_groups: int  # micrographs
    threshold: float  # images that score this much or more are accepted
    confusion: tuple[tuple[int, int], tuple[int, int]]  # ((tn, fp), (fn, tp))
    auc: Interval
    average_precision: Interval  # area under the precision-recall curve, as a sum of steps
    fpr_at_95_recall: Interval  # share of the bad images accepted where 95 % of the good are
    ece: Interval  # mean distance of score and fraction of good images in 15 bins
    accuracy: Interval
    sensitivity: Interval  # another word for recall
    specificity: Interval
    precision: Interval
    resamples: int  # behind the intervals; 0 if there are none
    skipped: int  # resamples that lacked a class

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and dicts for JSON; None stands for nan."""
        names = ("n", "n_positive", "n_negative", "n_groups", "threshold", "resamples", "skipped")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        data["confusion"] = [list(row) for row in self.confusion]
        for name in METRICS:
            interval: Interval = getattr(self, name)
            data[name] = dict(zip(interval._fields, interval.to_list()))
        return data

    def summary(self) -> str:
        """Return the lines of the 2020 program, with intervals, and those of the other metrics."""
        # How the intervals were made, or why there are none.
        if not (self.n_positive and self.n_negative):
            lacking = "bad" if self.n_positive else "good"
            made = f"No intervals: there are no {lacking} images, so AUC and others are undefined."
        elif self.n_groups == 1:
            made = "No intervals: all images come from one micrograph, at least two are needed."
        else:
            made = f"[95 % intervals: {self.resamples:,} bootstrap resamples of "
            made += counted(self.n_groups, "micrograph")
            if self.skipped:
                made += f"; {self.skipped:,} more lacked a class and were left out"
            if self.n_groups < FEW_GROUPS:
                made += "; with so few they may be too narrow"
            made += ".]"
        lines = [
            f"Auc: {self.auc}",
            f"CM:\n{np.array(self.confusion)}",
            f"Acc: {self.accuracy}",
            f"Specificity: {self.specificity}",
            f"Sensitivity: {self.sensitivity}",
            *(f"{METRICS[name]}: {getattr(self, name)}" for name in SINCE_2020),
            f"{counted(self.n, 'image')}, {self.n_positive:,} of them good; threshold "
            f"{self.threshold:g}.",
            made,
        ]
        return "\n".join(lines)

    def headline(self) -> str:
        """Return the main figures in one line."""
        few = ""
        if self.n_groups < FEW_GROUPS:
            few = f" From {counted(self.n_groups, 'micrograph')} only: intervals may be too narrow."
        return (
            f"AUC {self.auc}; at threshold {self.threshold:g} recall {self.sensitivity}, "
            f"precision {self.precision}.{few}"
        )


@dataclass(frozen=True, eq=False)
class Curves:
    """The points of the charts; ROC and precision-recall are empty if a class is missing."""

    fpr: Floats  # (r,) with falling thresholds
    tpr: Floats
    precision: Floats  # (p,) with rising thresholds
    recall: Floats
    bin_score: Floats  # (b,) mean score of each bin that holds images
    bin_fraction: Floats  # (b,) fraction of good ones
    bin_count: Floats  # (b,) their number


def evaluate(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    threshold: float,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Evaluation:
    """Measure how well scores tell good images from bad ones.

    Parameters
    ----------
    labels, scores, groups
        (n,) True for good images; 0 to 1; numbers of the micrographs.
    threshold
        Images that score this much or more are accepted.
    seed, resamples
        Of the bootstrap: the same seed, the same intervals. Of very large sets fewer resamples are
        made, see `MAX_DRAWN_IMAGES`.

    Returns
    -------
    Evaluation
        Metrics that are undefined, because a class is missing or nothing is accepted, are nan.
        So are the ends of all intervals if there is one micrograph or one class only.

    Raises
    ------
    CryoFilterError
        There are no images, or a score is not a number.
    """
    import sklearn.metrics as sk  # slow to import

    good, values = _checked(labels, scores)
    accepted = np.asarray(scores) >= float(threshold)  # float32 scores are compared as float32
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    if numbers.shape != good.shape:
        raise ValueError(f"{good.size} labels, but {numbers.size} groups")
    n, n_positive, n_groups = good.size, int(good.sum()), int(numbers.max()) + 1
    both_classes = 0 < n_positive < n

    # The metrics of the set itself, in the order of METRICS.
    areas = [nan, nan, nan]
    if both_classes:
        fpr, tpr, _ = sk.roc_curve(good, values, drop_intermediate=False)
        areas = [
            sk.roc_auc_score(good, values),
            sk.average_precision_score(good, values),
            fpr[np.argmax(tpr >= RECALL_OF_FPR)],
        ]
    score, fraction, count = _reliability(good, values)
    ece = np.average(np.abs(score - fraction), weights=count)
    confusion = sk.confusion_matrix(good, accepted, labels=[False, True]).tolist()
    (tn, fp), (fn, tp) = confusion
    metrics = [*areas, ece, *_at_threshold(tn, fp, fn, tp)]

    # Those of resampled micrographs, (r, 8); resamples that lack a class are left out.
    wanted, drawn = 0, []
    if n_groups > 1 and both_classes:
        wanted = min(resamples, max(FEWEST_RESAMPLES, MAX_DRAWN_IMAGES // n))
        ranked, rng = _rank(good, values, numbers, int(accepted.sum())), np.random.default_rng(seed)
        for _ in range(wanted):
            times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
            weights = times[ranked.groups].astype(np.float64)
            if 0 < np.sum(weights * ranked.good) < np.sum(weights):
                drawn.append(_weighted_metrics(ranked, weights))

    # Their percentiles.
    tail = expanded_tail(n_groups) if drawn else nan
    intervals = []
    for value, column in zip(metrics, np.reshape(drawn, (-1, len(METRICS))).T):
        known = column[~np.isnan(column)]
        defined = known.size and not isnan(value)
        low, high = np.quantile(known, (tail, 1 - tail)).tolist() if defined else (nan, nan)
        intervals.append(Interval(float(value), low, high))
    return Evaluation(
        n=n,
        n_positive=n_positive,
        n_negative=n - n_positive,
        n_groups=n_groups,
        threshold=float(threshold),
        confusion=((tn, fp), (fn, tp)),
        **dict(zip(METRICS, intervals)),
        resamples=len(drawn),
        skipped=wanted - len(drawn),
    )


def curves(labels: ArrayLike, scores: ArrayLike) -> Curves:
    """Return the points of the charts, at most about `MAX_POINTS` a curve.

    Parameters
    ----------
    labels, scores
        (n,) True for good images; 0 to 1.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve  # slow to import

    good, values = _checked(labels, scores)
    lines = [np.empty((2, 0)), np.empty((2, 0))]
    if good.any() and not good.all():
        lines = [np.array(made(good, values)[:2]) for made in (roc_curve, precision_recall_curve)]
    for number, line in enumerate(lines):  # evenly spaced points and the ends
        kept = np.unique(np.linspace(0, line.shape[1] - 1, MAX_POINTS).round().astype(int))
        lines[number] = line[:, kept] if line.size else line
    (fpr, tpr), (precision, recall) = lines
    return Curves(fpr, tpr, precision, recall, *_reliability(good, values))


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Return labels and scores, (n,) each, or raise an error that says what is wrong with them."""
    good, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if good.shape != values.shape or good.ndim != 1:
        raise ValueError(f"labels are {good.shape} and scores {values.shape}, expected (n,) both")
    if not good.size:
        raise CryoFilterError("There are no labelled images to measure on.")
    refuse_not_a_number(values)
    return good, values


def _reliability(good: NDArray[np.bool_], values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean score, fraction of good images and count (b,) of the bins that hold images."""
    bins = np.searchsorted(BIN_EDGES[1:-1], values)
    count = np.bincount(bins, minlength=15).astype(np.float64)
    held = count > 0
    sums = (np.bincount(bins, weights=part, minlength=15)[held] for part in (values, good))
    score, fraction = (part / count[held] for part in sums)
    return score, fraction, count[held]


def _at_threshold(tn: float, fp: float, fn: float, tp: float) -> Floats:
    """Return accuracy, sensitivity, specificity and precision of a confusion; nan if undefined."""
    parts = np.array([tp + tn, tp, tn, tp], dtype=np.float64)
    wholes = np.array([tn + fp + fn + tp, tp + fn, tn + fp, tp + fp], dtype=np.float64)
    return ratio(parts, wholes).astype(np.float64)


class _Ranked(NamedTuple):
    """Images in order of falling score; a cut is how many images stand before it."""

    good: Floats  # (n,) 1 or 0
    scores: Floats  # (n,) falling
    groups: NDArray[np.intp]  # (n,) numbers of the micrographs from 0
    cuts: NDArray[np.intp]  # (u + 1,) before, between and after the u distinct scores
    bin_cuts: NDArray[np.intp]  # (16,) between the bins of the ECE, and both ends
    accepted: int  # the cut at the threshold


def _rank(
    good: NDArray[np.bool_], values: Floats, groups: NDArray[np.intp], accepted: int
) -> _Ranked:
    """Sort (n,) images by score; `accepted` of them reach the threshold."""
    order = np.argsort(-values, kind="stable")
    scores = values[order]
    higher = np.searchsorted(-scores, -BIN_EDGES[-2:0:-1], side="left")  # above each inner edge
    return _Ranked(
        good=good[order].astype(np.float64),
        scores=scores,
        groups=groups[order],
        cuts=np.concatenate([[0], np.flatnonzero(np.diff(scores)) + 1, [len(scores)]]),
        bin_cuts=np.concatenate([[0], higher, [len(scores)]]),
        accepted=accepted,
    )


def _weighted_metrics(ranked: _Ranked, weights: Floats) -> Floats:
    """Return the metrics, in the order of `METRICS`, of images with integer weights, (n,).

    The same as scikit-learn's with ``sample_weight``: every metric comes from sums over the images
    before a cut. No ``@``: threads of BLAS cost more than they bring here, and very much where
    cores are shared.
    """
    images, good, scores = (
        np.concatenate([[0.0], np.cumsum(values)])
        for values in (weights, weights * ranked.good, weights * ranked.scores)
    )
    n, n_good = images[-1], good[-1]
    true, reached = good[ranked.cuts], images[ranked.cuts]
    false = reached - true
    auc = np.sum(np.diff(false) * (true[1:] + true[:-1])) / (2 * n_good * false[-1])
    precision = true[1:] / np.maximum(reached[1:], 1)
    average_precision = np.sum(np.diff(true) * precision) / n_good
    fpr = false[np.searchsorted(true / n_good, RECALL_OF_FPR)] / false[-1]
    bins = ranked.bin_cuts
    ece = np.abs(np.diff(scores[bins]) - np.diff(good[bins])).sum() / n
    tp, accepted = good[ranked.accepted], images[ranked.accepted]
    fp, fn = accepted - tp, n_good - tp
    rates = _at_threshold(n - tp - fp - fn, fp, fn, tp)
    return np.array([auc, average_precision, fpr, ece, *rates])


def expanded_tail(n_groups: int) -> float:
    """Return the share of resamples below a 95 % interval, 0.025 or less.

    The plain percentiles of few micrographs are too narrow; they are expanded as in Student's t (T.
    Hesterberg, The American Statistician 69, 371 (2015), 5.3): 1.1 and 98.9 % of 12 micrographs.
    """
    from scipy.special import ndtr, stdtrit  # slow to import

    quantile = stdtrit(n_groups - 1, OUTSIDE_INTERVAL / 2)
    return float(ndtr(quantile * np.sqrt(n_groups / (n_groups - 1))))

"""How well scores tell good particles from bad ones, with honest intervals."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.results.bootstrap import (
    BIN_EDGES,
    RECALL_OF_FPR,
    Floats,
    Interval,
    at_threshold,
    bootstrap,
    intervals,
    rank,
)
from relion_cryofilter.wording import counted

MAX_DRAWN_IMAGES = 100_000_000
"""Resamples × images of a bootstrap; some ten seconds."""
FEWEST_RESAMPLES = 200
FEW_GROUPS = 20
MAX_POINTS = 2000
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
    """The metrics of a labelled, scored set.

    Parameters
    ----------
    n, n_positive, n_negative, n_groups : int
        Numbers of images, of good and bad ones, and of micrographs.
    threshold : float
        Images that score this much or more are accepted.
    confusion : tuple of tuple of int
        ((true negatives, false positives), (false negatives, true positives)).
    auc, average_precision : Interval
        Areas under the ROC and (as a sum of steps) the precision-recall curve.
    fpr_at_95_recall : Interval
        Share of the bad images accepted where 95 % of the good ones are.
    ece : Interval
        Expected calibration error: mean distance of score and fraction of good images in 15 bins.
    accuracy, sensitivity, specificity, precision : Interval
        At the threshold. Sensitivity is another word for recall.
    resamples : int
        Bootstrap resamples behind the intervals; 0 if there are none.
    skipped : int
        Further resamples that lacked a class and were left out.
    """

    n: int
    n_positive: int
    n_negative: int
    n_groups: int
    threshold: float
    confusion: tuple[tuple[int, int], tuple[int, int]]
    auc: Interval
    average_precision: Interval
    fpr_at_95_recall: Interval
    ece: Interval
    accuracy: Interval
    sensitivity: Interval
    specificity: Interval
    precision: Interval
    resamples: int
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and dicts for JSON; None stands for nan."""
        names = ("n", "n_positive", "n_negative", "n_groups", "threshold", "resamples", "skipped")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        data["confusion"] = [list(row) for row in self.confusion]
        for name in METRICS:
            interval: Interval = getattr(self, name)
            data[name] = {k: None if isnan(x) else x for k, x in interval._asdict().items()}
        return data

    def summary(self) -> str:
        """Return the lines of the 2020 program, with intervals, and those of the other metrics."""
        lines = [
            f"Auc: {self.auc}",
            f"CM:\n{np.array(self.confusion)}",
            f"Acc: {self.accuracy}",
            f"Specificity: {self.specificity}",
            f"Sensitivity: {self.sensitivity}",
            *(f"{METRICS[name]}: {getattr(self, name)}" for name in SINCE_2020),
            f"{counted(self.n, 'image')}, {self.n_positive:,} of them good; threshold "
            f"{self.threshold:g}.",
            self._on_intervals(),
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

    def _on_intervals(self) -> str:
        """Say how the intervals were made, or why there are none."""
        if not (self.n_positive and self.n_negative):
            lacking = "bad" if self.n_positive else "good"
            return f"No intervals: there are no {lacking} images, so AUC and others are undefined."
        if self.n_groups == 1:
            return "No intervals: all images come from one micrograph, at least two are needed."
        text = (
            f"[95 % intervals: {self.resamples:,} bootstrap resamples of "
            f"{counted(self.n_groups, 'micrograph')}"
        )
        if self.skipped:
            text += f"; {self.skipped:,} more lacked a class and were left out"
        few = "; with so few they may be too narrow" if self.n_groups < FEW_GROUPS else ""
        return f"{text}{few}.]"


@dataclass(frozen=True, eq=False)
class Curves:
    """The points of the figures; ROC and precision-recall are empty if a class is missing.

    Parameters
    ----------
    fpr, tpr, roc_thresholds : ndarray
        (r,) with falling thresholds; the first is infinite, nothing is accepted there.
    precision, recall, pr_thresholds : ndarray
        (p,) with rising thresholds; the last is infinite, too.
    bin_score, bin_fraction, bin_count : ndarray
        (b,) mean score, fraction of good images and number of images of each bin that holds any.
    """

    fpr: Floats
    tpr: Floats
    roc_thresholds: Floats
    precision: Floats
    recall: Floats
    pr_thresholds: Floats
    bin_score: Floats
    bin_fraction: Floats
    bin_count: Floats


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
    labels
        (n,) True for good images.
    scores
        (n,) 0 to 1.
    groups
        (n,) numbers of the micrographs.
    threshold
        Images that score this much or more are accepted.
    seed
        Of the bootstrap: the same seed, the same intervals.
    resamples
        Of the bootstrap. Fewer are made of very large sets, see `MAX_DRAWN_IMAGES`.

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
    good, values = _checked(labels, scores)
    accepted = np.asarray(scores) >= float(threshold)  # float32 scores are compared as float32
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    if numbers.shape != good.shape:
        raise ValueError(f"{good.size} labels, but {numbers.size} groups")
    n_groups, n_positive = int(numbers.max()) + 1, int(good.sum())
    confusion = confusion_matrix(good, accepted, labels=[False, True]).tolist()
    ranked = rank(good, values, numbers, int(accepted.sum()))
    drawn: list[Floats] = []
    wanted = 0
    if n_groups > 1 and 0 < n_positive < good.size:
        wanted = min(resamples, max(FEWEST_RESAMPLES, MAX_DRAWN_IMAGES // good.size))
        drawn = list(bootstrap(ranked, n_groups, wanted, np.random.default_rng(seed)))
    metrics = intervals(_measure(good, values, confusion), drawn, n_groups)
    return Evaluation(
        n=good.size,
        n_positive=n_positive,
        n_negative=good.size - n_positive,
        n_groups=n_groups,
        threshold=float(threshold),
        confusion=(tuple(confusion[0]), tuple(confusion[1])),
        **dict(zip(METRICS, metrics)),
        resamples=len(drawn),
        skipped=wanted - len(drawn),
    )


def curves(labels: ArrayLike, scores: ArrayLike) -> Curves:
    """Return the points of the figures, at most about `MAX_POINTS` a curve.

    Parameters
    ----------
    labels
        (n,) True for good images.
    scores
        (n,) 0 to 1.
    """
    good, values = _checked(labels, scores)
    roc = precision_recall = tuple(np.empty(0) for _ in range(3))
    if good.any() and not good.all():
        roc = _thinned(*roc_curve(good, values))
        precision, recall, thresholds = precision_recall_curve(good, values)
        precision_recall = _thinned(precision, recall, np.append(thresholds, np.inf))
    points: list[Floats] = [*roc, *precision_recall, *_reliability(good, values)]
    return Curves(*points)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    good, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if good.shape != values.shape or good.ndim != 1:
        raise ValueError(f"labels are {good.shape} and scores {values.shape}, expected (n,) both")
    if not good.size:
        raise CryoFilterError("There are no labelled images to measure on.")
    wrong = int(np.count_nonzero(~np.isfinite(values)))
    if wrong:
        raise CryoFilterError(
            f"{wrong:,} of {good.size:,} scores are not numbers. Score the particles again."
        )
    return good, values


def _thinned(*points: Floats) -> tuple[Floats, ...]:
    """Return evenly spaced points of a curve, with its ends."""
    kept = np.unique(np.linspace(0, len(points[0]) - 1, MAX_POINTS).round().astype(int))
    return tuple(np.asarray(values, dtype=np.float64)[kept] for values in points)


def _reliability(good: NDArray[np.bool_], values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean score, fraction of good images and count of the bins that hold images."""
    bins = np.searchsorted(BIN_EDGES[1:-1], values)
    count = np.bincount(bins, minlength=15).astype(np.float64)
    held = count > 0
    score, positive = (
        np.bincount(bins, weights=weights, minlength=15)[held] / count[held]
        for weights in (values, good)
    )
    return score, positive, count[held]


def _measure(good: NDArray[np.bool_], values: Floats, confusion: list[list[int]]) -> Floats:
    """Return the metrics in the order of `METRICS`; scikit-learn computes what it has."""
    areas = [nan, nan, nan]
    if good.any() and not good.all():
        fpr, tpr, _ = roc_curve(good, values, drop_intermediate=False)
        areas = [
            roc_auc_score(good, values),
            average_precision_score(good, values),
            fpr[np.argmax(tpr >= RECALL_OF_FPR)],
        ]
    score, positive, count = _reliability(good, values)
    ece = float(np.average(np.abs(score - positive), weights=count))
    (tn, fp), (fn, tp) = confusion
    return np.array([*areas, ece, *at_threshold(tn, fp, fn, tp)])

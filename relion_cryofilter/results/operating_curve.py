"""The operating curve of a model: what recall and precision its thresholds give.

It answers requests for a recall or a precision, where the scores behind it are no longer at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from relion_cryofilter.errors import CryoFilterError, ModelError
from relion_cryofilter.results.bootstrap import Interval
from relion_cryofilter.results.thresholds import (
    DECIMALS,
    STEPS,
    ThresholdRequest,
    checked,
    choose_threshold,
    lowest_reaching,
    need_both_classes,
    ratio,
)

Floats = NDArray[np.floating[Any]]

MAX_QUANTILES = 201


@dataclass(frozen=True)
class OperatingCurve:
    """Recall and precision at every threshold, small enough to travel in a model file.

    Parameters
    ----------
    positives, negatives : tuple of float
        Evenly spaced quantiles of the validation scores of good and bad particles, rising, from
        the lowest score to the highest. Up to `MAX_QUANTILES` scores are kept as they are, and
        the curve is exact; between the quantiles of more scores it is interpolated. A fine-tuned
        model's good training particles are among the positives.
    n_positive, n_negative, n_groups : int
        Numbers of good and bad particles and of micrographs behind the curve.

    Raises
    ------
    ModelError
        If the numbers can't be a curve.
    """

    positives: tuple[float, ...]
    negatives: tuple[float, ...]
    n_positive: int
    n_negative: int
    n_groups: int

    def __post_init__(self) -> None:
        for quantiles, n in ((self.positives, self.n_positive), (self.negatives, self.n_negative)):
            in_range = all(0 <= q <= 1 for q in quantiles)
            rising = all(a <= b for a, b in pairwise(quantiles))
            fits = len(quantiles) <= min(n, MAX_QUANTILES) and bool(quantiles) == bool(n)
            if not (in_range and rising and fits):
                raise ModelError(
                    "The model's operating curve is damaged: expected rising scores from 0 to 1, "
                    f"at most {MAX_QUANTILES} of {n:,}, found {len(quantiles)}. "
                    "Use another copy of the model, or give the threshold as a score."
                )

    @classmethod
    def from_scores(
        cls,
        labels: ArrayLike,
        scores: ArrayLike,
        groups: ArrayLike,
        more_positives: ArrayLike = (),
    ) -> OperatingCurve:
        """Make the curve of a validation set.

        Parameters
        ----------
        labels, scores, groups
            (n,) each: True for good, score, number of the micrograph.
        more_positives
            Scores of further good particles, which make the recall less of a guess; they don't
            count in `n_positive`.
        """
        values, good = checked(scores).astype(np.float64), np.asarray(labels, dtype=bool)
        further = np.asarray(more_positives, dtype=np.float64)
        return cls(
            positives=_quantiles(np.concatenate([values[good], further]), int(good.sum())),
            negatives=_quantiles(values[~good]),
            n_positive=int(good.sum()),
            n_negative=int((~good).sum()),
            n_groups=int(np.unique(np.asarray(groups)).size),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatingCurve:
        """Read what `to_dict` made, perhaps by way of JSON."""
        try:
            return cls(
                tuple(float(score) for score in data["positives"]),
                tuple(float(score) for score in data["negatives"]),
                int(data["n_positive"]), int(data["n_negative"]), int(data["n_groups"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"The model's operating curve can't be read: {error!r}.") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as lists and numbers, for JSON."""
        data = asdict(self)
        return data | {name: list(data[name]) for name in ("positives", "negatives")}

    def recall_at(self, threshold: float) -> float:
        """Return the share of good particles accepted at a threshold; nan without any."""
        true, _ = self._accepted([threshold])
        return float(true[0]) / self.n_positive if self.n_positive else float("nan")

    def precision_at(self, threshold: float) -> float:
        """Return the share of good particles in the accepted ones; nan if none is accepted."""
        true, false = self._accepted([threshold])
        return float(ratio(true, true + false)[0])

    def describe(self, threshold: float) -> str:
        """Return what the curve says of a threshold, for the log."""
        recall = share_interval(self.recall_at(threshold), self.n_positive)
        return (
            f"by the curve in the model file recall {recall}, precision "
            f"{self.precision_at(threshold):.3f}"
        )

    def threshold(self, request: ThresholdRequest) -> float:
        """Return the threshold for a score, recall or precision, as `choose_threshold` does.

        Raises
        ------
        CryoFilterError
            The precision can't be reached, a class is missing, or the request is for a share or
            a number of particles, which needs their scores.
        """
        if request.kind == "score":
            return choose_threshold(request, [])
        if request.kind not in ("recall", "precision"):
            raise CryoFilterError(f"The threshold {request} needs the particles' scores.")
        need_both_classes(request, self.n_positive, self.n_negative)
        thresholds = np.arange(STEPS + 1) / STEPS
        true, false = self._accepted(thresholds)
        recalls = true / self.n_positive
        if request.kind == "recall":
            return float(thresholds[np.flatnonzero(recalls >= request.value)[-1]])
        differs = np.append((np.diff(true) != 0) | (np.diff(false) != 0), True)
        precisions = ratio(true, true + false)
        return lowest_reaching(
            request, thresholds[differs], precisions[differs], recalls[differs]
        )  # of thresholds that accept the same, the highest: a score, as in `choose_threshold`

    def _accepted(self, thresholds: ArrayLike) -> tuple[Floats, Floats]:
        """Return how many good and how many bad particles reach each threshold, (t,) each."""
        return (
            _count_by_quantiles(self.positives, self.n_positive, thresholds),
            _count_by_quantiles(self.negatives, self.n_negative, thresholds),
        )


def _quantiles(values: Floats, most: int = MAX_QUANTILES) -> tuple[float, ...]:
    if not values.size or not most:
        return ()
    spaced = np.linspace(0, 1, min(values.size, most, MAX_QUANTILES))
    return tuple(np.round(np.quantile(values, spaced), DECIMALS).tolist())


def _count_by_quantiles(quantiles: tuple[float, ...], n: int, thresholds: ArrayLike) -> Floats:
    """Return how many of n scores are at least each threshold, (t,), known their quantiles.

    ``rank[i]`` scores are below quantile i. Just above it there is one more below, and from
    there to the next quantile the number rises along a line. Quantiles that tie make a step.
    """
    cuts = np.asarray(thresholds, dtype=np.float64)
    if not quantiles:
        return np.zeros(cuts.shape)
    score, rank = np.asarray(quantiles), np.linspace(0, n - 1, len(quantiles))
    after = np.searchsorted(score, cuts, side="left")
    right = np.clip(after, 1, len(score) - 1) if len(score) > 1 else np.zeros_like(after)
    left = np.maximum(right - 1, 0)
    way = ratio(cuts - score[left], score[right] - score[left])
    below = rank[left] + 1 + way * (rank[right] - rank[left] - 1)
    below = np.where(after == 0, 0, np.where(after == len(score), n, below))
    return n - below


def share_interval(share: float, n: int) -> Interval:
    """Return a share of `n` particles with its 95 % interval, each particle by itself.

    Wilson's score interval (J. Am. Stat. Assoc. 22, 209, 1927). Particles of one micrograph are
    alike, so it is rather too narrow; where the images are at hand, `bootstrap` does better.
    """
    z2 = 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))

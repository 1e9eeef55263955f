"""Thresholds: from a request and scores, or from the operating curve that a model carries.

A particle is accepted if its score is at least the threshold. Scores are written to STAR files
with six decimals, so thresholds have six decimals too, and what a threshold promises is true of
the scores as they were given and of the same scores rounded to six decimals.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from relion_cryofilter.errors import CryoFilterError, ModelError, bounded
from relion_cryofilter.inputs import open_input, parse_json, seen
from relion_cryofilter.kinds import EITHER, OF_LABELS, ThresholdRequest

Floats = NDArray[np.floating[Any]]

log = logging.getLogger("relion_cryofilter")


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

    def to_list(self) -> list[float | None]:
        """Return value, low and high for JSON; None stands for nan."""
        return [None if isnan(number) else number for number in self]


FEWEST_OF_MIXTURE, MOST_OF_MIXTURE, LEAST_SHARE, APART = 100, 50_000, 0.03, 2.0
"""Particles that a mixture is fitted to; what is asked of its components."""

DECIMALS = 6
STEPS = 10**DECIMALS
_LARGEST_MODEL, _LONGEST_HEADER = 1 << 28, 1 << 24  # bytes; of names, shapes and provenance
METADATA_KEY, CURVE = "relion_cryofilter", "operating_curve"
"""Where a model file keeps its JSON, and where in its provenance the curve is."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which particles are accepted."""

    values: NDArray[np.float64]  # (n,) scores with six decimals, as they are written
    accepted: NDArray[np.bool_]  # (n,) at least the threshold, and the image is not bad
    threshold: float
    reason: str  # where the threshold is from, for the log

    def describe(self) -> str:
        """Return ``812 accepted (81.2 %), 188 rejected``."""
        n, kept = len(self.accepted), int(self.accepted.sum())
        return f"{kept:,} accepted ({100 * kept / n:.1f} %), {n - kept:,} rejected"

    def warn_if_none(self) -> None:
        """Say how far the best particle is from a threshold that none reaches."""
        if not self.accepted.any():
            log.warning(
                "The highest score is %.6f, below the threshold %g. keep=0.5 would accept half.",
                self.values.max(), self.threshold,
            )  # fmt: skip


def choose_threshold(
    request: ThresholdRequest, scores: ArrayLike, labels: ArrayLike | None = None
) -> float:
    """Return the threshold that fulfils a request on scored particles.

    Parameters
    ----------
    request
        ``score``: that score. ``recall``: the highest threshold with at least that recall.
        ``precision``: the lowest threshold with at least that precision. ``keep`` and ``count``:
        the best particles, at least as many as asked for; all that tie with the last one are
        accepted too. ``balanced``: the highest threshold where the recall and the share of junk
        rejected have the greatest sum. ``gmm``: where the upper of two components begins, see
        `Mixture`.
    scores
        (n,) 0 to 1. Scores of float32 are compared as float32.
    labels
        (n,) True for good particles; for ``recall``, ``precision`` and ``balanced``.

    Raises
    ------
    CryoFilterError
        There are no scores, a score is not a number, labels are needed and missing or all the
        same, or the precision can't be reached.
    """
    if request.kind == "score":
        return -float(_floor(np.array([-request.value]))[0])  # the next with six decimals
    values = checked(scores)
    if request.kind == "gmm":
        return Mixture.fit(values).threshold
    if request.kind == "keep":
        return _nth_highest(values, _least_number(request.value, values.size))
    if request.kind == "count":
        return _nth_highest(values, min(int(request.value), values.size))
    if labels is None:
        raise CryoFilterError(
            f"The threshold {request} needs to know which particles are good. Measure on a "
            "labelled set, use a trained model that holds its validation scores, or ask for "
            "a score, keep=0.6 or count=50000."
        )
    good = np.asarray(labels, dtype=bool)
    if good.shape != values.shape:
        raise ValueError(f"{values.shape} scores, but {good.shape} labels")
    need_both_classes(request, int(good.sum()), int((~good).sum()))
    if request.kind == "recall":
        return _nth_highest(values[good], _least_number(request.value, int(good.sum())))
    # What is true at each threshold of the rounded scores and of the others.
    rounded = np.round(values.astype(np.float64), DECIMALS)
    thresholds = np.unique(np.concatenate([_floor(values), rounded]))
    precisions, gains = [], []
    for given in (rounded, values):
        true, false = (_count_at_least(given[part], thresholds) for part in (good, ~good))
        precisions.append(ratio(true, true + false))
        gains.append(true / good.sum() - false / (~good).sum())
    if request.kind == "balanced":
        return best_balanced(thresholds, np.minimum(*gains))
    return lowest_reaching(request, thresholds, np.minimum(*precisions), true / good.sum())


@dataclass(frozen=True)
class Mixture:
    """Two normal distributions of logits that explain the scores of a set without labels.

    Attributes
    ----------
    shares, means, sigmas
        Of the lower and the upper component; means and sigmas in units of log odds.
    threshold
        The score from which a particle is more likely of the upper one.
    """

    shares: tuple[float, float]
    means: tuple[float, float]
    sigmas: tuple[float, float]
    threshold: float

    @classmethod
    def fit(cls, scores: ArrayLike) -> Mixture:
        """Fit to scores (n,); a CryoFilterError if one component explains them as well.

        Scores of 0 are of images that could not be scored, and are left out. Two components are
        told apart if they have the lower Bayesian information criterion, if each has a share of
        `LEAST_SHARE`, and if their means are `APART` standard deviations from each other
        (K. Ashman et al., Astron. J. 108, 2348 (1994)).
        """
        from sklearn.mixture import GaussianMixture  # slow to import

        values = checked(scores).astype(np.float64)
        values = np.clip(values[values > 0], 1 / STEPS, 1 - 1 / STEPS)
        if values.size < FEWEST_OF_MIXTURE:
            raise CryoFilterError(
                f"The threshold gmm needs {FEWEST_OF_MIXTURE} scored particles or more; found "
                f"{values.size:,}. Ask for a share such as keep=0.6."
            )
        rng = np.random.default_rng(0)
        some = values if values.size <= MOST_OF_MIXTURE else rng.choice(values, MOST_OF_MIXTURE)
        logits = np.log(some / (1 - some))[:, None]
        one, two = (
            GaussianMixture(count, random_state=0, n_init=3, max_iter=500).fit(logits)
            for count in (1, 2)
        )
        lower, upper = np.argsort(two.means_[:, 0])
        means, variances = two.means_[:, 0], two.covariances_[:, 0, 0]
        apart = (means[upper] - means[lower]) / np.sqrt(variances.mean())
        shares = two.weights_
        if two.bic(logits) >= one.bic(logits) or shares.min() < LEAST_SHARE or apart < APART:
            raise CryoFilterError(
                "The threshold gmm needs scores of two kinds, but one component explains these "
                f"{values.size:,} as well: the best two have shares of {shares[lower]:.0%} and "
                f"{shares[upper]:.0%}, and their means are {apart:.1f} standard deviations apart "
                f"(needed: {LEAST_SHARE:.0%}, {APART:g}). Ask for a share such as keep=0.6, or "
                "label some particles and run train."
            )
        grid = np.linspace(means[lower], means[upper], 2001)
        likely = two.predict_proba(grid[:, None])[:, upper] >= EITHER
        cut = 1 / (1 + np.exp(-grid[int(likely.argmax())]))
        return cls(
            (float(shares[lower]), float(shares[upper])),
            (float(means[lower]), float(means[upper])),
            (float(np.sqrt(variances[lower])), float(np.sqrt(variances[upper]))),
            float(_floor(np.array([cut]))[0]),
        )

    def describe(self) -> str:
        """Return shares and overlap, for the log."""
        from statistics import NormalDist

        cut = float(np.log(self.threshold / (1 - self.threshold)))
        below = [NormalDist(*pair).cdf(cut) for pair in zip(self.means, self.sigmas)]
        return (
            f"two components of {self.shares[0]:.0%} and {self.shares[1]:.0%}; at the threshold "
            f"{1 - below[0]:.1%} of the lower and {below[1]:.1%} of the upper one are on the "
            "other's side"
        )


def checked(scores: ArrayLike) -> Floats:
    """Return the scores as float32, if that is what they are, or float64; refuse none and NaN."""
    values = np.asarray(scores)
    values = values if values.dtype == np.float32 else values.astype(np.float64)
    if not values.size:
        raise CryoFilterError("There are no scores to choose a threshold from.")
    refuse_not_a_number(values)
    return values


def refuse_not_a_number(scores: Floats) -> None:
    """Say how many of the scores (n,) are not finite, if any are not."""
    if wrong := int(np.count_nonzero(~np.isfinite(scores))):
        raise CryoFilterError(
            f"{wrong:,} of {scores.size:,} scores are not numbers. Score the particles again."
        )


def threshold_and_reason(request: ThresholdRequest, scores: ArrayLike) -> tuple[float, str]:
    """Return the threshold that a request without labels means, and where it is from."""
    if request.kind == "gmm":
        found = Mixture.fit(scores)
        return found.threshold, f"{request.reason}: {found.describe()}"
    return choose_threshold(request, scores), request.reason


def need_both_classes(request: ThresholdRequest, n_positive: int, n_negative: int) -> None:
    """Refuse a request that needs labels and lacks the class it is about."""
    if not n_positive or (request.kind != "recall" and not n_negative):
        raise CryoFilterError(
            f"The threshold {request} can't be found with {n_positive:,} good and "
            f"{n_negative:,} bad particles. Use a labelled set that holds both."
        )


def _floor(values: Floats) -> NDArray[np.float64]:
    """Return the highest six-decimal numbers that the values reach, in the values' precision."""
    nearest = np.round(values.astype(np.float64), DECIMALS)
    below = np.round(nearest - 1 / STEPS, DECIMALS)
    return np.where(nearest.astype(values.dtype) <= values, nearest, below)


def _least_number(fraction: float, n: int) -> int:
    """Return the least k with k / n >= fraction, whatever the rounding of fraction * n."""
    k = max(1, int(fraction * n) - 1)
    while k / n < fraction:
        k += 1
    return k


def _nth_highest(values: Floats, n: int) -> float:
    nth = np.partition(values, values.size - n)[[values.size - n]]
    return float(_floor(nth)[0])


def _count_at_least(values: Floats, thresholds: Floats) -> Floats:
    """Return how many of the values are at least each threshold, (t,)."""
    cuts = thresholds.astype(values.dtype)
    return values.size - np.searchsorted(np.sort(values), cuts, side="left").astype(np.float64)


def ratio(part: Floats, whole: Floats) -> Floats:
    """Return part / whole, (n,) each; nan where there is no whole."""
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def lowest_reaching(
    request: ThresholdRequest, thresholds: Floats, precisions: Floats, recalls: Floats
) -> float:
    """Return the lowest of rising thresholds (t,) whose precision (t,) is as asked.

    Precisions may be nan. If none is as asked, the error names the best there is.
    """
    reached = np.flatnonzero(precisions >= request.value)
    if reached.size:
        return float(thresholds[reached[0]])
    best = int(np.nanargmax(precisions))
    raise CryoFilterError(
        f"The threshold {request} can't be reached: the best precision is "
        f"{precisions[best]:.4f}, at a recall of {recalls[best]:.4f} (threshold "
        f"{thresholds[best]:g}). Ask for less, or for a recall."
    )


def best_balanced(thresholds: Floats, gains: Floats) -> float:
    """Return the highest of rising thresholds (t,) with the greatest gain.

    Gains (t,) are recall - share of junk accepted; within rounding they are equal.
    """
    return float(thresholds[np.flatnonzero(gains >= gains.max() - 1e-9)[-1]])


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
        """Make the curve of a validation set: (n,) labels, scores and numbers of micrographs.

        `more_positives` are scores of further good particles, which make the recall less of a
        guess; they don't count in `n_positive`.
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
        except (KeyError, TypeError, ValueError, OverflowError) as error:
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
        """Return the threshold for what needs labels, or a score, as `choose_threshold` does.

        A request for a share or a number of particles needs their scores: a CryoFilterError.
        """
        if request.kind == "score":
            return choose_threshold(request, [])
        if request.kind not in OF_LABELS:
            raise CryoFilterError(f"The threshold {request} needs the particles' scores.")
        need_both_classes(request, self.n_positive, self.n_negative)
        thresholds = np.arange(STEPS + 1) / STEPS
        true, false = self._accepted(thresholds)
        recalls = true / self.n_positive
        if request.kind == "recall":
            return float(thresholds[np.flatnonzero(recalls >= request.value)[-1]])
        if request.kind == "balanced":
            return best_balanced(thresholds, recalls - false / self.n_negative)
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


def check_model_header(path: Path) -> None:
    """Raise an OSError if a file or its header is larger than any model's, before it is read."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        bounded(size, 0, _LARGEST_MODEL, "its size (bytes)", refuse=OSError)
        length = int.from_bytes(file.read(8), "little")
        bounded(length, 2, _LONGEST_HEADER, "the length of its header", refuse=OSError)


def read_curve(path: Path) -> OperatingCurve:
    """Read the curve in a model file, without torch; a ModelError if there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        check_model_header(path)
        seen(path, path.stat())
        with safe_open(str(path), framework="np") as file:
            text = (file.metadata() or {})[METADATA_KEY]
        return OperatingCurve.from_dict(parse_json(text)["provenance"][CURVE])
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: can't be read as one model file ({error}). Name the .safetensors of a train "
            "job; select takes one."
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: has no validation curve ({error!r}). Give a model made by `train`, or "
            "ask for a threshold such as 0.5 or keep=0.6."
        ) from error


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
    """Return a share of `n` particles with Wilson's 95 % interval, each particle by itself.

    Particles of one micrograph are alike, so it is rather too narrow; where the images are at
    hand, the bootstrap of `evaluation` does better.
    """
    from scipy.stats import binomtest  # slow to import

    ends = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return Interval(share, float(ends.low), float(ends.high))

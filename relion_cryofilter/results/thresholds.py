"""Thresholds by request: a score, a recall, a precision, a share or a number of particles.

A particle is accepted if its score is at least the threshold. Scores are written to STAR files
with six decimals, so thresholds have six decimals too, and what a threshold promises is true of
the scores as they were given and of the same scores rounded to six decimals.

Importing this module needs the standard library only: ``--help`` does not wait for numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relion_cryofilter.errors import CryoFilterError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.floating[Any]]

FORMS = """\
  0.6               accept scores of 0.6 and more
  2020              the threshold of the 2020 program, 0.5
  recall=0.95       keep 95 % of the good particles
  precision=0.9     90 % of what is accepted is good
  keep=0.6          accept the best 60 % of all particles; keep=60% is the same
  count=50000       accept the best 50,000 particles"""
"""The requests that are understood, for help and errors."""

THRESHOLD_2020 = 0.5
DECIMALS = 6
STEPS = 10**DECIMALS
MAX_COUNT = 10**12

_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER = re.compile(rf"{_DECIMAL}(?:e[+-]?[0-9]+)?")
_PERCENTAGE = re.compile(rf"({_DECIMAL})\s*%")
_COUNT = re.compile(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+")
_RANGES = {
    "score": "from 0 to 1",
    "recall": "above 0 and at most 1",
    "precision": "above 0 and at most 1",
    "keep": "above 0 and at most 1, or a percentage",
    "count": "a whole number from 1",
}


@dataclass(frozen=True)
class ThresholdRequest:
    """What a user asks of the threshold.

    Parameters
    ----------
    kind : str
        ``score``, ``recall``, ``precision``, ``keep`` (a fraction of all particles) or ``count``.
    value : float
        The number asked for; fractions are 0 to 1.

    Raises
    ------
    UsageError
        If the kind is unknown or the value out of range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in _RANGES:
            raise _not_understood(str(self), f"there is no {self.kind!r}")
        if not self._in_range():
            raise _not_understood(str(self), f"{self.kind} must be {_RANGES[self.kind]}")

    def _in_range(self) -> bool:
        if self.kind == "count":
            return 1 <= self.value <= MAX_COUNT and self.value == int(self.value)
        return 0 <= self.value <= 1 and (self.kind == "score" or self.value > 0)

    @classmethod
    def parse(cls, text: str) -> ThresholdRequest:
        """Read a request as users write it, see `FORMS`.

        Raises
        ------
        UsageError
            The text is none of the forms, or its number is out of range.
        """
        found = text.strip()
        if found == "2020":
            return cls("score", THRESHOLD_2020)
        name, equals, number = (part.strip() for part in found.partition("="))
        if not equals:
            name, number = "score", found
        elif name == "score" or name not in _RANGES:
            raise _not_understood(found, f"there is no {name!r}")
        value = _read_count(number) if name == "count" else _read_fraction(name, number)
        if value is None:
            raise _not_understood(found, f"{number!r} is not a number that fits {name}")
        return cls(name, value)

    def __str__(self) -> str:
        """Return the text that `parse` reads back as the same request."""
        number = repr(float(self.value)).removesuffix(".0")
        return number if self.kind == "score" else f"{self.kind}={number}"


def _not_understood(found: str, reason: str) -> UsageError:
    return UsageError(
        f"The threshold {found!r} is not understood: {reason}. Expected one of\n{FORMS}"
    )


def _read_count(number: str) -> float | None:
    return float(number.replace(",", "")) if _COUNT.fullmatch(number) else None


def _read_fraction(name: str, number: str) -> float | None:
    percentage = _PERCENTAGE.fullmatch(number)
    if percentage and name != "score":
        return float(f"{percentage[1]}e-2")  # the nearest float; dividing by 100 may miss it
    return float(number) if _NUMBER.fullmatch(number) else None


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
        accepted too.
    scores
        (n,) 0 to 1. Scores of float32 are compared as float32.
    labels
        (n,) True for good particles; for ``recall`` and ``precision``.

    Returns
    -------
    float
        With six decimals.

    Raises
    ------
    CryoFilterError
        There are no scores, a score is not a number, labels are needed and missing or all the
        same, or the precision can't be reached.
    """
    import numpy as np

    if request.kind == "score":
        return -float(_floor(np.array([-request.value]))[0])  # the next with six decimals
    values = checked(scores)
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
    return _precise_threshold(request, values, good)


def checked(scores: ArrayLike) -> Floats:
    """Return the scores as float32, if that is what they are, or float64.

    Raises
    ------
    CryoFilterError
        There are no scores, or one is not a number.
    """
    import numpy as np

    values = np.asarray(scores)
    values = values if values.dtype == np.float32 else values.astype(np.float64)
    if not values.size:
        raise CryoFilterError("There are no scores to choose a threshold from.")
    wrong = int(np.count_nonzero(~np.isfinite(values)))
    if wrong:
        raise CryoFilterError(
            f"{wrong:,} of {values.size:,} scores are not numbers. Score the particles again."
        )
    return values


def need_both_classes(request: ThresholdRequest, n_positive: int, n_negative: int) -> None:
    """Refuse a request for a recall or precision that lacks the class it is about.

    Raises
    ------
    CryoFilterError
        There are no good particles, or no bad ones for a precision.
    """
    if not n_positive or (request.kind == "precision" and not n_negative):
        raise CryoFilterError(
            f"The threshold {request} can't be found with {n_positive:,} good and "
            f"{n_negative:,} bad particles. Use a labelled set that holds both."
        )


def _floor(values: Floats) -> NDArray[np.float64]:
    """Return the highest six-decimal numbers that the values reach, in the values' precision."""
    import numpy as np

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
    import numpy as np

    nth = np.partition(values, values.size - n)[[values.size - n]]
    return float(_floor(nth)[0])


def _precise_threshold(request: ThresholdRequest, values: Floats, good: NDArray[np.bool_]) -> float:
    """Return the lowest threshold whose precision is as asked, rounded scores or not."""
    import numpy as np

    rounded = np.round(values.astype(np.float64), DECIMALS)
    thresholds = np.unique(np.concatenate([_floor(values), rounded]))
    precisions = []
    for given in (rounded, values):
        true = _count_at_least(given[good], thresholds)
        precisions.append(ratio(true, true + _count_at_least(given[~good], thresholds)))
    return lowest_reaching(request, thresholds, np.minimum(*precisions), true / good.sum())


def _count_at_least(values: Floats, thresholds: Floats) -> Floats:
    """Return how many of the values are at least each threshold, (t,)."""
    import numpy as np

    cuts = thresholds.astype(values.dtype)
    return values.size - np.searchsorted(np.sort(values), cuts, side="left").astype(np.float64)


def ratio(part: Floats, whole: Floats) -> Floats:
    """Return part / whole, (n,) each; nan where there is no whole."""
    import numpy as np

    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def lowest_reaching(
    request: ThresholdRequest, thresholds: Floats, precisions: Floats, recalls: Floats
) -> float:
    """Return the lowest threshold whose precision is as asked.

    Parameters
    ----------
    request
        For a precision.
    thresholds, precisions, recalls
        (t,) each; thresholds rise, precisions may be nan.

    Raises
    ------
    CryoFilterError
        The precision can't be reached; the message names the best there is.
    """
    import numpy as np

    reached = np.flatnonzero(precisions >= request.value)
    if reached.size:
        return float(thresholds[reached[0]])
    best = int(np.nanargmax(precisions))
    raise CryoFilterError(
        f"The threshold {request} can't be reached: the best precision is "
        f"{precisions[best]:.4f}, at a recall of {recalls[best]:.4f} (threshold "
        f"{thresholds[best]:g}). Ask for less, or for a recall."
    )

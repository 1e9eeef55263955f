"""The kinds of options: how words become values, and what values are allowed.

Only the standard library is imported: the job's guard and ``--help`` do not wait for numpy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

from relion_cryofilter.errors import UsageError, bounded

FORMS = """\
  0.6               accept scores of 0.6 and more
  2020              the threshold of the 2020 program, 0.5
  recall=0.95       keep 95 % of the good particles
  precision=0.9     90 % of what is accepted is good
  keep=0.6          accept the best 60 % of all particles; keep=60% is the same
  count=50000       accept the best 50,000 particles
  balanced          lose as small a share of the good as pass of the junk, at best in sum
  gmm               the upper of two kinds, where the scores show two"""
"""The requests that are understood, for help and errors."""

THRESHOLD_2020 = 0.5
EITHER = 0.5
"""The value of a request without a number: of two kinds, as likely the one as the other."""
MAX_COUNT = 10**12
_LARGEST = 2**31 - 1
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
    "balanced": "given without a number",
    "gmm": "given without a number",
}
_BARE = ("balanced", "gmm")
OF_LABELS = ("recall", "precision", "balanced")
"""Requests that need labels, or the operating curve of a model."""


@dataclass(frozen=True)
class ThresholdRequest:
    """What a user asks of the threshold; a UsageError if it makes no sense."""

    kind: str  # ``score``, ``recall``, ``precision``, ``keep`` (of all), ``count``, …
    value: float  # fractions are 0 to 1; of ``balanced`` and ``gmm``, `EITHER`

    def __post_init__(self) -> None:
        if self.kind not in _RANGES:
            raise _not_understood(str(self), f"there is no {self.kind!r}")
        if self.kind == "count":
            fits = 1 <= self.value <= MAX_COUNT and self.value == int(self.value)
        elif self.kind in _BARE:
            fits = self.value == EITHER
        else:
            fits = 0 <= self.value <= 1 and (self.kind == "score" or self.value > 0)
        if not fits:
            raise _not_understood(str(self), f"{self.kind} must be {_RANGES[self.kind]}")

    @property
    def reason(self) -> str:
        """Where a threshold that it gave is from, for the log."""
        return "as asked" if self.kind == "score" else f"for {self}"

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
        if found in _BARE:
            return cls(found, EITHER)
        name, equals, number = (part.strip() for part in found.partition("="))
        if not equals:
            name, number = "score", found
        elif name == "score" or name not in _RANGES:
            raise _not_understood(found, f"there is no {name!r}")
        percentage = _PERCENTAGE.fullmatch(number)
        if name in _BARE:
            raise _not_understood(found, f"{name} is {_RANGES[name]}")
        if name == "count" and _COUNT.fullmatch(number):
            return cls(name, float(number.replace(",", "")))
        if percentage and name not in ("count", "score"):
            return cls(name, float(f"{percentage[1]}e-2"))  # nearer than dividing by 100
        if name != "count" and _NUMBER.fullmatch(number):
            return cls(name, float(number))
        raise _not_understood(found, f"{number!r} is not a number that fits {name}")

    def __str__(self) -> str:
        """Return the text that `parse` reads back as the same request."""
        number = repr(float(self.value)).removesuffix(".0")
        if self.kind in _BARE:
            return self.kind
        return number if self.kind == "score" else f"{self.kind}={number}"


def _not_understood(found: str, reason: str) -> UsageError:
    return UsageError(
        f"The threshold {found!r} is not understood: {reason}. Expected one of\n{FORMS}"
    )


TRUE_WORDS, FALSE_WORDS = ("yes", "true", "1", "on"), ("no", "false", "0", "off")
ALL_GPUS = "all"


def gpu_numbers(text: str | None) -> list[int] | None:
    """Read ``--gpu`` in RELION's spellings: [] is no GPU (or no --gpu), None all of them.

    Examples
    --------
    >>> gpu_numbers("0:1"), gpu_numbers("cpu"), gpu_numbers(",")
    ([0, 1], [], None)
    """
    if text is None:
        return []
    plain = text.strip().strip("\"'").lower().replace("cuda:", "")
    words = [word for word in re.split(r"[,:;\s]+", plain) if word]
    if words in (["cpu"], ["none"], ["no"], ["false"], ["-1"]):
        return []
    if not words or words in ([ALL_GPUS], ["gpu"], ["cuda"], ["yes"], ["true"]):
        return None
    return sorted({int(word) for word in words})


def _read_gpu(text: str) -> str:
    gpu_numbers(text)
    return text


def _read_flag(text: str) -> bool:
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(text)
    return text.lower() in TRUE_WORDS


def _read_integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.split(r"[,;\s]+", text.strip("\"'")) if word)


def _read_label(text: str) -> str:
    return text.removeprefix("_")


@dataclass(frozen=True)
class Kind:
    """A kind of option: how words become a value, and how it is explained."""

    read: Callable[[str], Any]  # makes the value of a text; ValueError if it is none
    metavar: str  # stands for a value in ``--help``
    words: str  # and in docs/options.md
    expected: str = "another value"  # for errors
    empty: Any = None  # the value of no words, which RELION leaves of an empty box
    several: bool = False  # whether the words of an option that is given again are added


KINDS: Mapping[str, Kind] = {
    "text": Kind(str, "TEXT", "word"),
    "label": Kind(_read_label, "LABEL", "column"),
    "flag": Kind(_read_flag, "[Yes|No]", "Yes or No", "nothing, Yes or No", empty=True),
    "integer": Kind(int, "N", "whole number", "a whole number"),
    "integers": Kind(
        _read_integers, "N,N,...", "numbers", "whole numbers such as 1,4,7", several=True
    ),
    "number": Kind(float, "X", "number", "a number"),
    "path": Kind(Path, "PATH", "path"),
    "paths": Kind(Path, "PATH ...", "paths", several=True),
    "gpu": Kind(
        _read_gpu, "[N,...]", "GPUs", "GPU numbers such as 0 or 0,1, or cpu", empty=ALL_GPUS
    ),
    "threshold": Kind(ThresholdRequest.parse, "REQUEST", "request"),
}
"""What an option's metadata may name."""


def read_words(item: Field[Any], words: Sequence[str]) -> Any:
    """Turn the words after an option into its value; an empty value is None but for some kinds.

    Raises
    ------
    UsageError
        The words can't be read as what the option expects.
    """
    name, text = item.metadata["kind"], " ".join(words).strip()
    kind = KINDS[name]
    if not text:
        return kind.empty
    if name == "paths":
        return tuple(map(Path, words))
    if name == "path" and len(words) > 1 and all(Path(word).exists() for word in words):
        raise UsageError(f"--{item.name} takes one path; found {len(words)}: {text}.")
    try:
        return kind.read(text)
    except ValueError:
        raise UsageError(
            f"--{item.name} is {text[:100]!r}; expected {kind.expected}. {item.metadata['help']}"
        ) from None


def given(item: Field[Any], value: Any) -> Any:
    """Read what a Python caller gives for an option: text as on the command line, natural types."""
    kind = item.metadata["kind"]
    if kind == "paths":
        one = isinstance(value, str | Path)
        return (Path(value),) if one else tuple(map(Path, value or ()))
    if kind == "gpu" and isinstance(value, int | list | tuple):
        value = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if kind == "threshold" and isinstance(value, int | float):
        value = str(value)
    if isinstance(value, str) and kind != "text":
        return read_words(item, [value])
    return tuple(value) if kind == "integers" else value


def check_limits(item: Field[Any], value: Any) -> None:
    """Raise a UsageError if a number is outside what the option allows."""
    kind, choices = item.metadata["kind"], item.metadata.get("choices")
    if value is None:
        return
    if choices and value not in choices:
        raise UsageError(f"--{item.name} is {value!r}; expected {' or '.join(choices)}.")
    if kind in ("integer", "integers"):
        for number in value if isinstance(value, tuple) else (value,):
            what = f"--{item.name}"
            bounded(number, -_LARGEST, _LARGEST, what, item.metadata["help"], UsageError)
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if low is None and high is None:
        return
    if not (low is None or value >= low) or not (high is None or value <= high):
        limits = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise UsageError(f"--{item.name} is {value}; expected {limits}. {item.metadata['help']}")

"""The errors that a user can act on.

A message says where, what was found, what was expected and what to do. Everything that is not a
`CryoFilterError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


class CryoFilterError(Exception):
    """A problem with the input or the environment that the user can put right."""


class UsageError(CryoFilterError):
    """An option is unknown, missing or has a value that makes no sense."""


class StarError(CryoFilterError):
    """A STAR file is refused: the message names the file, the line and the cure."""


class CryoSparcError(CryoFilterError):
    """A file of CryoSPARC, or its server, can't be used."""


class ImageError(CryoFilterError):
    """Particle images are missing, truncated, blank or hold NaN."""


class ModelError(CryoFilterError):
    """A model file can't be used."""


class Aborted(CryoFilterError):  # noqa: N818 - an event, not a fault
    """Somebody asked the job to stop ("Abort running" in RELION's window)."""


def suggestion(word: str, known: Sequence[str], dashes: str = "") -> str:
    """Return which of the known words was meant, or all of them if none is near."""
    longer = [name for name in known if name.startswith(word)]
    nearest = difflib.get_close_matches(word, longer or known, 1, 0 if longer else 0.5)
    if nearest:
        return f"Did you mean {dashes}{nearest[0]}?"
    return f"There are {', '.join(dashes + name for name in known)}."


def bounded(
    value: Any,
    low: int,
    high: int,
    what: str,
    cure: str = "",
    refuse: type[Exception] = CryoFilterError,
) -> int:
    """Return `value` if it is a whole number from `low` to `high`, else raise `refuse`.

    Every number from a file or a variable passes here before it sizes, repeats or builds anything.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if whole and low <= value <= high:
        return int(value)
    found = "far off" if whole and abs(value) >= 10**30 else repr(value)
    found = found if len(found) <= 60 else f"{found[:60]}…"
    raise refuse(f"{what} is {found}; expected a whole number from {low} to {high}. {cure}".strip())

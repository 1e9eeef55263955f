"""The errors that a user can act on.

A message says where, what was found, what was expected and what to do. Everything that is not a
`CryoFilterError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

_LONG_WORD, _LONG_LINE = re.compile(r"\S{320,}"), re.compile(r"[^\n]{4000,}")
_UNUSUAL = re.compile(r"[^\n -~]")


def readable(text: str) -> str:
    """Return a message as it can be shown: names shortened, escapes and odd bytes made visible.

    All that is logged or raised passes here, so a name of megabytes, or one that would steer a
    terminal, may stand in any message.
    """
    text = _LONG_LINE.sub(_shortened, _LONG_WORD.sub(_shortened, text))
    return _UNUSUAL.sub(lambda c: c[0] if c[0].isprintable() else _escape(c[0]), text)


def _shortened(found: re.Match[str]) -> str:
    n = 120 if found.re is _LONG_WORD else 1500
    return f"{found[0][:n]}…[{len(found[0]):,} characters]…{found[0][-n:]}"


def _escape(character: str) -> str:
    """Return a character as its code; a byte of a name that is no UTF-8 as that byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class CryoFilterError(Exception):
    """A problem with the input or the environment that the user can put right."""

    def __str__(self) -> str:
        """Return the message, `readable`."""
        return readable(super().__str__())


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

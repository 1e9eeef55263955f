"""Numbers with their nouns, and what a mistyped word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return ``1 micrograph``, ``2 micrographs``, ``1,400 particles``.

    Parameters
    ----------
    number
        How many.
    noun
        Of one.
    plural
        Of many; the noun with an s if not given.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def suggestion(word: str, known: Sequence[str], dashes: str = "") -> str:
    """Return which of the known words was meant, or all of them if none is near."""
    longer = [name for name in known if name.startswith(word)]
    nearest = difflib.get_close_matches(word, longer or known, 1, 0 if longer else 0.5)
    if nearest:
        return f"Did you mean {dashes}{nearest[0]}?"
    return f"There are {', '.join(dashes + name for name in known)}."

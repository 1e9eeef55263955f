"""Numbers with their nouns, as people write them."""

from __future__ import annotations


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

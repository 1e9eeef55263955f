"""File names as they fit into figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return file names without the end that all of them share, such as ``_fractions.mrc``."""
    short = [name.rpartition("/")[2] for name in names]
    tail = _shared_tail(short) if len(short) > 1 else 0
    shared = short[0][len(short[0]) - tail :]
    cut = next((at for at, sign in enumerate(shared) if sign in "._-"), tail)
    return [name[: len(name) - tail + cut] or name for name in short]


def _shared_tail(names: Sequence[str]) -> int:
    """Return how many last signs are the same in all names; the first and last in order tell."""
    turned = sorted(name[::-1] for name in names)
    pairs = zip(turned[0], turned[-1])
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def shortened(name: str, most: int = 34) -> str:
    """Return the end of a long path, which tells micrographs apart."""
    name = name.rpartition("/")[2]
    return printable(name if len(name) <= most else f"…{name[-most + 1 :]}")


def printable(text: str) -> str:
    """Return text that matplotlib neither takes for mathematics nor chokes on."""
    return text.encode(errors="replace").decode().replace("$", r"\$")

"""Names of images as RELION writes them, and numbers that stand for names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import contains

import numpy as np

from relion_cryofilter.errors import StarError

_LARGEST_INDEX = 2**31 - 1


def parse_image_name(name: str) -> tuple[int, str]:
    """Split ``000012@path/x.mrcs`` into (11, ``path/x.mrcs``); only this module knows 1-based.

    A name without ``@`` is a file with one image: index 0. RELION's type suffix (``x.mrc:mrcs``)
    is taken off.

    Raises
    ------
    ValueError
        The part before ``@`` is not a whole number of at least 1, or there is no path.
    """
    number, at, path = name.partition("@")
    if not at:
        number, path = "1", name
    if not (number.isascii() and number.isdecimal()) or not path:
        raise ValueError(name)
    if not 1 <= int(number) <= _LARGEST_INDEX:
        raise ValueError(name)
    stem, colon, suffix = path.rpartition(":")
    if colon and suffix in ("mrcs", "mrc"):
        path = stem
    return int(number) - 1, path


def parse_image_names(
    names: Sequence[str], where: Callable[[int], str], first: int = 0
) -> tuple[list[int], list[str]]:
    """Split many image names into 0-based places and stacks.

    Parameters
    ----------
    names
        (n,) as for `parse_image_name`.
    where
        Says where the name of a row stands.
    first
        Row of the first name.

    Raises
    ------
    StarError
        One of them is no image name.
    """
    parts = "\n".join(names).replace("@", "\n").split("\n")
    numbers, stacks = parts[::2], parts[1::2]
    if len(parts) == 2 * len(names) and all(map(contains, names, repeat("@"))):
        digits = "".join(numbers)
        plain = digits.isascii() and digits.isdecimal() and all(numbers)
        if plain and all(stacks) and ":" not in "".join(stacks):
            places = [int(number) - 1 for number in numbers]
            if min(places) >= 0 and max(places) < _LARGEST_INDEX:
                return places, stacks
    both = [_parsed(name, row, where) for row, name in enumerate(names, first)]
    return [place for place, _ in both], [stack for _, stack in both]


def _parsed(name: str, row: int, where: Callable[[int], str]) -> tuple[int, str]:
    try:
        return parse_image_name(name)
    except ValueError:
        raise StarError(
            f"{where(row)}: the image name is {name!r}; expected N@stack.mrcs with N from 1."
        ) from None


class Numbers(dict[str, int]):
    """Gives each name it sees a number, in order of first sight."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__((name, number) for number, name in enumerate(names))

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self)
        return number

    def of(self, names: Iterable[str]) -> np.ndarray:
        """Return the number of each name, (n,) int32."""
        return np.fromiter((self[name] for name in names), np.int32)


def numbered(names: Iterable[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return each name once, in order of first sight, and (n,) int32 into them."""
    numbers = Numbers()
    of_rows = numbers.of(names)
    return tuple(numbers), of_rows

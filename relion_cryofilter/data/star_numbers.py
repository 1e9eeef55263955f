"""Columns of a STAR file as numbers, to look at: never to write rows again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from relion_cryofilter.data.star import Loop, StarFile, rows, tokens

CHUNK = 50_000


def read_numbers(star: StarFile, loop: Loop, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Read columns as numbers, streaming; a million rows take a few seconds.

    Parameters
    ----------
    star, loop
        The file and its loop, whose rows have as many values as it has labels.
    labels
        Those that the loop lacks are left out.

    Returns
    -------
    dict
        By label (n_rows,) float32; NaN where the text is no number.
    """
    present = [label for label in labels if label in loop.labels]
    if not present:
        return {}
    places = [loop.labels.index(label) for label in present]
    table = np.empty((len(present), loop.n_rows), np.float32)
    lines, start = rows(star, loop), 0
    while chunk := list(islice(lines, CHUNK)):
        table[:, start : start + len(chunk)] = _numbers(chunk, places)
        start += len(chunk)
    return dict(zip(present, table))


def _numbers(lines: list[bytes], places: list[int]) -> np.ndarray:
    """Return (len(places), m); numpy's reader is ten times as fast, but knows numbers only."""
    whole = b"".join(lines)
    if not any(special in whole for special in (b'"', b"'", b"#")):
        with suppress(ValueError):  # a text among the numbers: each is tried by itself
            return np.loadtxt(lines, np.float64, comments=None, usecols=places, ndmin=2).T
    texts = [[words[place] for place in places] for words in map(tokens, lines)]
    return np.array([[_number(text) for text in row] for row in texts]).T


def _number(text: bytes) -> float:
    try:
        return float(text.strip(b"\"'"))
    except ValueError:
        return float("nan")

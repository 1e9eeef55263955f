"""Columns of a STAR file as numbers, to look at: never to write rows again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from relion_cryofilter.data.star import Loop, StarFile, column_chunks


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
    table, start = np.empty((len(present), loop.n_rows), np.float32), 0
    for chunk in column_chunks(star, loop, present):
        end = start + len(chunk[0])
        for column, texts in enumerate(chunk):
            table[column, start:end] = _numbers(texts)
        start = end
    return dict(zip(present, table))


def _numbers(texts: list[str]) -> np.ndarray:
    with suppress(ValueError):  # a text among the numbers: each is tried by itself
        return np.array(texts, np.float64)
    return np.array([_number(text) for text in texts])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")

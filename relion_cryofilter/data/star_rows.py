"""The rows of a STAR loop as bytes, and the values of its columns as text.

Columns are read some megabytes at a time. A chunk without quotes and comments is split at once,
each row checked by the mark that stands for its end; any other is read row by row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from relion_cryofilter.data.star_layout import Loop, StarFile, whole_lines
from relion_cryofilter.errors import StarError

TOKEN = re.compile(
    rb"""(?<!\S)(?:"(?:[^"]|"(?=\S))*"(?=\s|$)|'(?:[^']|'(?=\S))*'(?=\s|$)|\#.*|\S+)""", re.VERBOSE
)
_SPECIAL = re.compile(rb"[\"'#]")
_ROW_END = b"\0"
_NOT_PLAIN = (b'"', b"'", b"#", _ROW_END)


def tokens(line: bytes) -> list[bytes]:
    """Split one row into its values: quotes kept, a trailing ``# comment`` left out."""
    if not _SPECIAL.search(line):
        return line.split()
    words: list[bytes] = TOKEN.findall(line)
    return words[:-1] if words and words[-1].startswith(b"#") else words


def row_chunks(star: StarFile, loop: Loop) -> Iterator[bytes]:
    """Yield the rows of `loop`, whole lines, a few megabytes at a time."""
    with star.path.open("rb", buffering=0) as file:
        file.seek(loop.rows_start)
        yield from whole_lines(file, loop.rows_end - loop.rows_start)


def columns(star: StarFile, loop: Loop, labels: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the values of `labels` (all present) row by row, as unquoted text.

    Raises
    ------
    StarError
        A row has more or fewer values than the loop has labels.
    """
    for chunk in column_chunks(star, loop, labels):
        yield from zip(*chunk)


def column_chunks(star: StarFile, loop: Loop, labels: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yield, for some thousand rows after the other, one list of values for each of `labels`.

    Raises
    ------
    StarError
        A row has more or fewer values than the loop has labels.
    """
    wanted = [loop.labels.index(label) for label in labels]
    line = loop.first_line
    for chunk in row_chunks(star, loop):
        words = _plain_words(chunk, len(loop.labels))
        if words:
            step = len(loop.labels) + 1
            yield [_texts(words[column::step]) for column in wanted]
        else:
            lines = chunk.splitlines()
            rows_of_words = [_checked(star, loop, n, row) for n, row in enumerate(lines, line)]
            yield [[_unquoted(row[column]) for row in rows_of_words] for column in wanted]
        line += chunk.count(b"\n")


def _plain_words(chunk: bytes, width: int) -> list[bytes]:
    """Split rows without quotes or comments, a mark after each; [] if a row is anything else."""
    if any(mark in chunk for mark in _NOT_PLAIN):
        return []
    n_rows = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
    words = (chunk.removesuffix(b"\n") + b"\n").replace(b"\n", b" %b " % _ROW_END).split()
    ends = words[width :: width + 1]
    whole = len(words) == n_rows * (width + 1) and ends.count(_ROW_END) == n_rows
    return words if whole else []


def _texts(words: list[bytes]) -> list[str]:
    """Decode many values at once; none holds a newline."""
    return os.fsdecode(b"\n".join(words)).split("\n")


def _checked(star: StarFile, loop: Loop, number: int, line: bytes) -> list[bytes]:
    """Return the values of the row in line `number`."""
    words = tokens(line)
    if len(words) != len(loop.labels):
        raise StarError(
            f"{star.path}, line {number}: {len(words)} values, but data_{loop.block} has "
            f"{len(loop.labels)} labels. Mend the line, or make the file again with the program "
            "that wrote it."
        )
    if _SPECIAL.search(line):
        _check_quotes(star, number, words)
    return words


def _check_quotes(star: StarFile, number: int, words: Sequence[bytes]) -> None:
    for word in words:
        if word[:1] in (b'"', b"'") and (len(word) < 2 or word[-1:] != word[:1]):
            raise StarError(
                f"{star.path}, line {number}: the quote of {word.decode(errors='replace')} is not "
                "closed, and RELION fails on it. Mend the line."
            )


def _unquoted(word: bytes) -> str:
    if word[:1] in (b'"', b"'") and len(word) > 1 and word[-1:] == word[:1]:
        word = word[1:-1]
    return os.fsdecode(word)

"""STAR text written again verbatim: one column added or overwritten, rows chosen.

Rows stay the bytes that they were. Files are streamed and appear when they are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path

import numpy as np

from relion_cryofilter.data.star import TOKEN, Loop, StarFile, row_chunks
from relion_cryofilter.files import replacing


@dataclass(frozen=True)
class StarTable:
    """The particles of a STAR file, to be written again.

    Attributes
    ----------
    star, loop
        The file and its particle loop.
    label
        The column for scores.
    """

    star: StarFile
    loop: Loop
    label: str
    suffix: str = ".star"

    def write(self, subsets: Mapping[Path, np.ndarray], values: np.ndarray | None = None) -> None:
        """Write the rows of each mask to its file, with the scores `values` (n,) if given."""
        if values is None:
            write_subsets(self.star, self.loop, subsets)
        else:
            write_scored(self.star, self.loop, self.label, values, subsets)

    def remove(self, path: Path) -> None:
        """Remove what an earlier `write` made of `path`."""
        path.unlink(missing_ok=True)


def write_scored(
    star: StarFile,
    loop: Loop,
    label: str,
    values: np.ndarray,
    subsets: Mapping[Path, np.ndarray],
) -> None:
    """Write copies of `star` whose particle rows carry `values` in the column `label`.

    Each row keeps its bytes. The value is appended as RELION's own ``--add_column`` would, or
    put in place of the old one where `label` is there already. All other blocks are copied. The
    files appear together, when all of them are complete.

    Parameters
    ----------
    star, loop
        The file and its particle loop.
    label
        The column's label, without underscore.
    values
        (n_rows,) one number a row; printed with six decimals.
    subsets
        For each file to write, a (n_rows,) mask of the rows to keep.
    """
    scored = _scored(star, loop, label, values)
    _write_rows(
        star, loop, scored, subsets, b"" if label in loop.labels else _label_line(loop, label)
    )


def write_subsets(star: StarFile, loop: Loop, subsets: Mapping[Path, np.ndarray]) -> None:
    """Write copies of `star` with some of its particle rows, byte for byte.

    Parameters
    ----------
    star, loop
        The file and its particle loop.
    subsets
        For each file to write, a (n_rows,) mask of the rows to keep.
    """
    lines = (chunk.splitlines(keepends=True) for chunk in row_chunks(star, loop))
    _write_rows(star, loop, lines, subsets, b"")


def _scored(
    star: StarFile, loop: Loop, label: str, values: np.ndarray
) -> Iterator[Sequence[bytes]]:
    """Yield some thousand rows at a time, each with its value in column `label`."""
    present = label in loop.labels
    place = _overwrite(loop.labels.index(label)) if present else _append
    first = 0
    for chunk in row_chunks(star, loop):
        lines = chunk.splitlines(keepends=True)
        numbers = values[first : first + len(lines)].tolist()
        if not present and b"#" not in chunk and chunk.count(b" \n") == len(lines):
            yield [line[:-1] + b"%12.6f \n" % number for line, number in zip(lines, numbers)]
        else:
            yield [place(line, b"%.6f" % number) for line, number in zip(lines, numbers)]
        first += len(lines)


def _write_rows(
    star: StarFile,
    loop: Loop,
    chunks: Iterable[Sequence[bytes]],
    subsets: Mapping[Path, np.ndarray],
    new_label: bytes,
) -> None:
    with ExitStack() as stack, star.path.open("rb", buffering=1 << 20) as source:
        files = [stack.enter_context(replacing(path)) for path in subsets]
        head = source.read(loop.labels_end) + new_label
        head += source.read(loop.rows_start - loop.labels_end)
        for file in files:
            file.write(head)
        first = 0
        for lines in chunks:
            for file, mask in zip(files, subsets.values()):
                file.write(b"".join(compress(lines, mask[first : first + len(lines)].tolist())))
            first += len(lines)
        source.seek(loop.rows_end)
        tail = source.read()
        for file in files:
            file.write(tail)


def _label_line(loop: Loop, label: str) -> bytes:
    """Return the line of a new last label, in the layout of the others."""
    number = f" #{len(loop.labels) + 1}" if loop.numbered else ""
    return f"_{label}{number}".encode() + loop.label_tail


def _append(line: bytes, value: bytes) -> bytes:
    """Put `value` after the last token of a row, in RELION's layout where the row has it."""
    end = len(line)
    if b"#" in line:
        comment = next((m for m in TOKEN.finditer(line) if m[0].startswith(b"#")), None)
        end = comment.start() if comment else end
    if end == len(line):
        end = len(line.rstrip(b"\n"))
    body, tail = line[:end], line[end:]
    if body[-1:] in (b" ", b"\t"):
        return body + value.rjust(12) + b" " + tail
    return body + b" " + value + tail


def _overwrite(column: int) -> Callable[[bytes, bytes], bytes]:
    """Return a function that puts a value in place of the token in `column`."""

    def place(line: bytes, value: bytes) -> bytes:
        match = next(islice(TOKEN.finditer(line), column, None))
        return line[: match.start()] + value.rjust(len(match[0])) + line[match.end() :]

    return place

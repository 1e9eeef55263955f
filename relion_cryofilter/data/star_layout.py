"""The layout of a STAR file: where its loops stand and what their columns are called.

Files are streamed, so memory does not depend on the number of rows or their width. Lines are
looked at one by one but for megabytes in which there are rows and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from relion_cryofilter.errors import StarError

CHUNK_BYTES = 4 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NO_ROW = re.compile(rb"\n[^\S\n]*(?:\n|#|data_|loop_)")


def whole_lines(file: BinaryIO, n_bytes: float = float("inf")) -> Iterator[bytes]:
    """Yield the next `n_bytes` of an unbuffered file, or all of it, as chunks of whole lines."""
    rest = b""
    while n_bytes > 0 and (read := file.read(int(min(CHUNK_BYTES, n_bytes)))):
        n_bytes -= len(read)
        whole, newline, after = read.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = b""
        rest += after
    if rest:
        yield rest


@dataclass(frozen=True)
class Loop:
    """One ``loop_`` of a STAR file: where it stands and what its columns are called.

    Attributes
    ----------
    block
        Name of the data block, without ``data_``.
    labels
        Column labels without the leading underscore, in file order.
    numbered
        Whether the label lines carry ``#N``.
    label_tail
        What follows the last token of the last label line (spaces and newline).
    labels_end, rows_start, rows_end
        Byte offsets: past the last label line, at the first row, past the last row.
    first_line
        Line number (1-based) of the first row.
    n_rows
        Number of rows.
    fault
        Why RELION would not read this loop whole; None when it would.
    """

    block: str
    labels: tuple[str, ...]
    numbered: bool
    label_tail: bytes
    labels_end: int
    rows_start: int
    rows_end: int
    first_line: int
    n_rows: int
    fault: str | None


@dataclass(frozen=True)
class StarFile:
    """The layout of a STAR file: its loops and its single values."""

    path: Path
    loops: tuple[Loop, ...]
    pairs: Mapping[str, str]

    def loop(self, block: str) -> Loop | None:
        """Return the first loop of `block` (named without ``data_``), or None."""
        return next((loop for loop in self.loops if loop.block == block), None)


@dataclass
class _OpenLoop:
    """A loop whose end the scanner has not seen yet."""

    block: str
    labels: list[str] = field(default_factory=list)
    numbered: bool = False
    label_tail: bytes = b"\n"
    labels_end: int = 0
    rows_start: int = -1
    rows_end: int = -1
    first_line: int = 0
    n_rows: int = 0
    gap_line: int = 0
    cut_off: bool = False
    fault: str | None = None

    def closed(self) -> Loop:
        start = self.rows_start if self.n_rows else self.labels_end
        end = self.rows_end if self.n_rows else self.labels_end
        return Loop(
            self.block, tuple(self.labels), self.numbered, self.label_tail, self.labels_end,
            start, end, self.first_line, self.n_rows, self.fault,
        )  # fmt: skip


class _Scanner:
    """Reads the lines of a STAR file once and notes where its loops are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.block: str | None = None
        self.loops: list[_OpenLoop] = []
        self.loop: _OpenLoop | None = None
        self.pairs: dict[str, str] = {}
        self.offset = 0
        self.number = 0

    def scan(self, file: BinaryIO) -> StarFile:
        """Read `file` to its end."""
        for chunk in whole_lines(file):
            if not self._see_rows_only(chunk):
                self._see_lines(chunk.splitlines(keepends=True))
        if self.block is None:
            raise StarError(f"{self.path}: no data_ block found; is this a STAR file?")
        return StarFile(self.path, tuple(loop.closed() for loop in self.loops), self.pairs)

    def _see_rows_only(self, chunk: bytes) -> bool:
        """Count the rows of a chunk that is inside a loop and holds nothing else."""
        loop = self.loop
        if loop is None or not loop.n_rows or loop.gap_line:
            return False
        if b"\r" in chunk or _NO_ROW.search(b"\n" + chunk):
            return False
        n_rows = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
        loop.n_rows += n_rows
        self.number += n_rows
        self.offset += len(chunk)
        loop.rows_end = self.offset
        return True

    def _see_lines(self, lines: list[bytes]) -> None:
        for line in lines:
            self.number += 1
            if b"\r" in line:
                raise self.error(
                    "found a carriage return (a Windows line end), which RELION misreads",
                    f"Convert the file, e.g. dos2unix {self.path.name}",
                )
            text = line.removeprefix(_BYTE_ORDER_MARK).strip()
            if not text:
                self._see_blank()
            else:
                self._see_text(line, text)
            self.offset += len(line)

    def error(self, found: str, cure: str) -> StarError:
        """Return a StarError that names the file and the current line."""
        return StarError(f"{self.path}, line {self.number}: {found}. {cure}.")

    def _see_blank(self) -> None:
        if self.loop is not None and self.loop.n_rows and not self.loop.gap_line:
            self.loop.gap_line = self.number

    def _see_text(self, line: bytes, text: bytes) -> None:
        word = text.split(None, 1)[0]
        structure = word.startswith((b"#", b"data_")) or word == b"loop_"
        if structure and self.loop is not None:
            self._see_end(self.loop, word)
        if word.startswith(b"#"):
            return
        if word.startswith(b"data_"):
            self.block, self.loop = word[5:].decode(errors="replace"), None
        elif self.block is None:
            raise self.error("found text before the first data_ block", "Give a STAR file")
        elif word == b"loop_":
            self.loop = _OpenLoop(self.block, labels_end=self.offset + len(line))
            self.loops.append(self.loop)
        elif self.loop is not None and word.startswith(b"_") and not self.loop.n_rows:
            self._see_label(self.loop, line, text)
        elif self.loop is not None:
            self._see_row(self.loop, line)
        elif word.startswith(b"_"):
            value = text[len(word) :].strip()
            self.pairs[word[1:].decode(errors="replace")] = value.decode(errors="replace")

    def _see_end(self, loop: _OpenLoop, word: bytes) -> None:
        """Note a comment or a block right after the last row: RELION takes it for a row."""
        if loop.n_rows and not loop.gap_line:
            loop.gap_line = self.number
            loop.fault = (
                f"line {self.number}: {word.decode(errors='replace')!r} stands right after a row "
                f"of data_{loop.block}, and RELION takes it for one; put an empty line between"
            )

    def _see_label(self, loop: _OpenLoop, line: bytes, text: bytes) -> None:
        words = text.split()
        label = words[0][1:].decode(errors="replace")
        if "#" in label:
            raise self.error(f"the label _{label} is glued to its number",
                             "Put a space before the #")  # fmt: skip
        if label in loop.labels:
            loop.fault = f"line {self.number}: the label _{label} stands there twice"
        loop.labels.append(label)
        loop.numbered = len(words) > 1 and words[1].startswith(b"#")
        loop.label_tail = line[len(line.rstrip()) :]
        loop.labels_end = self.offset + len(line)

    def _see_row(self, loop: _OpenLoop, line: bytes) -> None:
        if loop.gap_line and not loop.cut_off:
            loop.cut_off = True
            loop.fault = (
                f"line {loop.gap_line}: a blank or # line inside the data, with rows after it "
                f"(line {self.number}); RELION stops reading there"
            )
        if not loop.n_rows:
            loop.rows_start, loop.first_line = self.offset, self.number
        loop.n_rows += 1
        loop.rows_end = self.offset + len(line)


def read_star(path: Path) -> StarFile:
    """Read the layout of a STAR file.

    Raises
    ------
    StarError
        The file is missing, not a STAR file, has CR LF line ends or a label glued to its number.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _Scanner(path).scan(file)
    except OSError as error:
        raise StarError(
            f"{path}: can't be read ({error.strerror}). Paths are relative to the working "
            f"directory, {Path.cwd()}."
        ) from error

"""STAR text as RELION reads it: blocks, labels, rows as bytes, column values.

Rows are bytes from the input to the output. They are never parsed into numbers and printed
again, because that changes them: ``2.500000e-07`` becomes ``0.000000``, ``0012`` becomes ``12``.
Files are streamed line by line, so memory does not depend on the number of rows or their width.

Reference: S. R. Hall, "The STAR File", J. Chem. Inf. Comput. Sci. 31, 326 (1991); the dialect is
the one that RELION 3.0 to 5 reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from relion_cryofilter.data.star_labels import IMAGE_DIMENSIONALITY, IMAGE_NAME
from relion_cryofilter.errors import StarError

TOKEN = re.compile(
    rb"""(?<!\S)(?:"(?:[^"]|"(?=\S))*"(?=\s|$)|'(?:[^']|'(?=\S))*'(?=\s|$)|\#.*|\S+)""", re.VERBOSE
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPECIAL = re.compile(rb"[\"'#]")
_TOMO_LABELS = ("rlnTomoParticleName", "rlnTomoParticleId", "rlnTomoVisibleFrames")
_OPTIMISATION_SET_LABELS = ("rlnTomoParticlesFile", "rlnTomoTomogramsFile")


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
        for line in file:
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
        if self.block is None:
            raise StarError(f"{self.path}: no data_ block found; is this a STAR file?")
        return StarFile(self.path, tuple(loop.closed() for loop in self.loops), self.pairs)

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
        with path.open("rb", buffering=1 << 20) as file:
            return _Scanner(path).scan(file)
    except OSError as error:
        raise StarError(
            f"{path}: can't be read ({error.strerror}). Paths are relative to the working "
            f"directory, {Path.cwd()}."
        ) from error


def particle_loop(star: StarFile) -> Loop:
    """Return the loop that holds the particles of `star`, as RELION would choose it.

    Raises
    ------
    StarError
        There is none or more than one, it is empty, RELION would not read it whole, or the file
        holds subtomograms.
    """
    _refuse_tomograms(star)
    loops = [loop for loop in star.loops if IMAGE_NAME in loop.labels and loop.block != "optics"]
    named = [loop for name in ("particles", "images") for loop in loops if loop.block == name]
    if not loops:
        raise StarError(f"{star.path}: no particles found. {_what_instead(star)}")
    if len(loops) > 1 and len(named) != 1:
        blocks = ", ".join(f"data_{loop.block}" for loop in loops)
        raise StarError(
            f"{star.path}: {len(loops)} loops hold _{IMAGE_NAME} ({blocks}); expected one, or one "
            "that is called data_particles. Split the file."
        )
    loop = named[0] if named else loops[0]
    for table in (star.loop("optics"), loop):
        if table is not None and table.fault:
            raise StarError(f"{star.path}, {table.fault}. Mend the file, then run this again.")
    if not loop.n_rows:
        raise StarError(f"{star.path}: data_{loop.block} has no rows, so there is nothing to do.")
    return loop


def _refuse_tomograms(star: StarFile) -> None:
    labels = {label for loop in star.loops for label in loop.labels} | set(star.pairs)
    cure = "This program scores single-particle images only."
    if any(label in labels for label in _OPTIMISATION_SET_LABELS):
        raise StarError(f"{star.path}: a tomography optimisation set, not particles. {cure}")
    stacks = star.pairs.get("rlnTomoSubTomosAre2DStacks", "0")
    if stacks.split()[:1] == ["1"] or any(label in labels for label in _TOMO_LABELS):
        raise StarError(f"{star.path}: holds subtomograms (a tomography file). {cure}")
    optics = star.loop("optics")
    if optics is None or IMAGE_DIMENSIONALITY not in optics.labels:
        return
    values = {value for (value,) in columns(star, optics, [IMAGE_DIMENSIONALITY])}
    if values & {"3", "3.0", "3.000000"}:
        raise StarError(
            f"{star.path}: {IMAGE_DIMENSIONALITY} is 3 in data_optics, so the images are "
            f"volumes. {cure}"
        )


def _what_instead(star: StarFile) -> str:
    if IMAGE_NAME in star.pairs:
        return f"_{IMAGE_NAME} is a single value there; expected a loop_ with one row a particle."
    blocks = ", ".join(f"data_{loop.block} ({loop.n_rows} rows)" for loop in star.loops)
    return (
        f"Expected a loop_ with _{IMAGE_NAME}; found {blocks or 'no loops'}. "
        "Give the particles.star of an Extract, Select, Class2D or Refine3D job."
    )


def tokens(line: bytes) -> list[bytes]:
    """Split one row into its values: quotes kept, a trailing ``# comment`` left out."""
    if not _SPECIAL.search(line):
        return line.split()
    words: list[bytes] = TOKEN.findall(line)
    return words[:-1] if words and words[-1].startswith(b"#") else words


def rows(star: StarFile, loop: Loop) -> Iterator[bytes]:
    """Yield the rows of `loop` as they stand in the file, newline included."""
    with star.path.open("rb", buffering=1 << 20) as file:
        file.seek(loop.rows_start)
        yield from islice(file, loop.n_rows)


def columns(star: StarFile, loop: Loop, labels: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the values of `labels` (all present) row by row, as unquoted text.

    Raises
    ------
    StarError
        A row has more or fewer values than the loop has labels.
    """
    wanted = [loop.labels.index(label) for label in labels]
    width = len(loop.labels)
    for number, line in enumerate(rows(star, loop), start=loop.first_line):
        words = tokens(line)
        if len(words) != width:
            raise StarError(
                f"{star.path}, line {number}: {len(words)} values, but data_{loop.block} has "
                f"{width} labels. Mend the line, or make the file again with the program that "
                "wrote it."
            )
        if _SPECIAL.search(line):
            _check_quotes(star, number, words)
        yield tuple([_unquoted(words[column]) for column in wanted])


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

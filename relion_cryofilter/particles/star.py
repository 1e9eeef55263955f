"""STAR text: where its tables stand, what their columns hold, and copies of it, byte for byte.

A particle file is refused, with file, line and cure, for these reasons and no others:

1. It can't be read, is no regular file, is no STAR file (see `signatures`; a line of more than a
   megabyte, a hundred thousand tables), or has text before its first ``data_`` block.
2. It has a carriage return (a Windows line end), or a label glued to its number.
3. No loop has rlnImageName, several have and none or both are named ``particles`` or ``images``,
   or the loop has no rows.
4. It holds subtomograms, volumes, or a tomography optimisation set.
5. RELION would not read its particles or optics whole: a blank or ``#`` line between rows, a
   comment or block right after the last row, a label that stands there twice.
6. A row has more or fewer values than there are labels, or a quote that is not closed.
7. A value that is needed is none: an image name, an optics group, a class, a score.

Reasons 1 and 2 are found by `read_star`, 3 to 5 by `particle_loop`, 6 and 7 where columns are read.
Rows are bytes throughout and pass in chunks, so memory does not grow with the file. The package
starfile is not used for them: a million rows of 30 columns take it 40 s and 3.5 GB (here 5 to 8 s,
with three files written), and it changes the text of 18 % of the values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from relion_cryofilter.errors import StarError, bounded
from relion_cryofilter.files import SCORE_LABEL, remove, replacing
from relion_cryofilter.inputs import Identity, identity_of, reading
from relion_cryofilter.particles.poses import views_of_angles
from relion_cryofilter.particles.signatures import STAR
from relion_cryofilter.particles.stacks import kind_of_file

IMAGE_NAME = "rlnImageName"
MICROGRAPH_NAME = "rlnMicrographName"
OPTICS_GROUP = "rlnOpticsGroup"
ANGLES = ("rlnAngleRot", "rlnAngleTilt")
IMAGE_PIXEL_SIZE = "rlnImagePixelSize"
IMAGE_SIZE = "rlnImageSize"
IMAGE_DIMENSIONALITY = "rlnImageDimensionality"
CLASS_NUMBER = "rlnClassNumber"
COORDINATES = ("rlnCoordinateX", "rlnCoordinateY")
DEFOCUS = ("rlnDefocusU", "rlnDefocusV")
CTF_MAX_RESOLUTION = "rlnCtfMaxResolution"
AUTOPICK_FIGURE_OF_MERIT = "rlnAutopickFigureOfMerit"
_OPTIMISATION_SET_LABELS = {"rlnTomoParticlesFile", "rlnTomoTomogramsFile"}
_TOMO_LABELS = {
    "rlnTomoParticleName", "rlnTomoParticleId", "rlnTomoVisibleFrames",
    "rlnCtfImage", "rlnCoordinateZ",  # of RELION 3, Warp and their like
}  # fmt: skip

CHUNK_BYTES = 4 << 20  # most bytes that are read at once
_LONGEST_LINE = 1 << 20  # bytes
_MOST_TABLES, _MOST_LABELS = 100_000, 2_000
_WORD = re.compile(rb"\S+")
_SPECIAL = re.compile(rb"[\"'#]")
_CLOSING = {b'"': re.compile(rb'"(?!\S)'), b"'": re.compile(rb"'(?!\S)")}
_NO_ROW = re.compile(rb"\n[^\S\n]*(?:\n|#|data_|loop_)")
_QUOTES = (b'"', b"'")
_ROW_END = b"\0"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def whole_lines(file: BinaryIO, n_bytes: float = float("inf")) -> Iterator[bytes]:
    """Yield the next `n_bytes` of an unbuffered file, or all of it, as chunks of whole lines.

    A line of more than a megabyte is a StarError.
    """
    rest = b""
    while n_bytes > 0 and (read := file.read(int(min(CHUNK_BYTES, n_bytes)))):
        n_bytes -= len(read)
        whole, newline, after = read.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = b""
        rest += after
        cure = "Is this a STAR file?"
        bounded(len(rest), 0, _LONGEST_LINE, f"{file.name}: the length of a line", cure, StarError)
    if rest:
        yield rest


def spans(line: bytes) -> Iterator[tuple[int, int]]:
    """Return where the values of one row begin and end, quotes included, and then its comment.

    ``"``, ``'`` and ``#`` count where a value begins, a closing quote where a value ends. Without
    a closing quote an opening one is part of a word. Takes time in proportion to the line.
    """
    if _SPECIAL.search(line):
        return _quoted_spans(line)
    return map(re.Match.span, _WORD.finditer(line))


def _quoted_spans(line: bytes) -> Iterator[tuple[int, int]]:
    word, open_ended = _WORD.search(line), set[bytes]()
    while word:
        start, end = word.span()
        mark = line[start : start + 1]
        if mark == b"#":
            yield start, len(line.rstrip(b"\n"))
            return
        if mark in _CLOSING and mark not in open_ended:
            closing = _CLOSING[mark].search(line, start + 1)
            if closing:
                end = closing.end()
            else:
                open_ended.add(mark)
        yield start, end
        word = _WORD.search(line, end)


def tokens(line: bytes) -> list[bytes]:
    """Split one row into its values: quotes kept, a trailing ``# comment`` left out."""
    if not _SPECIAL.search(line):
        return line.split()
    words = [line[start:end] for start, end in spans(line)]
    return words[:-1] if words and words[-1].startswith(b"#") else words


@dataclass
class Loop:
    """One ``loop_`` of a STAR file: its columns, and copies of the file with some of its rows.

    It is filled while `read_star` scans the file, and never changed afterwards.

    Attributes
    ----------
    path, block
        The file, and the name of the data block without ``data_``.
    labels
        Column labels without the leading underscore, in file order.
    numbered, label_tail
        Whether the label lines carry ``#N``, and what follows the last token of the last one.
    labels_end, rows_start, rows_end
        Byte offsets: past the last label line, at the first row, past the last row.
    first_line, n_rows
        Line number (1-based) of the first row, and the number of rows.
    fault
        Why RELION would not read this loop whole; None when it would.
    identity
        Of the file when it was scanned; a file that is another one later is refused.
    """

    suffix: ClassVar[str] = ".star"  # end of the names of files like this one
    path: Path
    block: str
    labels: tuple[str, ...] = ()
    numbered: bool = False
    label_tail: bytes = b"\n"
    labels_end: int = 0
    rows_start: int = 0
    rows_end: int = 0
    first_line: int = 0
    n_rows: int = 0
    fault: str | None = None
    identity: Identity | None = field(default=None, compare=False)

    def place(self, row: int) -> str:
        """Return file, row and line of the 0-based `row`, for messages."""
        return f"{self.path}, row {row + 1} (line {self.first_line + row})"

    def chunks(self) -> Iterator[bytes]:
        """Yield the rows, whole lines, a few megabytes at a time."""
        with reading(self.path, self.identity) as file:
            file.seek(self.rows_start)
            yield from whole_lines(file, self.rows_end - self.rows_start)

    def columns(self, labels: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Yield the values of `labels` (all present) row by row, as unquoted text."""
        for chunk in self.column_chunks(labels):
            yield from zip(*chunk)

    def column_chunks(self, labels: Sequence[str]) -> Iterator[list[list[str]]]:
        """Yield as `columns`, but for thousands of rows at once a list of values for each label.

        What is no row is a StarError, for reason 6 of this module.
        """
        wanted = [self.labels.index(label) for label in labels]
        width, line = len(self.labels), self.first_line
        for chunk in self.chunks():
            # Without quotes or comments the chunk is split at once, with a mark after each row;
            # it counts if every row has its mark where it should be.
            if not any(mark in chunk for mark in (*_QUOTES, b"#", _ROW_END)):
                n_rows = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
                lines = chunk.removesuffix(b"\n") + b"\n"
                words = lines.replace(b"\n", b" %b " % _ROW_END).split()
                ends = words[width :: width + 1]
                if len(words) == n_rows * (width + 1) and ends.count(_ROW_END) == n_rows:
                    columns = (b"\n".join(words[column :: width + 1]) for column in wanted)
                    yield [os.fsdecode(column).split("\n") for column in columns]
                    line += n_rows
                    continue
            # Otherwise row by row.
            rows = []
            for row in chunk.splitlines():
                words = tokens(row)
                if len(words) != width:
                    raise StarError(
                        f"{self.path}, line {line}: {len(words)} values, but data_{self.block} has "
                        f"{width} labels. Correct the line, or make the file again with the "
                        "program that wrote it."
                    )
                for place, word in enumerate(words):
                    if word[:1] in _QUOTES:
                        if len(word) < 2 or word[-1:] != word[:1]:
                            raise StarError(
                                f"{self.path}, line {line}: the quote of "
                                f"{word.decode(errors='replace')} is not closed, and RELION fails "
                                "on it. Correct the line."
                            )
                        words[place] = word[1:-1]
                rows.append(words)
                line += 1
            yield [[os.fsdecode(row[column]) for row in rows] for column in wanted]

    def numbers(self, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Return those of `labels` that there are, (n_rows,) float32, NaN where there is text."""
        present = [label for label in labels if label in self.labels]
        found = {label: np.empty(self.n_rows, np.float32) for label in present}
        first = 0
        for chunk in self.column_chunks(present) if present else ():
            for label, texts in zip(present, chunk):
                with np.errstate(over="ignore"):  # 1e300 is infinite
                    found[label][first : first + len(texts)] = _numbers(texts)
            first += len(chunk[0])
        return found

    def views(self) -> np.ndarray | None:
        """Return the directions (n_rows, 3) that particles are seen from, None without poses."""
        angles = self.numbers(ANGLES)
        return views_of_angles(*angles.values()) if len(angles) == len(ANGLES) else None

    def scores(self, label: str = SCORE_LABEL) -> np.ndarray:
        """Return the scores (n_rows,), 0 to 1, of a file that was scored; else reason 7."""
        missing = "Give the particles.star of a score job, or name the column with --score_label."
        return self._checked(label, missing, lambda x: (x >= 0) & (x <= 1), "a score from 0 to 1")

    def classes(self) -> np.ndarray:
        """Return rlnClassNumber, (n_rows,) int64; else reason 7."""
        missing = (
            "Give the _data.star of a Class2D or Class3D job, or a Select job's particles.star."
        )
        numbers = self._checked(
            CLASS_NUMBER, missing, lambda x: (x % 1 == 0) & (abs(x) < 2**31), "a number"
        )
        return numbers.astype(np.int64)

    def _checked(
        self, label: str, missing: str, good: Callable[[np.ndarray], np.ndarray], expected: str
    ) -> np.ndarray:
        """Return column `label`, (n_rows,) float64, in which all numbers must be `good`."""
        if label not in self.labels:
            raise StarError(f"{self.path}: has no column {label}. {missing}")
        numbers, first = np.empty(self.n_rows), 0
        for (texts,) in self.column_chunks([label]):
            part = numbers[first : first + len(texts)] = _numbers(texts)
            with np.errstate(invalid="ignore"):
                bad = np.flatnonzero(~good(part))
            if len(bad):
                raise StarError(
                    f"{self.place(first + int(bad[0]))}: {label} is {texts[bad[0]]!r}; expected "
                    f"{expected}."
                )
            first += len(texts)
        return numbers

    def write(
        self,
        subsets: Mapping[Path, np.ndarray],
        scores: np.ndarray | None = None,
        label: str = SCORE_LABEL,
    ) -> None:
        """Write copies of the file with the rows of each mask (n_rows,), and with scores (n_rows,).

        Each row keeps its bytes. A score is appended as RELION's own ``--add_column`` would, or
        put in place of the old one where the column `label` is there already; it has six decimals.
        All other blocks are copied. The files appear together, when all of them are complete.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(replacing(path)) for path in subsets]
            source = stack.enter_context(reading(self.path, self.identity, buffering=1 << 20))
            # Everything before the rows, with a new last label in the layout of the others.
            head = source.read(self.labels_end)
            if scores is not None and label not in self.labels:
                number = f" #{len(self.labels) + 1}" if self.numbered else ""
                head += f"_{label}{number}".encode() + self.label_tail
            head += source.read(self.rows_start - self.labels_end)
            for file in files:
                file.write(head)
            # The rows.
            first = 0
            for chunk in self.chunks():
                lines = chunk.splitlines(keepends=True)
                part = slice(first, first + len(lines))
                first += len(lines)
                if scores is not None:
                    lines = self._scored(lines, scores[part].tolist(), label)
                for file, mask in zip(files, subsets.values()):
                    file.write(b"".join(compress(lines, mask[part].tolist())))
            # Everything after the rows.
            source.seek(self.rows_end)
            tail = source.read()
            for file in files:
                file.write(tail)

    def _scored(self, lines: list[bytes], scores: list[float], label: str) -> list[bytes]:
        """Return rows with their scores in the column `label`."""
        # Rows that end like RELION's get their number without a closer look.
        plain = all(line[-2:] == b" \n" and b"#" not in line for line in lines)
        if plain and label not in self.labels:
            return [line[:-1] + b"%12.6f \n" % score for line, score in zip(lines, scores)]
        scored = []
        column = self.labels.index(label) if label in self.labels else 0
        bare = re.compile(rb"\s*(?:\S+\s+){%d}(\S+)" % column)
        for line, score in zip(lines, scores):
            value = b"%.6f" % score
            # In place of the old score.
            if label in self.labels:
                match = None if _SPECIAL.search(line) else bare.match(line)
                start, end = match.span(1) if match else next(islice(spans(line), column, None))
                scored.append(line[:start] + value.rjust(end - start) + line[end:])
                continue
            # After the last value, and in RELION's layout where the row has it.
            end = len(line.rstrip(b"\n"))
            if b"#" in line:
                comments = (start for start, _ in spans(line) if line[start : start + 1] == b"#")
                end = next(comments, end)
            new = value.rjust(12) + b" " if line[end - 1 : end] in (b" ", b"\t") else b" " + value
            scored.append(line[:end] + new + line[end:])
        return scored

    def remove(self, path: Path) -> None:
        """Remove what an earlier `write` made of `path`."""
        remove(path)


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """Return texts as (n,) float64, NaN for those that are no numbers."""
    with suppress(ValueError):  # a text among the numbers: each is tried by itself
        return np.array(texts, np.float64)
    numbers = np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        with suppress(ValueError):
            numbers[row] = float(text)
    return numbers


@dataclass
class OneRow(Loop):
    """A block of single values, which is a table of one row: its `values` by label."""

    values: Mapping[str, str] = field(default_factory=dict)

    def column_chunks(self, labels: Sequence[str]) -> Iterator[list[list[str]]]:
        """Yield the one row."""
        yield [[self.values[label]] for label in labels]


@dataclass(frozen=True)
class StarFile:
    """The layout of a STAR file: its loops, and its single values by block and label."""

    path: Path
    loops: tuple[Loop, ...]
    lists: Mapping[str, Mapping[str, str]]

    @property
    def pairs(self) -> Mapping[str, str]:
        """The single values of all blocks by label."""
        return {label: text for values in self.lists.values() for label, text in values.items()}

    def loop(self, block: str) -> Loop | None:
        """Return the first loop of `block` (named without ``data_``), or its single values."""
        found = next((loop for loop in self.loops if loop.block == block), None)
        if found is None and (values := self.lists.get(block)):
            return OneRow(self.path, block, tuple(values), n_rows=1, values=values)
        return found


def read_star(path: Path) -> StarFile:
    """Read the layout of a STAR file; a StarError for reasons 1 and 2 of this module."""
    kind = kind_of_file(path)
    if kind not in (None, STAR):
        raise StarError(f"{path}: expected a STAR file, but this is {kind}")
    scanner = _Scanner(path)
    try:
        with reading(path) as file:
            scanner.identity = identity_of(os.fstat(file.fileno()))
            for chunk in whole_lines(file):
                scanner.scan(chunk)
    except OSError as error:
        raise StarError(
            f"{path}: can't be read ({error.strerror}). Paths are relative to the working "
            f"directory, {Path.cwd()}."
        ) from error
    if scanner.block is None:
        raise StarError(f"{path}: no data_ block found; is this a STAR file?")
    return StarFile(path, tuple(scanner.loops), scanner.lists)


@dataclass
class _Scanner:
    """Sees the lines of a STAR file once and notes where its loops are."""

    path: Path
    identity: Identity | None = field(default=None, compare=False)
    block: str | None = None
    loops: list[Loop] = field(default_factory=list)
    lists: dict[str, dict[str, str]] = field(default_factory=dict)
    n_values: int = 0  # in the lists
    loop: Loop | None = None  # the last one, until the next block begins
    gap_line: int = 0  # of the first blank or comment after the loop's rows
    offset: int = 0  # of the current line
    number: int = 0  # of the current line, from 1

    def scan(self, chunk: bytes) -> None:
        """Note what the next whole lines hold."""
        # Among a loop's rows, a chunk that holds nothing else is only counted.
        loop = self.loop
        within = loop is not None and loop.n_rows and not self.gap_line
        if loop and within and b"\r" not in chunk and not _NO_ROW.search(b"\n" + chunk):
            n_rows = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
            loop.n_rows += n_rows
            self.number += n_rows
            self.offset = loop.rows_end = self.offset + len(chunk)
            return
        for line in chunk.splitlines(keepends=True):
            self.number += 1
            if b"\r" in line:
                raise self.error(
                    "found a carriage return (a Windows line end), which RELION misreads",
                    f"Convert the file, e.g. dos2unix {self.path.name}",
                )
            if text := line.removeprefix(_BYTE_ORDER_MARK).strip():
                self.scan_text(line, text)
            elif self.loop is not None and self.loop.n_rows:
                self.gap_line = self.gap_line or self.number
            self.offset += len(line)

    def error(self, found: str, cure: str) -> StarError:
        """Return a StarError that names the file and the current line."""
        return StarError(f"{self.path}, line {self.number}: {found}. {cure}.")

    def judge(self, count: int, most: int, what: str) -> None:
        """Raise a StarError where there is more of something than a STAR file has."""
        where = f"{self.path}, line {self.number}: {what}"
        bounded(count, 0, most, where, "Is this a STAR file?", StarError)

    def scan_text(self, line: bytes, text: bytes) -> None:
        """Note a line that is not blank; `text` is what stands in it."""
        word, loop, end = text.split(None, 1)[0], self.loop, self.offset + len(line)
        structure = word.startswith((b"#", b"data_")) or word == b"loop_"
        if structure and loop is not None and loop.n_rows and not self.gap_line:
            self.gap_line = self.number
            loop.fault = (
                f"line {self.number}: {word.decode(errors='replace')!r} stands right after a row "
                f"of data_{loop.block}, and RELION takes it for one; put an empty line between"
            )
        if word.startswith(b"#"):
            return
        if word.startswith(b"data_"):
            self.block, self.loop = word[5:].decode(errors="replace"), None
        elif self.block is None:
            raise self.error("found text before the first data_ block", "Give a STAR file")
        elif word == b"loop_":
            self.loop = Loop(
                self.path, self.block, (), False, b"\n", end, end, end, identity=self.identity
            )
            self.loops.append(self.loop)
            self.judge(len(self.loops), _MOST_TABLES, "the number of tables")
            self.gap_line = 0
        elif loop is not None and word.startswith(b"_") and not loop.n_rows:
            words = text.split()
            label = words[0][1:].decode(errors="replace")
            if "#" in label:
                found = f"the label _{label} is glued to its number"
                raise self.error(found, "Put a space before the #")
            if label in loop.labels:
                loop.fault = f"line {self.number}: the label _{label} stands there twice"
            loop.labels = (*loop.labels, label)
            self.judge(len(loop.labels), _MOST_LABELS, "the number of labels")
            loop.numbered = len(words) > 1 and words[1].startswith(b"#")
            loop.label_tail = line[len(line.rstrip()) :]
            loop.labels_end = loop.rows_start = loop.rows_end = end
        elif loop is not None:
            if self.gap_line > 0:
                loop.fault = (
                    f"line {self.gap_line}: a blank or # line inside the data, with rows after it "
                    f"(line {self.number}); RELION stops reading there"
                )
                self.gap_line = -1  # reported once
            if not loop.n_rows:
                loop.rows_start, loop.first_line = self.offset, self.number
            loop.n_rows += 1
            loop.rows_end = end
        elif word.startswith(b"_"):
            _, *values = tokens(text)
            value = os.fsdecode(values[0]) if values else ""
            if value[:1] in ('"', "'") and value[-1:] == value[:1] and len(value) > 1:
                value = value[1:-1]
            block = self.lists.setdefault(self.block, {})
            block[word[1:].decode(errors="replace")] = value
            self.n_values += 1
            self.judge(self.n_values, _MOST_TABLES, "the number of values")


def particle_loop(star: StarFile) -> Loop:
    """Return the particles' loop, as RELION would choose it; a StarError for reasons 3 to 5."""
    # Tomography: an optimisation set, subtomograms, or volumes.
    labels = {label for loop in star.loops for label in loop.labels} | set(star.pairs)
    cure = "This program scores single-particle images only."
    if labels & _OPTIMISATION_SET_LABELS:
        raise StarError(f"{star.path}: a tomography optimisation set, not particles. {cure}")
    stacks = star.pairs.get("rlnTomoSubTomosAre2DStacks", "0")
    if stacks.split()[:1] == ["1"] or labels & _TOMO_LABELS:
        raise StarError(f"{star.path}: holds subtomograms (a tomography file). {cure}")
    optics = star.loop("optics")
    if optics and 3 in optics.numbers([IMAGE_DIMENSIONALITY]).get(IMAGE_DIMENSIONALITY, ()):
        raise StarError(
            f"{star.path}: {IMAGE_DIMENSIONALITY} is 3 in data_optics, so the images are "
            f"volumes. {cure}"
        )
    # One loop with images; among several the one that is named as RELION names it.
    loops = [loop for loop in star.loops if IMAGE_NAME in loop.labels and loop.block != "optics"]
    named = [loop for loop in loops if loop.block in ("particles", "images")]
    if not loops and IMAGE_NAME in star.pairs:
        raise StarError(
            f"{star.path}: no particles found. _{IMAGE_NAME} is a single value there; expected a "
            "loop_ with one row a particle."
        )
    if not loops:
        blocks = ", ".join(f"data_{loop.block} ({loop.n_rows} rows)" for loop in star.loops)
        raise StarError(
            f"{star.path}: no particles found. Expected a loop_ with _{IMAGE_NAME}; found "
            f"{blocks or 'no loops'}. Give the particles.star of an Extract, Select, Class2D or "
            "Refine3D job."
        )
    if len(loops) > 1 and len(named) != 1:
        blocks = ", ".join(f"data_{loop.block}" for loop in loops)
        raise StarError(
            f"{star.path}: {len(loops)} loops hold _{IMAGE_NAME} ({blocks}); expected one, or one "
            "that is called data_particles. Split the file."
        )
    # It must have rows, and RELION must read all of them and of the optics.
    loop = named[0] if named else loops[0]
    for table in (optics, loop):
        if table is not None and table.fault:
            raise StarError(f"{star.path}, {table.fault}. Correct the file, then run this again.")
    if not loop.n_rows:
        raise StarError(f"{star.path}: data_{loop.block} has no rows, so there is nothing to do.")
    return loop

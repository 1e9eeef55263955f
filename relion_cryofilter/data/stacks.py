"""The image reader: MRC stacks of any mode, read in stack order, in batches of bounded memory.

MRC2014 format: A. Cheng et al., J. Struct. Biol. 192, 146 (2015). Modes read: 0 (int8),
1 (int16), 2 (float32), 6 (uint16), 12 (float16); either byte order; any extended header. As in
RELION, the third dimension counts images whatever the header says about volumes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import ImageError

HEADER_BYTES = 1024
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_MAX_BOX_PX = 65536
_MAX_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class StackHeader:
    """What is needed of an MRC header.

    Attributes
    ----------
    n_images, ny, nx
        Number of images and their size in pixels.
    dtype
        Type of the stored values, byte order included.
    data_offset
        Bytes before the first image.
    n_complete
        Number of images that the file is long enough to hold.
    pixel_size_angstrom
        Å/px; None where the header says 0 or 1, which writers use for "not known".
    inverted
        Whether protein is dark in the images, so that they are to be turned over.
    """

    path: Path
    n_images: int
    ny: int
    nx: int
    dtype: np.dtype
    data_offset: int
    n_complete: int
    pixel_size_angstrom: float | None
    inverted: bool = False

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in the file."""
        return self.ny * self.nx * self.dtype.itemsize


def read_header(path: Path) -> StackHeader:
    """Read the header of an MRC stack.

    Raises
    ------
    ImageError
        The file is missing, not MRC, or of a mode that holds no real images.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ImageError(
            f"{path}: can't be read ({error.strerror}). Run this in the RELION project folder, "
            f"or check that the stack was not moved (working directory: {Path.cwd()})."
        ) from error
    order = _byte_order(raw)
    if order is None:
        raise ImageError(
            f"{path}: not an MRC stack (no sensible MRC header in its first {HEADER_BYTES} "
            "bytes). Check the file, or extract it again."
        )
    words = np.frombuffer(raw, order + "i4", 25)
    nx, ny, nz, mode = (int(word) for word in words[:4])
    if mode not in MODES:
        raise ImageError(
            f"{path}: MRC mode {mode}; expected one of {', '.join(map(str, MODES))}. "
            "Convert it, e.g. with relion_image_handler."
        )
    dtype = np.dtype(order + MODES[mode])
    offset = HEADER_BYTES + int(words[23])
    complete = max(0, size - offset) // (ny * nx * dtype.itemsize)
    cell_x = float(np.frombuffer(raw, order + "f4", 1, 40)[0])
    pixel_size = cell_x / int(words[7]) if words[7] > 0 else 0.0
    known = pixel_size > 0 and pixel_size != 1.0 and np.isfinite(pixel_size)
    return StackHeader(
        path, nz, ny, nx, dtype, offset, min(nz, complete), pixel_size if known else None
    )


def _byte_order(raw: bytes) -> str | None:
    """Return "<" or ">", the order in which the header makes sense, its machine stamp first."""
    if len(raw) < HEADER_BYTES:
        return None
    stamped_big = raw[212:214] == b"\x11\x11"
    for order in (">", "<") if stamped_big else ("<", ">"):
        words = np.frombuffer(raw, order + "i4", 24)
        nx, ny, nz, mode, extended = (int(words[i]) for i in (0, 1, 2, 3, 23))
        sizes = 0 < nx <= _MAX_BOX_PX and 0 < ny <= _MAX_BOX_PX and nz > 0
        if sizes and 0 <= mode <= 101 and extended >= 0:
            return order
    return None


@dataclass(frozen=True)
class Run:
    """Images that follow each other in one stack: `count` from the 0-based `first`."""

    stack: StackHeader
    first: int
    count: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch to read: the input rows it serves and the runs that hold their images.

    All images of a batch have one size, one stored type and one contrast.
    """

    rows: np.ndarray
    runs: tuple[Run, ...]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(n, ny, nx) of the batch."""
        stack = self.runs[0].stack
        return len(self.rows), stack.ny, stack.nx


def plan_batches(
    rows: np.ndarray,
    stack_of: np.ndarray,
    index: np.ndarray,
    headers: Sequence[StackHeader | None],
    batch_size: int,
) -> Iterator[BatchPlan]:
    """Share out `rows` into batches in the order of the disk: by image size, stack and place.

    Parameters
    ----------
    rows
        (m,) the rows to read.
    stack_of, index
        (n,) for every row of the particle set, its stack and its 0-based place there.
    headers
        The header of each stack; None only where no row of `rows` uses it.
    batch_size
        Most images in a batch.
    """
    kinds = [(h.ny, h.nx, h.dtype.str, h.inverted) if h else (0, 0, "", False) for h in headers]
    numbers = {kind: number for number, kind in enumerate(sorted(set(kinds)))}
    kind_of_stack = np.array([numbers[kind] for kind in kinds], np.int32)
    order = np.lexsort((index[rows], stack_of[rows], kind_of_stack[stack_of[rows]]))
    rows = rows[order]
    kind_of_row = kind_of_stack[stack_of[rows]]
    edges = np.flatnonzero(np.diff(kind_of_row)) + 1
    for part in np.split(rows, edges):
        for start in range(0, len(part), batch_size):
            batch = part[start : start + batch_size]
            yield BatchPlan(batch, tuple(_runs(batch, stack_of, index, headers)))


def _runs(
    rows: np.ndarray,
    stack_of: np.ndarray,
    index: np.ndarray,
    headers: Sequence[StackHeader | None],
) -> Iterator[Run]:
    stacks, places = stack_of[rows], index[rows]
    edges = np.flatnonzero((np.diff(stacks) != 0) | (np.diff(places) != 1)) + 1
    for part in np.split(np.arange(len(rows)), edges):
        header = headers[stacks[part[0]]]
        if header is None:
            raise ValueError("a row without a readable stack was planned")
        yield Run(header, int(places[part[0]]), len(part))


def _plain_buffer(n_bytes: int) -> np.ndarray:
    return np.empty(n_bytes, np.uint8)


class StackReader:
    """Reads batches into one buffer that is used again and again: one reader a thread.

    Parameters
    ----------
    make_buffer
        Returns so many bytes, as (n,) uint8.
    """

    def __init__(self, make_buffer: Callable[[int], np.ndarray] = _plain_buffer) -> None:
        self._make_buffer = make_buffer
        self._buffer = make_buffer(0)

    def read(self, plan: BatchPlan) -> np.ndarray:
        """Read a batch.

        Returns
        -------
        numpy.ndarray
            (n, ny, nx) in native byte order: float32, float16, int8 or int16 as stored, uint16 as
            float32. Good until the next call. Images of inverted stacks are turned over (those of
            whole numbers as float32).

        Raises
        ------
        ImageError
            A stack became shorter or unreadable since its header was read.
        """
        dtype = plan.runs[0].stack.dtype
        n_bytes = int(np.prod(plan.shape)) * dtype.itemsize
        if len(self._buffer) < n_bytes:
            self._buffer = self._make_buffer(n_bytes)
        self._read_runs(plan.runs, self._buffer[:n_bytes].data)
        values = np.frombuffer(self._buffer, dtype, int(np.prod(plan.shape)))
        images = values.reshape(plan.shape)
        if not dtype.isnative:
            images = images.byteswap(inplace=True).view(dtype.newbyteorder("="))
        inverted = plan.runs[0].stack.inverted
        if dtype.kind == "u" or (inverted and dtype.kind == "i"):
            images = images.astype(np.float32)
        return np.negative(images, out=images) if inverted else images

    @staticmethod
    def _read_runs(runs: Sequence[Run], view: memoryview) -> None:
        start = 0
        for path, runs_of_stack in groupby(runs, key=lambda run: run.stack.path):
            try:
                with path.open("rb", buffering=0) as file:
                    for run in runs_of_stack:
                        size = run.count * run.stack.image_bytes
                        offset = run.stack.data_offset + run.first * run.stack.image_bytes
                        _read_fully(file.fileno(), view[start : start + size], offset, path)
                        start += size
            except OSError as error:
                raise ImageError(f"{path}: reading failed ({error.strerror}).") from error


def _read_fully(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view`; Linux gives at most 2 GiB a call and network disks often less."""
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done : done + _MAX_READ_BYTES]], offset + done)
        if got == 0:
            raise ImageError(f"{path}: became shorter while it was read. Is a job rewriting it?")
        done += got

"""The image reader: MRC stacks of any mode, read in stack order, in batches of bounded memory.

MRC2014 format: A. Cheng et al., J. Struct. Biol. 192, 146 (2015). Modes read: 0 (int8, or
uint8 where IMOD's flags or the header's maximum say so), 1 (int16), 2 (float32), 6 (uint16), 12
(float16); either byte order; any extended header. As in RELION, the third dimension counts images
whatever the header says about volumes, and neither the MAP stamp nor the machine stamp is needed.
A stack is refused for these reasons and no others:

1. It can't be read.
2. In neither byte order do its first 1024 bytes give sizes from 1 to 65536 px, images, a mode from
   0 to 101 and an extended header of no negative length.
3. Its mode holds no real images.

Images that a truncated stack does not hold are missed one by one (`StackHeader.n_complete`).

Headers are not read with ``mrcfile.open(header_only=True, permissive=True)``: version 1.5.4 takes
2 GB and 6.7 s for 2,000 bytes of junk (it fetches the extended header that they claim), reads int8
stacks of the other byte order without stamp as 1,073,741,824 px, and takes 110 µs a stack (here
14 µs). Tests have mrcfile write stacks that are read here.
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
from relion_cryofilter.inputs import Identity, open_input, seen
from relion_cryofilter.particles.signatures import (
    IMAGES,
    STAR,
    FileKind,
    first_bytes,
    kind_of_bytes,
)

HEADER_BYTES, STACK_SUFFIXES = 1024, (".mrcs", ".mrc", ".st")
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_MAX_BOX_PX = 65536
_MAX_READ_BYTES = 1 << 30
_IMOD_STAMP, _SIGNED_BYTES = 1146047817, 1  # and the bit of IMOD's flags
# Sizes in px, the cell's in px and its width in Å, the largest value, the space group, the bytes of
# the extended header, and IMOD's stamp and flags.
_HEADER = np.dtype({
    "names": ["nx", "ny", "nz", "mode", "mx", "mz", "cell_x", "largest", "space_group",
              "extended", "imod", "flags"],
    "formats": ["i4", "i4", "i4", "i4", "i4", "i4", "f4", "f4", "i4", "i4", "i4", "i4"],
    "offsets": [0, 4, 8, 12, 28, 36, 40, 80, 88, 92, 152, 156],
    "itemsize": HEADER_BYTES,
})  # fmt: skip


@dataclass(frozen=True)
class StackHeader:
    """What is needed of an MRC header."""

    path: Path
    n_images: int
    ny: int  # px
    nx: int
    dtype: np.dtype  # of the stored values, byte order included
    data_offset: int  # bytes before the first image
    n_complete: int  # images that the file is long enough to hold
    pixel_size_angstrom: float | None  # None where it says 0 or 1, which stand for "not known"
    inverted: bool = False  # protein is dark, so the images are contrast-inverted when read
    identity: Identity | None = None  # of the file when its header was read
    is_volume: bool = False  # the header says that all sections are one volume

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in the file."""
        return self.ny * self.nx * self.dtype.itemsize


def read_header(path: Path) -> StackHeader:
    """Read the header of an MRC stack; an ImageError for the reasons of this module."""
    try:
        with open_input(path) as file:
            raw = file.read(HEADER_BYTES)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise ImageError(
            f"{path}: can't be read ({error.strerror}). Run this in the RELION project folder, "
            f"or check that the stack was not moved (working directory: {Path.cwd()})."
        ) from error
    # The byte order in which the header makes sense, that of its machine stamp first.
    for order in (">", "<") if raw[212:214] == b"\x11\x11" else ("<", ">"):
        if len(raw) < HEADER_BYTES:
            continue
        header = np.frombuffer(raw, _HEADER.newbyteorder(order))[0]
        (nx, ny, nz, mode, mx, mz, cell_x, largest, space_group, extended, imod,
         flags) = header.item()  # fmt: skip
        sizes = 0 < nx <= _MAX_BOX_PX and 0 < ny <= _MAX_BOX_PX and nz > 0
        if sizes and 0 <= mode <= 101 and extended >= 0:
            break
    else:
        kind = kind_of_bytes(raw)
        found = f"it is {kind}" if kind else "Check the file, or extract it again."
        raise ImageError(
            f"{path}: not an MRC stack (no sensible MRC header in its first {HEADER_BYTES} "
            f"bytes){'; ' if kind else '. '}{found}"
        )
    if mode not in MODES:
        raise ImageError(
            f"{path}: MRC mode {mode}; expected one of {', '.join(map(str, MODES))}. "
            "Convert it, e.g. with relion_image_handler."
        )
    unsigned = 127 < largest <= 255 or (imod == _IMOD_STAMP and not flags & _SIGNED_BYTES)
    dtype = np.dtype(order + ("u1" if mode == 0 and unsigned else MODES[mode]))
    offset = HEADER_BYTES + extended
    complete = min(nz, max(0, status.st_size - offset) // (ny * nx * dtype.itemsize))
    pixel_size = cell_x / mx if mx > 0 else 0.0
    known = pixel_size > 0 and pixel_size != 1.0 and np.isfinite(pixel_size)
    return StackHeader(
        path, nz, ny, nx, dtype, offset, complete, pixel_size if known else None,
        identity=seen(path, status), is_volume=space_group != 0 and 1 < nz == mz,
    )  # fmt: skip


def kind_of_file(path: Path) -> FileKind | None:
    """Return what a file is by its first bytes; None for text that is no STAR file."""
    kind = kind_of_bytes(first_bytes(path))
    if kind in (None, STAR):
        return kind
    try:
        read_header(path)
    except ImageError as error:
        return IMAGES if ": MRC mode" in str(error) else kind
    return IMAGES


def is_stack(path: Path) -> bool:
    """Tell whether a file is a stack of images: by its first bytes, or, if they don't say, name."""
    kind = kind_of_file(path)
    return kind is IMAGES or (kind is None and path.suffix in STACK_SUFFIXES)


@dataclass(frozen=True)
class Run:
    """Images that follow each other in one stack: `count` from the 0-based `first`."""

    stack: StackHeader
    first: int
    count: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch, of one size, type and contrast: its rows, and the runs that hold their images."""

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
    """Yield batches of `rows` (m,) in the order of the disk: by image size, stack and place.

    `stack_of` and `index` (n,) are those of the particle set, `headers` those of its stacks; None
    only where no row of `rows` uses one.
    """
    kinds = [(h.ny, h.nx, h.dtype.str, h.inverted) if h else (0, 0, "", False) for h in headers]
    numbers = {kind: number for number, kind in enumerate(sorted(set(kinds)))}
    kind_of_stack = np.array([numbers[kind] for kind in kinds], np.int32)
    order = np.lexsort((index[rows], stack_of[rows], kind_of_stack[stack_of[rows]]))
    rows = rows[order]
    edges = np.flatnonzero(np.diff(kind_of_stack[stack_of[rows]])) + 1
    for part in np.split(rows, edges):
        for start in range(0, len(part), batch_size):
            batch = part[start : start + batch_size]
            # Images that follow each other in one stack are one run.
            stacks, places = stack_of[batch], index[batch]
            breaks = (np.diff(stacks) != 0) | (np.diff(places) != 1)
            runs = []
            for run in np.split(np.arange(len(batch)), np.flatnonzero(breaks) + 1):
                header = headers[stacks[run[0]]]
                if header is None:
                    raise ValueError("a row without a readable stack was planned")
                runs.append(Run(header, int(places[run[0]]), len(run)))
            yield BatchPlan(batch, tuple(runs))


class StackReader:
    """Reads batches into one buffer that is used again and again: one reader a thread.

    `make_buffer` returns so many bytes, as (n,) uint8.
    """

    def __init__(
        self, make_buffer: Callable[[int], np.ndarray] = lambda n: np.empty(n, np.uint8)
    ) -> None:
        self._make_buffer = make_buffer
        self._buffer = make_buffer(0)

    def read(self, plan: BatchPlan) -> np.ndarray:
        """Return the images of a batch (n, ny, nx), good until the next call.

        In native byte order, float32, float16, int8 or int16 as stored, others as float32. Images
        of inverted stacks have their contrast inverted (those of whole numbers as float32).

        Raises
        ------
        ImageError
            A stack became shorter or unreadable since its header was read.
        CryoFilterError
            A stack is another one than when its header was read.
        """
        dtype = plan.runs[0].stack.dtype
        n_bytes = int(np.prod(plan.shape)) * dtype.itemsize
        if len(self._buffer) < n_bytes:
            self._buffer = self._make_buffer(n_bytes)
        view, start = self._buffer[:n_bytes].data, 0
        for path, group in groupby(plan.runs, key=lambda run: run.stack.path):
            runs = list(group)
            try:
                with open_input(path, 0) as file:
                    for run in runs:
                        end = start + run.count * run.stack.image_bytes
                        offset = run.stack.data_offset + run.first * run.stack.image_bytes
                        _read_fully(file.fileno(), view[start:end], offset, path)
                        start = end
                    seen(path, os.fstat(file.fileno()), runs[0].stack.identity)
            except OSError as error:
                raise ImageError(f"{path}: reading failed ({error.strerror}).") from error
        images = np.frombuffer(self._buffer[:n_bytes], dtype).reshape(plan.shape)
        if not dtype.isnative:
            images = images.byteswap(inplace=True).view(dtype.newbyteorder("="))
        inverted = plan.runs[0].stack.inverted
        if dtype.kind == "u" or (inverted and dtype.kind == "i"):
            images = images.astype(np.float32)
        return np.negative(images, out=images) if inverted else images


def _read_fully(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view`; Linux gives at most 2 GiB a call and network disks often less."""
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done : done + _MAX_READ_BYTES]], offset + done)
        if got == 0:
            raise ImageError(f"{path}: became shorter while it was read. Is a job rewriting it?")
        done += got

"""Images × work → results: threads that read batches in disk order while others compute.

File reads and torch's operations release the interpreter lock, so reading, preprocessing and
inference of different batches overlap. Memory is bounded by the batches under way.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from relion_cryofilter.images.bad import CONSTANT, FLAT, NOT_FINITE, TOO_LARGE
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.stacks import BatchPlan, StackHeader, StackReader, plan_batches

BATCH_BYTES, LARGEST_BATCH = 32 * 2**20, 512
LARGEST_VALUE = 1e18  # of a pixel; the square of ten times that is no float32 number
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20
"""The most that glibc lets its heaps serve; larger blocks always come from the kernel."""

Result = TypeVar("Result")


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next operation; nothing to do on other systems.

    By default it gives blocks of some megabytes, such as the maps of one convolution, back to
    the kernel as soon as they are free, and each operation waits for zeroed pages again: a pass
    through a network of 2020 then takes up to twice as long.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def map_batches(
    work: Callable[[torch.Tensor], Result],
    particles: ParticleSet,
    rows: np.ndarray,
    headers: Sequence[StackHeader | None],
    *,
    threads: int = 1,
    batch_size: int | None = None,
    when_done: Callable[[np.ndarray, Result], None] = lambda rows, result: None,
    pinned: bool = False,
) -> Iterator[tuple[np.ndarray, Result]]:
    """Call `work` on the images of `rows`, batch by batch, in the order of the disk.

    Parameters
    ----------
    work
        Given images (m, ny, nx) as stored (float32, float16, int8 or int16), good during the
        call only. Runs in several threads.
    particles, rows, headers
        The particle set, the rows to read, and the header of each stack.
    threads
        Worker threads, each with one torch thread: on a busy machine two of those beat one with
        two. At most two batches a thread are under way.
    batch_size
        Images a batch; by default what fits into 32 MiB, at most 512.
    when_done
        Called with a batch's rows and result as soon as it is done, in the thread that did it.
    pinned
        Read into page-locked memory, from where GPUs fetch while they compute.

    Yields
    ------
    (rows, result)
        (m,) rows of a batch and what `work` made of it.
    """
    keep_freed_memory()
    if batch_size is None:
        largest = max((header.image_bytes for header in headers if header), default=1)
        batch_size = max(1, min(LARGEST_BATCH, BATCH_BYTES // largest))
    plans = plan_batches(rows, particles.stack_of, particles.index, headers, batch_size)
    own = threading.local()

    def run(plan: BatchPlan) -> tuple[np.ndarray, Result]:
        if not hasattr(own, "reader"):
            own.reader = StackReader(_pinned_buffer) if pinned else StackReader()
        result = work(torch.from_numpy(own.reader.read(plan)))
        when_done(plan.rows, result)
        return plan.rows, result

    waiting: deque[Future[tuple[np.ndarray, Result]]] = deque()
    with one_torch_thread(), ThreadPoolExecutor(threads, thread_name_prefix="batch") as pool:
        try:
            for plan in plans:
                waiting.append(pool.submit(run, plan))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _pinned_buffer(n_bytes: int) -> np.ndarray:
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy()


def find_faults(images: torch.Tensor, small: torch.Tensor) -> dict[str, list[int]]:
    """Return which of images (m, ny, nx) can't be used, by reason: their small ones are NaN."""
    faults: dict[str, list[int]] = {}
    for place in torch.isnan(small[:, 0, 0, 0]).nonzero().flatten().tolist():
        image = images[place].float()
        if not torch.isfinite(image).all():
            reason = NOT_FINITE
        else:
            reason = CONSTANT if image.min() == image.max() else FLAT
            if reason == FLAT and image.abs().max() > LARGEST_VALUE:
                reason = TOO_LARGE
        faults.setdefault(reason, []).append(place)
    return faults


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread a caller for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

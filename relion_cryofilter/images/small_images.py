"""The down-sampled images of a labelled set: in memory once, or read again when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from relion_cryofilter.images.bad import BadImages, check_stacks, say_unsigned
from relion_cryofilter.images.batches import find_faults, map_batches
from relion_cryofilter.images.contrast import SCALES, centre_contrast
from relion_cryofilter.images.preprocess import Preprocess
from relion_cryofilter.inputs import require_unchanged
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.stacks import StackHeader
from relion_cryofilter.progress import Progress

BACKGROUND_RADIUS = 0.75
"""Of half a box: RELION's Extract job takes the background outside this circle by default."""
STATISTICS = ("image mean", "image sigma", "background mean", "background sigma")


class SmallImages(Protocol):
    """Gives network input by row number."""

    where: str
    precision: str

    def get(self, rows: np.ndarray) -> Tensor:
        """Return (len(rows), c, dim, dim) float32, in the order of `rows`."""


@dataclass(frozen=True)
class Loaded:
    """What one pass over the n images of a particle set gives."""

    images: SmallImages
    statistics: Mapping[str, np.ndarray]  # (n,) each of `STATISTICS`, of the raw images
    contrast: np.ndarray  # (n, 3) of `centre_contrast`; NaN for images that can't be used
    boxes_px: np.ndarray  # (n,) box sizes; 0 where the stack can't be read
    bad: BadImages


def load_small_images(
    particles: ParticleSet,
    preprocess: Preprocess,
    progress: Progress,
    *,
    threads: int,
    max_memory_bytes: float,
) -> Loaded:
    """Read every image once; keep the small ones in memory if they fit.

    As float32 if that fits, else as float16 if that fits; else they are read and made again each
    time they are asked for. `progress` is told of every batch and may raise Aborted.
    """
    headers, bad = check_stacks(particles)
    say_unsigned(headers)
    rows = np.setdiff1d(np.arange(len(particles)), bad.rows, assume_unique=True)
    shape = (len(particles), preprocess.channels, preprocess.dim, preprocess.dim)
    sizes = {torch.float32: 4, torch.float16: 2}
    fitting = [kind for kind, n in sizes.items() if n * math.prod(shape) <= max_memory_bytes]
    kept = torch.zeros(shape, dtype=fitting[0]) if fitting else None
    statistics = {name: np.full(len(particles), np.nan) for name in STATISTICS}
    contrast = np.full((len(particles), len(SCALES)), np.nan)

    def reduce(images: Tensor) -> tuple[Tensor, list[np.ndarray], dict[str, list[int]]]:
        with torch.inference_mode():
            boxes = images.float()
            small = preprocess(boxes)
            outside = _background(boxes.shape[1], boxes.shape[2])
            sigma, mean = torch.std_mean(boxes, dim=(1, 2))
            background_sigma, background_mean = torch.std_mean(boxes[:, outside], dim=1)
            faults = find_faults(images, small)
            numbers = (mean, sigma, background_mean, background_sigma, centre_contrast(small))
        kept_small = small[:0] if kept is None else small
        return kept_small, [values.double().numpy() for values in numbers], faults

    for batch_rows, (small, numbers, faults) in map_batches(
        reduce, particles, rows, headers, threads=threads
    ):
        if kept is not None:
            kept[torch.from_numpy(batch_rows)] = small.to(kept.dtype)
        for column, values in zip((*statistics.values(), contrast), numbers):
            column[batch_rows] = values
        for reason, places in faults.items():
            bad.add(batch_rows[places], reason)
        progress.step(len(batch_rows))
    require_unchanged()
    boxes_px = np.array([header.nx if header else 0 for header in headers])[particles.stack_of]
    images: SmallImages = _Streamed(particles, preprocess, headers, threads)
    if kept is not None:
        images = InMemory(kept)
    return Loaded(images, statistics, contrast, boxes_px, bad)


def noise_images(box_px: int, n: int, seed: int = 0) -> Tensor:
    """Return (n, box, box) images of white noise, which no filter should accept."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, box_px, box_px), generator=generator)


def _background(ny: int, nx: int) -> Tensor:
    """Return which pixels (ny, nx) are outside the particle's circle."""
    y = torch.arange(ny)[:, None] - (ny - 1) / 2
    x = torch.arange(nx)[None] - (nx - 1) / 2
    return x**2 + y**2 > (BACKGROUND_RADIUS * min(ny, nx) / 2) ** 2


class InMemory:
    """Small images (n, c, dim, dim), float32 or float16."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        megabytes = images.numel() * images.element_size() / 1e6
        self.precision = str(images.dtype).removeprefix("torch.")
        self.where = f"{megabytes:,.0f} MB in memory as {self.precision}"

    def get(self, rows: np.ndarray) -> Tensor:
        """Return (len(rows), c, dim, dim) float32, in the order of `rows`."""
        return self._images[torch.from_numpy(rows)].float()


@dataclass(eq=False)
class _Streamed:
    particles: ParticleSet
    preprocess: Preprocess
    headers: Sequence[StackHeader | None]
    threads: int
    precision: str = "float32"
    where: str = "not kept in memory (over --max_memory); read again when needed"

    def get(self, rows: np.ndarray) -> Tensor:
        distinct, place = np.unique(rows, return_inverse=True)
        dim = self.preprocess.dim
        small = torch.empty((len(distinct), self.preprocess.channels, dim, dim))
        for batch_rows, part in map_batches(
            self._reduce, self.particles, distinct, self.headers, threads=self.threads
        ):
            small[torch.from_numpy(np.searchsorted(distinct, batch_rows))] = part
        return small[torch.from_numpy(place.reshape(-1))]

    def _reduce(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.preprocess(images.float())

"""The down-sampled images of a labelled set: in memory once, or read again when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from relion_cryofilter.data.bad_images import BadImages, check_stacks
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.stacks import StackHeader
from relion_cryofilter.nn.contrast import SCALES, centre_contrast
from relion_cryofilter.nn.pipeline import find_faults, map_batches
from relion_cryofilter.nn.preprocess import Preprocess
from relion_cryofilter.progress import Progress

BACKGROUND_RADIUS = 0.75
"""Of half a box: RELION's Extract job takes the background outside this circle by default."""


class SmallImages(Protocol):
    """Gives network input by row number."""

    where: str
    precision: str

    def get(self, rows: np.ndarray) -> torch.Tensor:
        """Return (len(rows), c, dim, dim) float32, in the order of `rows`."""


@dataclass(frozen=True)
class Loaded:
    """What one pass over the images of a particle set gives.

    Attributes
    ----------
    images
        The small images, by row.
    statistics
        (n,) each: mean and sigma of the raw images and of their background.
    contrast
        (n, 3) of `centre_contrast`; NaN for images that can't be used.
    boxes_px
        (n,) box size of each image; 0 where its stack can't be read.
    bad
        The images that can't be used.
    """

    images: SmallImages
    statistics: Mapping[str, np.ndarray]
    contrast: np.ndarray
    boxes_px: np.ndarray
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

    Parameters
    ----------
    particles
        n particles.
    preprocess
        Makes small images of raw boxes.
    progress
        Told of every batch; may raise Aborted.
    threads
        Worker threads.
    max_memory_bytes
        Small images are kept as float32 if that fits, else as float16 if that fits; else they
        are read and made again each time they are asked for.
    """
    headers, bad = check_stacks(particles)
    rows = np.setdiff1d(np.arange(len(particles)), bad.rows, assume_unique=True)
    shape = (len(particles), preprocess.channels, preprocess.dim, preprocess.dim)
    dtype = _fitting_type(shape, max_memory_bytes)
    kept = torch.zeros(shape, dtype=dtype) if dtype else None
    names = ("image mean", "image sigma", "background mean", "background sigma")
    statistics = {name: np.full(len(particles), np.nan) for name in names}
    contrast = np.full((len(particles), len(SCALES)), np.nan)
    work = _Reduction(preprocess, keep=kept is not None)
    for batch_rows, reduced in map_batches(work, particles, rows, headers, threads=threads):
        if kept is not None:
            kept[torch.from_numpy(batch_rows)] = reduced.small.to(kept.dtype)
        for name, values in zip(names, reduced.statistics):
            statistics[name][batch_rows] = values
        contrast[batch_rows] = reduced.contrast
        for reason, places in reduced.faults.items():
            bad.add(batch_rows[places], reason)
        progress.step(len(batch_rows))
    boxes = np.array([header.nx if header else 0 for header in headers])[particles.stack_of]
    if kept is None:
        images: SmallImages = _Streamed(particles, preprocess, headers, threads)
    else:
        images = InMemory(kept)
    return Loaded(images, statistics, contrast, boxes, bad)


def noise_images(box_px: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return (n, box, box) images of white noise, which no filter should accept."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, box_px, box_px), generator=generator)


def _fitting_type(shape: Sequence[int], max_bytes: float) -> torch.dtype | None:
    values = float(np.prod(shape))
    if 4 * values <= max_bytes:
        return torch.float32
    return torch.float16 if 2 * values <= max_bytes else None


@dataclass(frozen=True)
class _Reduced:
    small: torch.Tensor
    statistics: tuple[np.ndarray, ...]
    contrast: np.ndarray
    faults: dict[str, list[int]]


class _Reduction:
    """Makes small images and statistics of one batch."""

    def __init__(self, preprocess: Preprocess, keep: bool) -> None:
        self._preprocess, self._keep = preprocess, keep

    def __call__(self, images: torch.Tensor) -> _Reduced:
        with torch.inference_mode():
            boxes = images.float()
            small = self._preprocess(boxes)
            outside = _background(boxes.shape[1], boxes.shape[2])
            sigma, mean = torch.std_mean(boxes, dim=(1, 2))
            background_sigma, background_mean = torch.std_mean(boxes[:, outside], dim=1)
            faults = find_faults(images, small)
            contrast = centre_contrast(small).double().numpy()
        numbers = (mean, sigma, background_mean, background_sigma)
        statistics = tuple(values.double().numpy() for values in numbers)
        return _Reduced(small if self._keep else small[:0], statistics, contrast, faults)


def _background(ny: int, nx: int) -> torch.Tensor:
    y = torch.arange(ny)[:, None] - (ny - 1) / 2
    x = torch.arange(nx)[None] - (nx - 1) / 2
    return x**2 + y**2 > (BACKGROUND_RADIUS * min(ny, nx) / 2) ** 2


class InMemory:
    """Small images (n, c, dim, dim), float32 or float16."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images
        megabytes = images.numel() * images.element_size() / 1e6
        self.precision = str(images.dtype).removeprefix("torch.")
        self.where = f"{megabytes:,.0f} MB in memory as {self.precision}"

    def get(self, rows: np.ndarray) -> torch.Tensor:
        """Return (len(rows), c, dim, dim) float32, in the order of `rows`."""
        return self._images[torch.from_numpy(rows)].float()


class _Streamed:
    def __init__(
        self,
        particles: ParticleSet,
        preprocess: Preprocess,
        headers: Sequence[StackHeader | None],
        threads: int,
    ) -> None:
        self._particles, self._preprocess = particles, preprocess
        self._headers, self._threads = headers, threads
        self.precision = "float32"
        self.where = "not kept in memory (over --max_memory); read again when needed"

    def get(self, rows: np.ndarray) -> torch.Tensor:
        distinct, place = np.unique(rows, return_inverse=True)
        shape = (len(distinct), self._preprocess.channels, self._preprocess.dim)
        small = torch.empty((*shape, self._preprocess.dim))
        for batch_rows, part in map_batches(
            self._reduce, self._particles, distinct, self._headers, threads=self._threads
        ):
            small[torch.from_numpy(np.searchsorted(distinct, batch_rows))] = part
        return small[torch.from_numpy(place.reshape(-1))]

    def _reduce(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._preprocess(images.float())

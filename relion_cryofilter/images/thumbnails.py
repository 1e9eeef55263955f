"""Particle images as people look at them: low-passed, small, all with one contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.images.batches import map_batches
from relion_cryofilter.images.preprocess import fourier_crop_operator
from relion_cryofilter.particles.particles import ParticleSet

THUMBNAIL_PX, GREY_RANGE_SIGMA, LOW_PASS_ANGSTROM = 64, 3.0, 20.0
CYCLES_WITHOUT_SCALE, FEWEST_CYCLES = 10.0, 5.0
"""Low-pass in cycles a box: where the pixel size is unknown, and the strongest there is."""


def thumbnails(
    images: NDArray[np.floating[Any]], pixel_size_angstrom: float | None
) -> NDArray[np.uint8]:
    """Make small pictures (m, 64, 64) of images (m, ny, nx), or of the middle of oblong ones.

    The Fourier crop of the networks' input, to `THUMBNAIL_PX` and with a Gaussian low-pass (1/e of
    the amplitude at 20 Å, or at ten cycles a box where the pixel size is None), then grey from -3
    to +3 standard deviations of the picture: equal contrast for all.
    """
    # The middle square, about its mean.
    side = min(images.shape[1:])
    top, left = ((size - side) // 2 for size in images.shape[1:])
    square = images[:, top : top + side, left : left + side].astype(np.float64)
    square -= square.mean(axis=(1, 2), keepdims=True)
    # Shrunk and low-passed.
    cycles = CYCLES_WITHOUT_SCALE
    if pixel_size_angstrom:
        cycles = max(FEWEST_CYCLES, side * pixel_size_angstrom / LOW_PASS_ANGSTROM)
    operator = fourier_crop_operator(side, THUMBNAIL_PX, cycles)
    small = operator @ square @ operator.T
    # As grey levels; an image without contrast, but for rounding, is grey all over.
    sigma = small.std(axis=(1, 2), keepdims=True)
    rounding = 1e-9 * np.abs(images).max(axis=(1, 2), keepdims=True)
    grey = small / np.where(sigma > rounding, sigma, np.inf) / GREY_RANGE_SIGMA
    return np.round(127.5 + 127.5 * np.clip(grey, -1, 1)).astype(np.uint8)


def read_thumbnails(particles: ParticleSet, threads: int) -> NDArray[np.uint8]:
    """Read m particles as (m, 64, 64), each optics group with its pixel size.

    An image that is missing is an ImageError.
    """
    headers, bad = check_stacks(particles)
    bad.refuse("the images were there when they were first read")
    pictures = np.zeros((len(particles), THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    for number in np.unique(particles.optics_of):
        size = particles.optics[number].pixel_size_angstrom

        def shrink(images: Tensor, size: float | None = size) -> NDArray[np.uint8]:
            return thumbnails(images.float().numpy(), size)

        members = np.flatnonzero(particles.optics_of == number)
        for places, made in map_batches(
            shrink, particles, members, headers, threads=threads, batch_size=16
        ):
            pictures[places] = made
    return pictures


def sprite(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Return pictures (m, ny, nx) as one, side by side, row by row, `columns` in a row."""
    m, ny, nx = images.shape
    rows = max(1, -(-m // columns))
    grid = np.zeros((rows * columns, ny, nx), np.uint8)
    grid[:m] = images
    return grid.reshape(rows, columns, ny, nx).swapaxes(1, 2).reshape(rows * ny, columns * nx)

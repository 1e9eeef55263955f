"""Particle images as people look at them: low-passed, small, all with one contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

THUMBNAIL_PX = 64
LOW_PASS_ANGSTROM = 20.0
CYCLES_WITHOUT_SCALE = 10.0
FEWEST_CYCLES = 5.0
GREY_RANGE_SIGMA = 3.0


def thumbnails(
    images: NDArray[np.floating[Any]], pixel_size_angstrom: float | None
) -> NDArray[np.uint8]:
    """Make small pictures of particle images.

    A Fourier crop to `THUMBNAIL_PX` with a Gaussian low-pass (1/e of the amplitude at 20 Å, or at
    a tenth of the box where the pixel size is unknown), then grey from -3 to +3 standard deviations
    of the picture: equal contrast for all.

    Parameters
    ----------
    images
        (m, ny, nx); of an image that is not square the middle is shown.
    pixel_size_angstrom
        Å/px; None where it is unknown.

    Returns
    -------
    numpy.ndarray
        (m, 64, 64) uint8.
    """
    side = min(images.shape[1:])
    top, left = ((size - side) // 2 for size in images.shape[1:])
    square = images[:, top : top + side, left : left + side].astype(np.float64)
    square -= square.mean(axis=(1, 2), keepdims=True)
    small = _low_passed(square, _cycles(side, pixel_size_angstrom))
    sigma = small.std(axis=(1, 2), keepdims=True)
    grey = small / np.where(sigma > 0, sigma, 1) / GREY_RANGE_SIGMA
    return np.round(127.5 + 127.5 * np.clip(grey, -1, 1)).astype(np.uint8)


def _cycles(side: int, pixel_size_angstrom: float | None) -> float:
    """Return the low-pass frequency in cycles a box."""
    if not pixel_size_angstrom:
        return CYCLES_WITHOUT_SCALE
    return max(FEWEST_CYCLES, side * pixel_size_angstrom / LOW_PASS_ANGSTROM)


def _low_passed(square: NDArray[np.float64], cycles: float) -> NDArray[np.float64]:
    """Fourier crop (or pad) (m, side, side) images to (m, 64, 64), with a Gaussian low-pass."""
    side, target = square.shape[1], THUMBNAIL_PX
    kept = min(side, target)
    waves = np.fft.fftshift(np.fft.fft2(square), axes=(1, 2))
    out = np.zeros((len(square), target, target), complex)
    source, goal = side // 2 - kept // 2, target // 2 - kept // 2
    out[:, goal : goal + kept, goal : goal + kept] = waves[
        :, source : source + kept, source : source + kept
    ]
    frequency = np.arange(target) - target // 2
    distance2 = frequency[:, None] ** 2 + frequency[None] ** 2
    out *= np.exp(-distance2 / cycles**2)
    small: NDArray[np.float64] = np.fft.ifft2(np.fft.ifftshift(out, axes=(1, 2))).real
    return small


def sprite(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Return pictures (m, ny, nx) side by side in one, row by row, `columns` in each."""
    m, ny, nx = images.shape
    rows = max(1, -(-m // columns))
    grid = np.zeros((rows * columns, ny, nx), np.uint8)
    grid[:m] = images
    return grid.reshape(rows, columns, ny, nx).swapaxes(1, 2).reshape(rows * ny, columns * nx)

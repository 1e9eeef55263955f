"""Shrinking boxes with two small matrix products, ``A_y @ X @ A_x.T``.

The separable operator A of one axis depends only on the number of pixels before and after, so it
is made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import conv2d

Matrix = npt.NDArray[np.float64]

CHUNK_PIXELS, LARGEST_CHUNK, LINE_GROUPS = 2**20, 64, 16
"""Pixels, images and groups of lines that a processor shrinks at a time."""

BLUR_SIGMA_PX = 3.0
"""The 2020 program blurred every raw box by 3 raw pixels, whatever the box and pixel size."""


def shrink(
    images: Tensor, make: Callable[[int, int], Matrix], dim: int, dtype: torch.dtype
) -> Tensor:
    """Return A_y @ X @ A_x.T, float32 (n, dim, dim), of images X (n, ny, nx) of any type.

    Parameters
    ----------
    images
        (n, ny, nx).
    make
        Makes the operator A (dim, size) of one axis: one of the two below.
    dim
        Side of the small images in px.
    dtype
        Of the larger product: float32 or bfloat16.
    """
    if images.ndim != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (n, ny, nx)")
    _, ny, nx = images.shape
    rows = _operator(make, ny, dim, images.device)
    columns = _operator(make, nx, dim, images.device)
    work = _shrink_in_float32 if dtype == torch.float32 else _shrink_in_bfloat16
    if images.device.type != "cpu":
        return work(images, rows, columns)
    chunk = _chunk(ny, nx)
    parts = [
        work(filled_up(part, chunk), rows, columns)[: len(part)]
        for part in torch.split(images, chunk)
    ]
    return torch.cat(parts)


def _chunk(ny: int, nx: int) -> int:
    """Return how many images a processor shrinks at a time: always as many, see `filled_up`.

    Few enough for its caches; their lines can be dealt out to `LINE_GROUPS`.
    """
    least = LINE_GROUPS // math.gcd(LINE_GROUPS, ny)
    return least * max(1, min(LARGEST_CHUNK, CHUNK_PIXELS // (ny * nx)) // least)


def _shrink_in_float32(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    images = images.float()
    if images.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.matmul(rows, torch.matmul(images, columns.t()))
    # The first product as a convolution of 1 x 1 pixels whose channels are the columns: torch
    # gives those to oneDNN if there are 16 images or more, here groups of lines, and matrix
    # products to MKL, which takes twice as long on AMD's processors.
    n, ny, nx = images.shape
    pixels = images.reshape(LINE_GROUPS, -1, 1, nx).permute(0, 3, 1, 2)
    across = conv2d(pixels, columns[:, :, None, None]).permute(0, 2, 3, 1)
    return torch.matmul(rows, across.reshape(n, ny, -1))


def _shrink_in_bfloat16(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Do the larger product in bfloat16, about the mean of every eighth line.

    Few digits would be lost on an image whose mean is large; the operators' rows sum to one, so
    the mean can be put back.
    """
    n, ny, nx = images.shape
    mean = images[:, ::8].float().mean(dim=(1, 2), keepdim=True)
    centred = torch.empty(images.shape, dtype=torch.bfloat16, device=images.device)
    torch.sub(images, mean, out=centred)
    across = (centred.view(-1, nx) @ columns.to(torch.bfloat16).t()).view(n, ny, -1)
    return torch.matmul(rows, across.float()) + mean


def filled_up(batch: Tensor, size: int) -> Tensor:
    """Return `batch` with empty images up to `size`.

    The kernels that torch chooses depend on the number of images, and their rounding with them;
    with one size, an image's score doesn't depend on how many came with it.
    """
    if len(batch) == size:
        return batch
    return torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])


def blur_resize_operator(size: int, dim: int) -> Matrix:
    """Return the operator (dim, size) of one axis: blur, anti-aliasing blur, bilinear resize.

    Formulas of ``scipy.ndimage.gaussian_filter1d`` and ``zoom(order=1, grid_mode=True)`` as
    scikit-image 0.26 calls them: kernels cut at four sigma; edges repeated in the first blur
    and mirrored about the outermost pixels afterwards; anti-aliasing sigma (size / dim - 1) / 2.
    """
    last = size - 1
    blur = _gaussian_matrix(size, BLUR_SIGMA_PX, lambda index: np.clip(index, 0, last))
    centres = (np.arange(dim) + 0.5) * (size / dim) - 0.5
    below = np.floor(centres).astype(np.int64)
    share = centres - below
    linear = np.zeros((dim, size))
    np.add.at(linear, (np.arange(dim), _mirror(below, size)), 1 - share)
    np.add.at(linear, (np.arange(dim), _mirror(below + 1, size)), share)
    if size > dim:
        sigma = (size / dim - 1) / 2
        linear = linear @ _gaussian_matrix(size, sigma, lambda index: _mirror(index, size))
    return np.asarray(linear @ blur, dtype=np.float64)


def fourier_crop_operator(size: int, dim: int) -> Matrix:
    """Return the real operator (dim, size) that crops or pads one axis in Fourier space.

    Pixel j of a box sits at (j + 1/2) / size of its width, before and after, so the grids share
    their centre. Waves of up to half the smaller size pass with unit gain; at exactly that
    Nyquist frequency (even sizes) the two half-waves count half each. Rows sum to one, so the
    amplitude of low frequencies is kept.
    """
    kept = min(size, dim)
    waves = np.arange(kept // 2 + 1)
    weights = np.where((waves == 0) | (2 * waves == kept), 1.0, 2.0) / size
    old = 2 * np.pi * np.outer(waves, (np.arange(size) + 0.5) / size)
    new = 2 * np.pi * np.outer((np.arange(dim) + 0.5) / dim, waves)
    operator = (np.cos(new) * weights) @ np.cos(old) + (np.sin(new) * weights) @ np.sin(old)
    return np.asarray(operator, dtype=np.float64)


def _gaussian_matrix(size: int, sigma: float, wrap: Callable[..., Any]) -> Matrix:
    """Return the (size, size) matrix of a Gaussian blur cut at four sigma; `wrap` maps indices."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    rows = np.arange(size)[:, None]
    matrix = np.zeros((size, size))
    np.add.at(matrix, (rows, wrap(rows + offsets)), weights)
    return matrix


def _mirror(index: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Map indices beyond an axis back into it, mirrored about the outermost pixels."""
    period = max(2 * (size - 1), 1)
    folded = np.mod(index, period)
    return np.asarray(np.minimum(folded, period - folded) if size > 1 else folded, dtype=np.int64)


@lru_cache(maxsize=64)
def _operator(
    make: Callable[[int, int], Matrix], size: int, dim: int, device: torch.device
) -> Tensor:
    """Return the float32 operator (dim, size) on `device`, made once."""
    with torch.inference_mode(False):  # a kept inference tensor would spoil later training
        return torch.from_numpy(make(size, dim)).to(device=device, dtype=torch.float32)

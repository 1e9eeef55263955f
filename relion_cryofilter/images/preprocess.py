"""From raw particle boxes to network input; the recipe is stored with every model.

A box X shrinks with two small matrix products, ``A_y @ X @ A_x.T``. The separable operator A of
one axis depends only on the number of pixels before and after, so it is made once.

Bad images are found on the small ones, where looking is cheap: an image that holds a NaN or an
infinity, or that has no contrast, comes out as all NaN and leaves its neighbours alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from relion_cryofilter.errors import ModelError, bounded
from relion_cryofilter.options import LARGEST_DIM

Matrix = npt.NDArray[np.float64]

CHUNK_PIXELS, LARGEST_CHUNK, LINE_GROUPS = 2**20, 64, 16
"""Pixels, images and groups of lines that a processor shrinks at a time."""
BLUR_SIGMA_PX = 3.0
"""The 2020 program blurred every raw box by 3 raw pixels, whatever the box and pixel size."""
NO_CONTRAST = 1e-5
"""A small image whose std is at most this times its |mean| is blank (rounding makes 1e-7)."""


def shrink(
    images: Tensor, make: Callable[[int, int], Matrix], dim: int, dtype: torch.dtype
) -> Tensor:
    """Return A_y @ X @ A_x.T, float32 (n, dim, dim), of images X (n, ny, nx) of any type.

    `make` makes the operator A (dim, size) of one axis: one of the two below. `dtype` is of the
    larger product: float32 or bfloat16.
    """
    if images.ndim != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (n, ny, nx)")
    _, ny, nx = images.shape
    rows = _operator(make, ny, dim, images.device)
    columns = _operator(make, nx, dim, images.device)
    work = _shrink_in_float32 if dtype == torch.float32 else _shrink_in_bfloat16
    if images.device.type != "cpu":
        return work(images, rows, columns)
    # A processor takes always as many at a time (see `filled_up`): few enough for its caches,
    # and their lines make `LINE_GROUPS` equal groups.
    least = LINE_GROUPS // math.gcd(LINE_GROUPS, ny)
    chunk = least * max(1, min(LARGEST_CHUNK, CHUNK_PIXELS // (ny * nx)) // least)
    parts = [
        work(filled_up(part, chunk), rows, columns)[: len(part)]
        for part in torch.split(images, chunk)
    ]
    return torch.cat(parts)


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


def fourier_crop_operator(size: int, dim: int, low_pass_cycles: float = math.inf) -> Matrix:
    """Return the real operator (dim, size) that crops or pads one axis in Fourier space.

    Pixel j of a box sits at (j + 1/2) / size of its width, before and after, so the grids share
    their centre. Waves of up to half the smaller size pass with unit gain; at exactly that
    Nyquist frequency (even sizes) the two half-waves count half each. Rows sum to one, so the
    amplitude of low frequencies is kept. A low-pass is Gaussian: 1 / e of the amplitude is left at
    that many cycles a box.
    """
    kept = min(size, dim)
    waves = np.arange(kept // 2 + 1)
    weights = np.where((waves == 0) | (2 * waves == kept), 1.0, 2.0) / size
    weights *= np.exp(-((waves / low_pass_cycles) ** 2))
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


class Preprocess(ABC):
    """A recipe that makes network input of raw boxes; a subclass is a dataclass of its fields."""

    name: ClassVar[str]
    dim: int
    roberts: bool

    def __post_init__(self) -> None:
        bounded(self.dim, 2, LARGEST_DIM, "The small image's side", "It is in px.", ModelError)
        if not isinstance(self.roberts, bool):
            raise ModelError(f"roberts is {self.roberts!r:.60}; it must be true or false.")

    @staticmethod
    @abstractmethod
    def operator(size: int, dim: int) -> Matrix:
        """Return the operator (dim, size) of one axis."""

    @property
    def channels(self) -> int:
        """Maps per image: two with the Roberts cross, else one."""
        return 2 if self.roberts else 1

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return small images (n, channels, dim, dim) of raw boxes (n, ny, nx); bad ones are NaN.

        Float32, whatever the `dtype` of the two matrix products (float32 or bfloat16).
        """
        small = shrink(images, self.operator, self.dim, dtype)
        maps = [small, roberts_cross(small)] if self.roberts else [small]
        return _standardise(torch.stack(maps, dim=1))

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields, ready for JSON and for `preprocess_from_dict`."""
        return {"name": self.name, "dim": self.dim, "roberts": self.roberts}


@dataclass(frozen=True)
class BlurResize(Preprocess):
    """What the 2020 program did to an image, equal to scikit-image within float32 rounding.

    In order: ``skimage.filters.gaussian(sigma=3)`` on the raw box, ``skimage.transform.resize``
    with its defaults (bilinear; anti-aliased where it shrinks), and each map to zero mean and
    unit standard deviation.

    Parameters
    ----------
    dim : int
        Side of the small image in px.
    roberts : bool
        Add a second channel: the Roberts cross of the small image, taken before normalisation.
    """

    name = "blur_resize"
    operator = staticmethod(blur_resize_operator)
    dim: int = 28
    roberts: bool = False


@dataclass(frozen=True)
class FourierCrop(Preprocess):
    """Crop in Fourier space (pad, when the box is smaller), then normalise and clip.

    The small image's grid shares its centre with the raw box, so flips and quarter turns of
    the small image are exactly the small images of the flipped and turned box.

    Parameters
    ----------
    dim, roberts
        As of `BlurResize`.
    clip_sigma : float
        Pixels further than this many standard deviations from the mean are set to that limit.
    """

    name = "fourier_crop"
    operator = staticmethod(fourier_crop_operator)
    dim: int = 48
    clip_sigma: float = 6.0
    roberts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.clip_sigma) not in (int, float) or not 0 < self.clip_sigma < float("inf"):
            raise ModelError(f"clip_sigma is {self.clip_sigma!r:.60}; it must be above 0.")

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what every recipe returns, clipped."""
        return super().__call__(images, dtype).clamp(-self.clip_sigma, self.clip_sigma)

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields, ready for JSON."""
        return {
            "name": self.name,
            "dim": self.dim,
            "clip_sigma": float(self.clip_sigma),
            "roberts": self.roberts,
        }


RECIPES = {kind.name: kind for kind in (BlurResize, FourierCrop)}


def preprocess_from_dict(recipe: dict[str, Any]) -> Preprocess:
    """Make the recipe that `Preprocess.to_dict` wrote down; raise ModelError where it can't be."""
    values = dict(recipe)
    name = values.pop("name", None)
    kind = RECIPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ModelError(
            f"Preprocessing {name!r} is unknown; known are {', '.join(sorted(RECIPES))}. "
            "The model may come from a newer relion_cryofilter."
        )
    known = [field.name for field in fields(kind)]
    for field_name in values:
        if field_name not in known:
            raise ModelError(
                f"Preprocessing {name} has no field {field_name!r}; it has {', '.join(known)}. "
                "The model may come from a newer relion_cryofilter."
            )
    return kind(**values)


def d4_views(x: Tensor) -> Iterator[Tensor]:
    """Yield the eight flips and quarter turns of square maps (..., d, d), the identity first."""
    for flipped in (x, x.flip(-1)):
        for quarter_turns in range(4):
            yield torch.rot90(flipped, quarter_turns, (-2, -1))


def turn(images: Tensor, views: Tensor) -> Tensor:
    """Return images (n, c, d, d), each in the one of its eight D4 views that `views` (n,) names."""
    turned = torch.empty_like(images)
    for number, view in enumerate(d4_views(images)):
        chosen = views == number
        turned[chosen] = view[chosen]
    return turned


def roberts_cross(small: Tensor) -> Tensor:
    """Return the Roberts cross (n, d, d) of images (n, d, d), as ``skimage.filters.roberts``.

    The magnitude of the two diagonal differences over the square root of two; the last row and
    column are repeated beyond the edge.
    """
    padded = torch.nn.functional.pad(small.unsqueeze(1), (0, 1, 0, 1), mode="replicate").squeeze(1)
    falling = padded[:, 1:, 1:] - padded[:, :-1, :-1]
    rising = padded[:, 1:, :-1] - padded[:, :-1, 1:]
    return ((falling.square() + rising.square()) / 2).sqrt()


def _standardise(maps: Tensor) -> Tensor:
    """Bring each map of (n, c, d, d) to zero mean, unit std; images with a bad map to all NaN."""
    mean = maps.mean(dim=(-2, -1), keepdim=True)
    centred = maps - mean
    std = centred.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    good = (std > NO_CONTRAST * mean.abs()) & torch.isfinite(std)
    whole_image_good = good.all(dim=1, keepdim=True)
    return torch.where(whole_image_good, centred / std, torch.nan)

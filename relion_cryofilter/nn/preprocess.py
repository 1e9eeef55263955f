"""From raw particle boxes to network input; the recipe is stored with every model.

Both recipes shrink an image with two small matrix products, see `shrinking`.

Bad images are found on the small ones, where looking is cheap: an image that holds a NaN or an
infinity, or that has no contrast, comes out as all NaN and leaves its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from relion_cryofilter.errors import ModelError
from relion_cryofilter.nn.shrinking import blur_resize_operator, fourier_crop_operator, shrink

NO_CONTRAST = 1e-5
"""A small image whose std is at most this times its |mean| is blank (rounding makes 1e-7)."""


class Preprocess(Protocol):
    """A recipe that makes network input of raw boxes."""

    @property
    def channels(self) -> int:
        """Maps per image that the recipe makes."""

    @property
    def dim(self) -> int:
        """Side of the small image in px."""

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return small images (n, channels, dim, dim) of raw boxes (n, ny, nx).

        Float32, whatever the `dtype` of the two matrix products (float32 or bfloat16).
        """

    def to_dict(self) -> dict[str, Any]:
        """Return what `preprocess_from_dict` needs to make this recipe again."""


@dataclass(frozen=True)
class BlurResize:
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

    name: ClassVar[str] = "blur_resize"
    dim: int = 28
    roberts: bool = False

    def __post_init__(self) -> None:
        _check_dim(self.dim)

    @property
    def channels(self) -> int:
        """Two with the Roberts map, else one."""
        return 2 if self.roberts else 1

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return float32 (n, channels, dim, dim) of boxes (n, ny, nx); bad images are all NaN."""
        small = shrink(images, blur_resize_operator, self.dim, dtype)
        maps = [small, roberts_cross(small)] if self.roberts else [small]
        return _standardise(torch.stack(maps, dim=1))

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields, ready for JSON."""
        return {"name": self.name, "dim": self.dim, "roberts": self.roberts}


@dataclass(frozen=True)
class FourierCrop:
    """Crop in Fourier space (pad, when the box is smaller), then normalise and clip.

    The small image's grid shares its centre with the raw box, so flips and quarter turns of
    the small image are exactly the small images of the flipped and turned box.

    Parameters
    ----------
    dim : int
        Side of the small image in px.
    clip_sigma : float
        Pixels further than this many standard deviations from the mean are set to that limit.
    roberts : bool
        Add a second channel: the Roberts cross of the small image, taken before normalisation.
    """

    name: ClassVar[str] = "fourier_crop"
    dim: int = 48
    clip_sigma: float = 6.0
    roberts: bool = False

    def __post_init__(self) -> None:
        _check_dim(self.dim)
        if not self.clip_sigma > 0:
            raise ModelError(f"clip_sigma is {self.clip_sigma}; it must be above 0.")

    @property
    def channels(self) -> int:
        """Two with the Roberts map, else one."""
        return 2 if self.roberts else 1

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return float32 (n, channels, dim, dim) of boxes (n, ny, nx); bad images are all NaN."""
        small = shrink(images, fourier_crop_operator, self.dim, dtype)
        maps = [small, roberts_cross(small)] if self.roberts else [small]
        return _standardise(torch.stack(maps, dim=1)).clamp(-self.clip_sigma, self.clip_sigma)

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields, ready for JSON."""
        return {
            "name": self.name,
            "dim": self.dim,
            "clip_sigma": float(self.clip_sigma),
            "roberts": self.roberts,
        }


RECIPES: dict[str, type[BlurResize] | type[FourierCrop]] = {
    BlurResize.name: BlurResize,
    FourierCrop.name: FourierCrop,
}


def preprocess_from_dict(recipe: dict[str, Any]) -> Preprocess:
    """Make the recipe that `Preprocess.to_dict` wrote down.

    Raises
    ------
    ModelError
        If the name or a field is unknown, or a value makes no sense.
    """
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


def _check_dim(dim: int) -> None:
    if not isinstance(dim, int) or dim < 2:
        raise ModelError(
            f"The small image's side is {dim!r} px; it must be a whole number above 1."
        )

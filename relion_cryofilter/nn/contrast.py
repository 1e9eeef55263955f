"""Is protein white in these images, as RELION has it, or dark?

Dense matter is what stands out in a picked box. Where the centres of the boxes are darker than
what surrounds them for certain, and brighter at no scale, the contrast has not been inverted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SCALES = ((0.25, 0.5, 0.9), (0.35, 0.75, 1.0), (0.5, 0.8, 1.42))
"""Radius of a disc, and inner and outer radius of a ring about it, in units of half a box."""

CERTAIN, POSSIBLE = -6.0, 3.0
"""In standard errors: darker at one scale for certain, and brighter at none to speak of."""

FEWEST_CLUSTERS, FEWEST_IMAGES = 4, 50


def centre_contrast(small: Tensor) -> Tensor:
    """Return (n, 3): mean of the centre less mean of the surroundings, at three scales.

    Parameters
    ----------
    small
        (n, c, d, d) small images of unit standard deviation; the first channel counts.
    """
    dim = small.shape[-1]
    axis = (torch.arange(dim) - (dim - 1) / 2) / (dim / 2)
    radius = torch.hypot(axis[:, None], axis[None])
    images = small[:, 0]
    columns = [
        images[:, radius < disc].mean(1) - images[:, (radius >= inner) & (radius < outer)].mean(1)
        for disc, inner, outer in SCALES
    ]
    return torch.stack(columns, dim=1)


def looks_dark(contrast: np.ndarray, clusters: np.ndarray) -> bool:
    """Return whether protein is dark; False if too few images tell.

    A shell, or close neighbours, make white protein dark at one scale, but bright at another.

    Parameters
    ----------
    contrast
        (n, 3) of `centre_contrast`; rows of NaN are left out.
    clusters
        (n,) micrograph of each image: the errors are those of the means of micrographs, or, of
        fewer than four, of the images.
    """
    usable = np.isfinite(contrast).all(axis=1)
    values, numbers = contrast[usable], np.unique(clusters[usable], return_inverse=True)[1]
    if len(values) < FEWEST_IMAGES:
        return False
    if numbers.max() + 1 >= FEWEST_CLUSTERS:
        counts = np.bincount(numbers)
        sums = [np.bincount(numbers, column) for column in values.T]
        values = np.stack(sums, axis=1) / counts[:, None]
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    certainty = values.mean(axis=0) / np.maximum(error, 1e-9)
    return bool(certainty.min() < CERTAIN and certainty.max() < POSSIBLE)

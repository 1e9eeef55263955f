"""Whether protein is white in these images, as RELION has it, or dark.

Dense matter is what stands out in a picked box. Where the centres of the boxes are darker than
what surrounds them for certain, and brighter at no scale, the contrast has not been inverted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.images.batches import map_batches
from relion_cryofilter.images.preprocess import Preprocess
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.splits import clusters_of

SCALES = ((0.25, 0.5, 0.9), (0.35, 0.75, 1.0), (0.5, 0.8, 1.42))
"""Radius of a disc, and inner and outer radius of a ring about it, in units of half a box."""
CERTAIN, POSSIBLE = -6.0, 3.0
"""In standard errors: darker at one scale for certain, and brighter at none to speak of."""
FEWEST_CLUSTERS, FEWEST_IMAGES, PROBED = 4, 50, 1000


def centre_contrast(small: Tensor) -> Tensor:
    """Return (n, 3): mean of the centre less mean of the surroundings, at three scales.

    Of small images (n, c, d, d) of unit standard deviation; the first channel counts.
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
    """Tell from `centre_contrast` (n, 3) whether protein is dark; False if too few images tell.

    A shell, or close neighbours, make white protein dark at one scale, but bright at another.
    Errors are those of the means of `clusters` (n,), or, of fewer than four, of the images.
    """
    usable = np.isfinite(contrast).all(axis=1)
    values, numbers = contrast[usable], np.unique(clusters[usable], return_inverse=True)[1]
    if len(values) < FEWEST_IMAGES:
        return False
    if numbers.max() + 1 >= FEWEST_CLUSTERS:
        sums = [np.bincount(numbers, column) for column in values.T]
        values = np.stack(sums, axis=1) / np.bincount(numbers)[:, None]
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    certainty = values.mean(axis=0) / np.maximum(error, 1e-9)
    return bool(certainty.min() < CERTAIN and certainty.max() < POSSIBLE)


def check_contrast(particles: ParticleSet, preprocess: Preprocess, threads: int) -> None:
    """Look at up to a thousand images, spread over the set, and refuse dark particles."""
    count = min(PROBED, len(particles))
    sample = particles.take(np.linspace(0, max(0, len(particles) - 1), count).astype(np.int64))
    headers, bad = check_stacks(sample)
    rows = np.setdiff1d(np.arange(len(sample)), bad.rows, assume_unique=True)
    values = np.full((len(sample), len(SCALES)), np.nan)

    def measure(images: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return centre_contrast(preprocess(images.float())).double().numpy()

    for batch_rows, contrast in map_batches(measure, sample, rows, headers, threads=threads):
        values[batch_rows] = contrast
    refuse_dark(values, clusters_of(sample)[0], particles.source)


def refuse_dark(contrast: np.ndarray, clusters: np.ndarray, source: str) -> None:
    """Raise CryoFilterError if `centre_contrast` (n, 3) says that protein is dark."""
    if looks_dark(contrast, clusters):
        raise CryoFilterError(
            f"{source}: the particles are darker than what surrounds them; expected: protein "
            "white, as RELION's Extract job makes it with 'Invert contrast? Yes'. The model would "
            "take them for junk. Extract again with that, or turn the images over with "
            "relion_image_handler --multiply_constant -1 (in CryoSPARC: import them with the "
            "other data sign). If they are right as they are, --any_contrast goes on."
        )

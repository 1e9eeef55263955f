"""Refusing images whose contrast is inverted, before a model makes nonsense of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from relion_cryofilter.data.bad_images import check_stacks
from relion_cryofilter.data.labelled import clusters_of
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.contrast import SCALES, centre_contrast, looks_dark
from relion_cryofilter.nn.pipeline import map_batches
from relion_cryofilter.options import ModelOptions

PROBED = 1000


def check_contrast(particles: ParticleSet, models: Sequence[Model], options: ModelOptions) -> None:
    """Look at up to a thousand images, spread over the set, and refuse dark particles.

    Parameters
    ----------
    particles
        What will be scored, or the good ones of a labelled set.
    models
        The first one's preprocessing makes the small images.
    options
        Threads; with ``any_contrast`` nothing is looked at.

    Raises
    ------
    CryoFilterError
        The centres of the images are darker than what surrounds them.
    """
    if options.any_contrast:
        return
    preprocess = models[0].preprocess
    count = min(PROBED, len(particles))
    probed = np.linspace(0, max(0, len(particles) - 1), count).astype(np.int64)
    sample = particles.take(probed)
    headers, bad = check_stacks(sample)
    rows = np.setdiff1d(np.arange(len(sample)), bad.rows, assume_unique=True)
    values = np.full((len(sample), len(SCALES)), np.nan)

    def measure(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return centre_contrast(preprocess(images.float())).double().numpy()

    for batch_rows, contrast in map_batches(
        measure, sample, rows, headers, threads=options.threads
    ):
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
            "other data sign). If they are right as they are, "
            "--any_contrast goes on."
        )

"""From images to scores and what is accepted: what the jobs and the functions do alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relion_cryofilter.commands.models import resolve_threshold
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.scoring import Scores, score_particles
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import ModelOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.results.thresholds import ThresholdRequest


def score_as_told(
    particles: ParticleSet,
    models: Sequence[Model],
    options: ModelOptions,
    progress: Progress,
    **more: Any,
) -> Scores:
    """Score particles as the options say; `more` goes to `score_particles` as it is."""
    devices = more.pop("devices", None) or choose_devices(gpu_numbers(options.gpu))
    return score_particles(
        particles,
        models,
        progress,
        threads=options.threads,
        devices=devices,
        batch_size=options.batch_size,
        tta=options.tta,
        skip_bad=options.skip_bad,
        **more,
    )


@dataclass(frozen=True)
class Judged:
    """Which particles are accepted.

    Attributes
    ----------
    values
        (n,) scores with six decimals, as they are written.
    accepted
        (n,) bool: at least the threshold, and the image is not bad.
    threshold, reason
        The threshold and where it is from.
    """

    values: np.ndarray
    accepted: np.ndarray
    threshold: float
    reason: str


def judge(scores: Scores, models: Sequence[Model], request: ThresholdRequest | None) -> Judged:
    """Accept and reject; the request is that of ``--threshold``."""
    values = np.round(scores.values, 6)
    threshold, reason = resolve_threshold(request, models, values)
    accepted = values >= threshold
    accepted[scores.bad.rows] = False
    return Judged(values, accepted, threshold, reason)

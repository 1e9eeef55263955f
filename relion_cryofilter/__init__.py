"""Score cryo-EM particle images and sort good particles from junk, inside RELION or without.

>>> from relion_cryofilter import ScoreOptions, score
>>> score(ScoreOptions(in_parts="particles.star", o="External/job012/"))  # doctest: +SKIP

Names are loaded when they are first used, so ``--help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relion_cryofilter.api import (
        ParticleScores,
        Training,
        evaluate_model,
        score_images,
        train_model,
    )
    from relion_cryofilter.commands.convert import convert
    from relion_cryofilter.commands.metrics import metrics
    from relion_cryofilter.commands.score import score
    from relion_cryofilter.commands.select import select
    from relion_cryofilter.commands.train import train
    from relion_cryofilter.data.particles import ParticleSet, read_particles
    from relion_cryofilter.errors import CryoFilterError
    from relion_cryofilter.nn.checkpoint import Model, load_model
    from relion_cryofilter.nn.scoring import Scores, score_particles
    from relion_cryofilter.options import (
        ConvertOptions,
        MetricsOptions,
        ScoreOptions,
        SelectOptions,
        TrainOptions,
    )

__version__ = "0.1.0"

_HOME = {
    "ConvertOptions": "options",
    "CryoFilterError": "errors",
    "MetricsOptions": "options",
    "Model": "nn.checkpoint",
    "ParticleScores": "api",
    "ParticleSet": "data.particles",
    "ScoreOptions": "options",
    "Scores": "nn.scoring",
    "SelectOptions": "options",
    "TrainOptions": "options",
    "Training": "api",
    "convert": "commands.convert",
    "evaluate_model": "api",
    "load_model": "nn.checkpoint",
    "metrics": "commands.metrics",
    "read_particles": "data.particles",
    "score": "commands.score",
    "score_images": "api",
    "score_particles": "nn.scoring",
    "select": "commands.select",
    "train": "commands.train",
    "train_model": "api",
}
__all__ = [
    "ConvertOptions",
    "CryoFilterError",
    "MetricsOptions",
    "Model",
    "ParticleScores",
    "ParticleSet",
    "ScoreOptions",
    "Scores",
    "SelectOptions",
    "TrainOptions",
    "Training",
    "convert",
    "evaluate_model",
    "load_model",
    "metrics",
    "read_particles",
    "score",
    "score_images",
    "score_particles",
    "select",
    "train",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

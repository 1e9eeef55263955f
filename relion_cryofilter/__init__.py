"""Score cryo-EM particle images and sort good particles from junk, inside RELION or without.

>>> from relion_cryofilter import ScoreOptions, score
>>> score(ScoreOptions(in_parts="particles.star", o="External/job012/"))  # doctest: +SKIP

Names are loaded when they are first used, so ``--help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relion_cryofilter.processes import __version__

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
    from relion_cryofilter.errors import CryoFilterError
    from relion_cryofilter.nn.model import Model, load_model
    from relion_cryofilter.nn.scoring import Scores, score_particles
    from relion_cryofilter.options import (
        ConvertOptions,
        MetricsOptions,
        ScoreOptions,
        SelectOptions,
        TrainOptions,
    )
    from relion_cryofilter.particles.particles import ParticleSet, read_particles

_ROOMS = {
    "api": ("ParticleScores", "Training", "evaluate_model", "score_images", "train_model"),
    "commands.convert": ("convert",),
    "commands.metrics": ("metrics",),
    "commands.score": ("score",),
    "commands.select": ("select",),
    "commands.train": ("train",),
    "errors": ("CryoFilterError",),
    "nn.model": ("Model", "load_model"),
    "nn.scoring": ("Scores", "score_particles"),
    "options": (
        "ConvertOptions", "MetricsOptions", "ScoreOptions", "SelectOptions", "TrainOptions",
    ),
    "particles.particles": ("ParticleSet", "read_particles"),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
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
    "__version__",
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
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)

"""Reading the models that a job names, and checking that they fit what it asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.errors import UsageError
from relion_cryofilter.nn.checkpoint import Model, is_keras, load_model, require_file
from relion_cryofilter.nn.keras import import_keras
from relion_cryofilter.options import ModelOptions
from relion_cryofilter.results.bootstrap import Interval
from relion_cryofilter.results.operating_curve import OperatingCurve
from relion_cryofilter.results.thresholds import ThresholdRequest, choose_threshold

BUNDLED_MODEL = Path(__file__).parents[1] / "models" / "default.safetensors"
CURVE, ESTIMATE, SIMULATED = "operating_curve", "threshold_estimate", "made_by"
PIXEL_SIZE_TOLERANCE = 0.1
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}

log = logging.getLogger("relion_cryofilter")


def read_models(options: ModelOptions) -> list[Model]:
    """Read the models of ``--weights``, or the bundled one.

    Raises
    ------
    UsageError
        ``--model``, ``--f`` or ``--img_dim`` contradict a model file.
    ModelError
        A file is missing or is no model.
    """
    paths = options.weights or (BUNDLED_MODEL,)
    return [in_precision(model, options) for model in _read(paths, options)]


def in_precision(model: Model, options: ModelOptions) -> Model:
    """Return `model` in the precision of ``--precision``."""
    return replace(model, precision=PRECISIONS[options.precision])


def _read(paths: Sequence[Path], options: ModelOptions) -> list[Model]:
    models = []
    for path in paths:
        if is_keras(require_file(path)):
            models.append(
                import_keras(path, f=options.f, dim=options.img_dim, network=options.model)
            )
            continue
        model = load_model(path)
        network = model.network
        found = {"model": network.name, "img_dim": network.dim, "f": network.kwargs.get("f")}
        for name, value in found.items():
            asked = getattr(options, name)
            if asked is not None and asked != value:
                raise UsageError(
                    f"--{name} is {asked}, but {path} has {value}. Leave --{name} out: the model "
                    "file knows."
                )
        models.append(model)
    return models


def describe_models(models: Sequence[Model], options: ModelOptions) -> str:
    """Return the names, networks and hashes of models, for the log."""
    names = [str(path) for path in options.weights] or ["bundled"]
    return "; ".join(
        f"{name} ({model.network.name}, {model.network.dim} px, hash {model.hash})"
        for name, model in zip(names, models)
    )


def check_pixel_size(models: Sequence[Model], particles: ParticleSet) -> None:
    """Warn where a model was trained at a pixel size more than 10 % away."""
    for model in models:
        trained = model.provenance.get("pixel_sizes_angstrom") or []
        for group in particles.optics:
            size = group.pixel_size_angstrom
            if size is None or not trained:
                continue
            nearest = min(trained, key=lambda known: abs(known / size - 1))
            if abs(nearest / size - 1) > PIXEL_SIZE_TOLERANCE:
                boxes = ", ".join(map(str, model.provenance.get("boxes_px", [])))
                log.warning(
                    "The model (hash %s) was trained at %.3g Å/px (box %s px), but optics group %s "
                    "has %.3g Å/px. Its scores may be poor: train at this pixel size, or extract "
                    "with the box and pixel size of the training.",
                    model.hash, nearest, boxes, group.name, size,
                )  # fmt: skip


def check_request(request: ThresholdRequest | None, models: Sequence[Model]) -> None:
    """Raise, before images are read, if the models can't answer a request."""
    if request is not None and request.kind in ("recall", "precision"):
        for model in models:
            curve_of(model).threshold(request)


def resolve_threshold(
    request: ThresholdRequest | None, models: Sequence[Model], scores: np.ndarray
) -> tuple[float, str]:
    """Turn a request into a threshold.

    Parameters
    ----------
    request
        What the user asked for; None for the models' own thresholds.
    models
        Their validation curves answer requests for recall or precision; several are averaged.
    scores
        (n,) scores of the set at hand; they answer requests to keep a share or a number.

    Returns
    -------
    threshold, reason
        The reason is for the log.
    """
    if request is None:
        return _mean([model.threshold for model in models]), f"the model's own{_estimate(models)}"
    if request.kind in ("recall", "precision"):
        curves = [curve_of(model) for model in models]
        threshold = _mean([curve.threshold(request) for curve in curves])
        if len(curves) > 1:
            return threshold, (
                f"for {request}, roughly: the mean of the thresholds of {len(curves)} models; "
                "metrics on labelled particles tells what it gives"
            )
        simulated = ", of simulated particles" if SIMULATED in models[0].provenance else ""
        return threshold, f"for {request}; {curves[0].describe(threshold)}{simulated}"
    return choose_threshold(
        request, scores
    ), "as asked" if request.kind == "score" else f"for {request}"


def _estimate(models: Sequence[Model]) -> str:
    """Return what validation said of a single model's own threshold, with intervals."""
    known = models[0].provenance.get(ESTIMATE, {})
    if len(models) > 1 or "recall" not in known:
        return ""
    parts = [
        f"{name} {Interval(*(np.nan if v is None else v for v in known[name]))}"
        for name in ("recall", "precision")
    ]
    return f"; on its validation particles {', '.join(parts)}"


def curve_of(model: Model) -> OperatingCurve:
    """Return the validation curve that `train` stored in a model."""
    stored = model.provenance.get(CURVE)
    if stored is None:
        raise UsageError(
            f"The model (hash {model.hash}) has no validation curve, so it can't tell recall or "
            "precision. Train it with this program, or ask for a threshold such as 0.5, keep=0.6 "
            "or count=50000."
        )
    return OperatingCurve.from_dict(stored)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 6)

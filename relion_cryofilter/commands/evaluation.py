"""Scores held against labels; figures and tables of it, for `train` and `metrics`."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relion_cryofilter.commands.models import resolve_threshold
from relion_cryofilter.data.labelled import LabelledSet, clusters_of
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.result_files import METRICS, PREDICTIONS
from relion_cryofilter.results import figures
from relion_cryofilter.results.metrics import Evaluation, curves, evaluate
from relion_cryofilter.results.thresholds import ThresholdRequest

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class Measurement:
    """A measurement on labelled particles, without those whose images are bad.

    Attributes
    ----------
    labelled, values
        The m particles that are left and their (m,) scores, six decimals.
    reason
        Where the threshold is from.
    unit
        What the intervals resample: micrographs, or what stands for them.
    evaluation
        The figures.
    """

    labelled: LabelledSet
    values: np.ndarray
    reason: str
    unit: str
    evaluation: Evaluation


def measure(
    labelled: LabelledSet,
    scores: Scores,
    models: Sequence[Model],
    request: ThresholdRequest | None,
    seed: int,
) -> Measurement:
    """Hold scores against labels.

    Raises
    ------
    CryoFilterError
        Only particles of one kind can be used.
    """
    kept = np.setdiff1d(np.arange(len(labelled)), scores.bad.rows)
    labelled, values = labelled.take(kept), np.round(scores.values[kept], 6)
    if len(scores.bad):
        log.warning("%s\nThey are left out.", scores.bad.summary())
    if len(set(labelled.labels.tolist())) < 2:
        raise CryoFilterError("Only particles of one kind are left, so nothing can be measured.")
    threshold, reason = resolve_threshold(request, models, values)
    clusters, unit = clusters_of(labelled.particles)
    evaluation = evaluate(labelled.labels, values, clusters, threshold, seed=seed)
    return Measurement(labelled, values, reason, unit, evaluation)


def write_evaluation(
    folder: Path,
    particles: ParticleSet,
    labels: np.ndarray,
    scores: np.ndarray,
    evaluation: Evaluation,
    about: dict[str, Any],
) -> None:
    """Write metrics.json, predictions.csv and the figures into `folder`.

    Parameters
    ----------
    folder
        Exists.
    particles, labels, scores
        The n particles that were measured, (n,) bool and (n,).
    evaluation
        Of these labels and scores.
    about
        What metrics.json says besides: the data, the split, the models.
    """
    text = json.dumps({**about, **evaluation.to_dict()}, indent=2)
    write_text(folder / METRICS, f"{text}\n")
    _write_predictions(folder / PREDICTIONS, particles, labels, scores)
    lines = curves(labels, scores)
    figures.save_roc(folder / "roc.png", lines, evaluation)
    figures.save_precision_recall(folder / "precision_recall.png", lines, evaluation)
    figures.save_reliability(folder / "reliability.png", lines, evaluation)
    figures.save_confusion_matrix(folder / "confusion_matrix.png", evaluation)
    figures.save_score_histogram(
        folder / "score_histogram.png", labels, scores, evaluation.threshold
    )


def _write_predictions(
    path: Path, particles: ParticleSet, labels: np.ndarray, scores: np.ndarray
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "micrograph", "label", "score"])
    for row, (label, score) in enumerate(zip(labels.tolist(), scores.tolist())):
        micrograph = particles.micrographs[particles.micrograph_of[row]]
        writer.writerow([particles.image_name(row), micrograph, int(label), f"{score:.6f}"])
    write_text(path, text.getvalue())

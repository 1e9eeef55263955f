"""Figures and tables of a measurement, for `train` and `metrics`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.files import write_text
from relion_cryofilter.results import figures
from relion_cryofilter.results.metrics import Evaluation, curves

METRICS, PREDICTIONS = "metrics.json", "predictions.csv"


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

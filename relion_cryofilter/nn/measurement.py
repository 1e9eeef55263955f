"""Scores held against labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.evaluation import Evaluation, evaluate
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.nn.model import Models
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.options import MetricsOptions, TrainOptions
from relion_cryofilter.particles.labels import LabelledSet
from relion_cryofilter.particles.splits import Folds, Split, clusters_of
from relion_cryofilter.thresholds import Chosen

if TYPE_CHECKING:
    import pandas as pd

HARDLY_FILTERS = 0.8  # of the bad particles accepted

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class Measured:
    """Labelled particles, those with bad images left out, and how well their scores sort them."""

    labelled: LabelledSet  # the m particles that are left
    chosen: Chosen  # their scores (m,), and what the threshold accepts
    evaluation: Evaluation
    unit: str  # what the intervals resample: micrographs, or what stands in for them
    part: str  # which part of the data this is, in words
    doubted: np.ndarray | None = None  # rows whose labels the scores contradict most, these first

    def to_frame(self) -> pd.DataFrame:
        """Return image, micrograph, label (1 or 0) and score of each particle."""
        import pandas as pd  # slow to import

        particles = self.labelled.particles
        return pd.DataFrame(
            {
                "image": [particles.image_name(row) for row in range(len(particles))],
                "micrograph": [particles.micrographs[n] for n in particles.micrograph_of.tolist()],
                "label": self.labelled.labels.astype(int),
                "score": self.chosen.values,
            }
        )


def measure(
    labelled: LabelledSet,
    scores: Scores,
    models: Models,
    request: ThresholdRequest | None,
    *,
    part: str = "all labelled particles",
    seed: int = 0,
) -> Measured:
    """Hold scores (n,) against labels (n,), at the threshold that the models make of a request.

    `seed` is of the bootstrap. If only particles of one kind are left, it is a CryoFilterError.
    """
    kept = np.setdiff1d(np.arange(len(labelled)), scores.bad.rows)
    labelled = labelled.take(kept)
    if len(scores.bad):
        log.warning("%s\nThey are left out.", scores.bad.summary())
    if len(set(labelled.labels.tolist())) < 2:
        raise CryoFilterError("Only particles of one kind are left, so nothing can be measured.")
    chosen = models.choose(scores.values[kept], request)
    clusters, unit = clusters_of(labelled.particles)
    evaluation = evaluate(labelled.labels, chosen.values, clusters, chosen.threshold, seed=seed)
    return Measured(labelled, chosen, evaluation, unit, part)


def warn_of_a_lax_threshold(
    found: Evaluation, labels: np.ndarray, request: ThresholdRequest, which: str
) -> None:
    """Warn of a threshold that accepts nearly all bad particles; `which` says of which ones."""
    bad_accepted = 1 - found.specificity.value
    if bad_accepted > HARDLY_FILTERS:
        log.warning(
            "This threshold accepts %.0f %% of the bad %s particles: it hardly filters. The model "
            "has learnt too little, or %d good %s particles are too few for %s; try more labels, "
            "or score with --threshold recall=0.9 or keep=0.6.",
            100 * bad_accepted, which, labels.sum(), which, request,
        )  # fmt: skip


def estimates_to_keep(found: Evaluation) -> dict[str, list[float | None]]:
    """Return value, low and high of what a model says of its threshold (`ESTIMATE`)."""
    kept = {"recall": found.sensitivity, "precision": found.precision, "auc": found.auc}
    return {name: interval.to_list() for name, interval in kept.items()}


def describe_test_part(split: Split, options: MetricsOptions | TrainOptions) -> str:
    """Return which part of a labelled set is measured, so that it can be had again."""
    return (
        f"the test part of a split by {split.unit}, --split {options.split:g} --seed {options.seed}"
    )


def describe_folds(folds: Folds, options: TrainOptions) -> str:
    """Return what the figures of a cross-fitting are of."""
    return (
        f"all {len(folds.rows):,} labelled particles, each by a model that has not seen its "
        f"{folds.unit} ({len(folds.held)} folds, --seed {options.seed})"
    )

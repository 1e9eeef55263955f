"""From labelled particles to trained models, measured on particles that they have not seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.evaluation import Evaluation, evaluate
from relion_cryofilter.images.contrast import refuse_dark
from relion_cryofilter.images.small_images import load_small_images
from relion_cryofilter.nn.crossfit import CrossFit, cross_fit, images_to_show
from relion_cryofilter.nn.home import HOME, home_of
from relion_cryofilter.nn.label_noise import (
    LabelNoise,
    calibrate,
    curve_behind,
    measure_label_noise,
    threshold_behind,
)
from relion_cryofilter.nn.measurement import (
    Measured,
    describe_folds,
    describe_test_part,
    estimates_to_keep,
    warn_of_a_lax_threshold,
)
from relion_cryofilter.nn.model import ESTIMATE, LABEL_NOISE, Model, Models
from relion_cryofilter.nn.selftests import SelfTest, run_self_tests
from relion_cryofilter.nn.suspects import Suspects, suspects_of
from relion_cryofilter.nn.task import Task, start_of
from relion_cryofilter.nn.three_parts import AfterEpoch, Member, calibrated
from relion_cryofilter.nn.trainer import Epoch
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.particles.labels import LabelledSet
from relion_cryofilter.particles.splits import (
    Folds,
    Split,
    folds_by_micrograph,
    split_by_micrograph,
)
from relion_cryofilter.progress import Progress, counted
from relion_cryofilter.thresholds import CURVE, choose_threshold

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gives.

    Attributes
    ----------
    models
        One, or those of the ensemble.
    measured
        The figures, of scores by models that had not seen the particles: of all labelled
        particles out of fold, or, with ``--split``, of the test part.
    self_tests
        Whether the figures could be too good to be true.
    histories, kept_epochs
        The epochs of each model, and whose weights it has; 0 for those before any training.
    split
        The folds or the parts, in words.
    label_noise, behind
        How many labels look wrong, and the figures of the particles behind the labels, by name;
        None and {} with ``--split``.
    suspects
        The particles whose label the scores contradict most; None with ``--split``.
    """

    models: Models
    measured: Measured
    self_tests: Sequence[SelfTest]
    histories: Sequence[Sequence[Epoch]]
    kept_epochs: Sequence[int]
    split: str
    label_noise: LabelNoise | None = None
    behind: dict[str, float] = field(default_factory=dict)
    suspects: Suspects | None = None

    def figures(self, options: TrainOptions) -> dict[str, Any]:
        """Return what metrics.json holds."""
        noise = self.label_noise
        return {
            "data": self.measured.labelled.particles.source,
            "part": self.measured.part,
            "model": ", ".join(model.hash for model in self.models),
            "threshold_request": str(options.threshold),
            "self_tests": [asdict(item) for item in self.self_tests],
            **(
                {LABEL_NOISE: {**noise.to_dict(), "behind_the_labels": self.behind}}
                if noise
                else {}
            ),
            **self.measured.evaluation.to_dict(),
        }


def train_models(
    labelled: LabelledSet,
    options: TrainOptions,
    folder: Path,
    abort_requested: Callable[[], bool] = lambda: False,
    after_epoch: AfterEpoch = lambda number, history: None,
) -> Trained:
    """Train on labelled particles as the options say.

    Parameters
    ----------
    labelled, options
        n particles, good and bad, and how to train.
    folder
        Holds checkpoints, from which a stopped training is resumed.
    abort_requested, after_epoch
        Asked at every step, where True raises Aborted; called after every epoch.

    Raises
    ------
    CryoFilterError
        Something is wrong with the labels, the images or an option.
    """
    if options.threshold.kind == "count":
        raise UsageError("--threshold count=… is for score and select; train has no set to count.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = start_of(options, labelled)

    # Every image once, and the folds or parts; images that can't be used are left out.
    particles, labels = labelled.particles, labelled.labels
    three = None
    if options.split is not None:
        three = split_by_micrograph(particles, labels, options.split, options.seed)
    loaded = load_small_images(
        particles,
        start.preprocess,
        Progress(len(labelled), "images read", abort_requested),
        threads=options.threads,
        max_memory_bytes=options.max_memory * 1e9,
    )
    if not options.skip_bad:
        loaded.bad.refuse("--skip_bad leaves them out")
    elif len(loaded.bad):
        log.warning("%s\nThey are left out.", loaded.bad.summary())
    split: Folds | Split
    if three is None:
        split = folds_by_micrograph(particles, labels, options.seed, loaded.bad.rows)
    else:
        split = three.without(loaded.bad.rows)
    for name, rows in split.parts.items():
        if len(set(labels[rows].tolist())) < 2:
            raise CryoFilterError(
                f"The {name} part has no {'bad' if labels[rows].any() else 'good'} "
                "particle left. Check the images or label more."
            )
    if not options.any_contrast:
        good = np.flatnonzero(labels & (loaded.boxes_px > 0))
        refuse_dark(loaded.contrast[good], split.clusters[good], particles.source)
    task = Task(options, labelled, loaded, start, folder)
    _announce(task, split)
    if isinstance(split, Folds):
        return _cross_fitted(task, split, abort_requested, after_epoch)
    return _by_parts(task, split, abort_requested, after_epoch)


def _by_parts(
    task: Task, split: Split, abort_requested: Callable[[], bool], after_epoch: AfterEpoch
) -> Trained:
    """Train on one part, choose by another, measure on the third."""
    options, labelled, loaded = task.options, task.labelled, task.loaded
    # The models, each with a validation part of its own.
    members = split.members(labelled.labels, options.ensemble, options.seed)
    epochs = task.start.settings(options).epochs
    steps = epochs * sum(len(member.train) for member in members)
    progress = Progress(steps, "image steps", abort_requested)
    fits = [
        Member(task, member, number).fit(progress, after_epoch)
        for number, member in enumerate(members, 1)
    ]
    models = Models(tuple(fit[0] for fit in fits), tuple(f"hash {fit[0].hash}" for fit in fits))

    # The test part, which played no role so far.
    test, small = labelled.take(split.test), loaded.images.get(split.test)
    each = np.stack([model.probabilities(small).double().numpy() for model in models])
    chosen = models.choose(each.mean(axis=0), None)
    clusters, threshold, seed = split.clusters[split.test], chosen.threshold, options.seed
    evaluation = evaluate(test.labels, chosen.values, clusters, threshold, seed=seed)
    part = describe_test_part(split, options)
    measured = Measured(test, chosen, evaluation, split.cluster_unit, part)
    return Trained(
        models=models,
        measured=measured,
        self_tests=run_self_tests(models, measured, task, split),
        histories=[fit[1] for fit in fits],
        kept_epochs=[fit[2] for fit in fits],
        split=_describe_parts(labelled.labels, split),
    )


def _cross_fitted(
    task: Task, folds: Folds, abort_requested: Callable[[], bool], after_epoch: AfterEpoch
) -> Trained:
    """Train on all labels, measure on all of them out of fold."""
    options, rows = task.options, folds.rows
    labelled, clusters = task.labelled.take(rows), folds.clusters[rows]
    labels = labelled.labels
    total = options.ensemble * images_to_show(task, folds)
    progress = Progress(total, "image steps", abort_requested)
    fits, members, each, noise = [], list[Model](), list[np.ndarray](), LabelNoise.unknown("")
    for number in range(1, options.ensemble + 1):
        fit = cross_fit(task, folds, progress, number, partial(after_epoch, number))
        # How many labels are wrong, and scores that are probabilities all the same.
        noise = LabelNoise.unknown(
            "the weights are those before training, whose scores say too little"
        )
        if fit.recipe is not None:
            noise = measure_label_noise(fit.logits, labels, clusters, options.seed)
        temperature, shift = calibrate(fit.logits, labels, noise.shares)
        scores = calibrated(fit.logits + temperature * shift, temperature)
        with torch.no_grad():
            fit.network.head.bias.add_(temperature * shift)
        members.append(_with_threshold(task, folds, fit, noise, scores, temperature))
        fits.append(fit)
        each.append(scores)
    models = Models(tuple(members), tuple(f"hash {model.hash}" for model in members))
    if len(fits) > 1 and any(fit.recipe for fit in fits):
        noise = measure_label_noise(np.mean(each, axis=0), labels, clusters, options.seed)
    log.info("%s", noise.describe())

    # All labelled particles, out of fold.
    chosen = models.choose(np.mean(each, axis=0), None, bad=np.empty(0, np.int64))
    threshold = chosen.threshold
    evaluation = evaluate(labels, chosen.values, clusters, threshold, seed=options.seed)
    curve = curve_behind(chosen.values, labels, clusters, noise.shares)
    behind = {}
    if noise.corrects:
        behind = {
            "auc": noise.shares.auc(evaluation.auc.value),
            "recall": curve.recall_at(threshold),
            "precision": curve.precision_at(threshold),
        }
    _say_thresholds(task, evaluation, chosen.values, labels, behind)
    part, suspects = describe_folds(folds, options), suspects_of(labelled, chosen.values)
    unit = folds.cluster_unit
    measured = Measured(labelled, chosen, evaluation, unit, part, suspects.rows)
    return Trained(
        models=models,
        measured=measured,
        self_tests=run_self_tests(models, measured, task, folds),
        histories=[fit.history for fit in fits],
        kept_epochs=[fit.history[-1].epoch if fit.recipe else 0 for fit in fits],
        split=_describe_parts(task.labelled.labels, folds),
        label_noise=noise,
        behind=behind,
        suspects=suspects,
    )


def _with_threshold(
    task: Task,
    folds: Folds,
    fit: CrossFit,
    noise: LabelNoise,
    scores: np.ndarray,
    temperature: float,
) -> Model:
    """Return the model of all labels with threshold and curve from out-of-fold scores (m,)."""
    options, rows = task.options, folds.rows
    labels, clusters = task.labelled.labels[rows], folds.clusters[rows]
    threshold = threshold_behind(options.threshold, scores, labels, noise.shares)
    curve = curve_behind(scores, labels, clusters, noise.shares)
    found = evaluate(labels, scores, clusters, threshold, seed=options.seed)
    warn_of_a_lax_threshold(found, labels, options.threshold, "labelled")
    provenance = {
        **task.provenance(rows),
        "folds": {
            "unit": folds.unit,
            "seed": options.seed,
            **{name: len(part) for name, part in folds.parts.items()},
        },
        "recipe": asdict(fit.recipe) if fit.recipe else None,
        LABEL_NOISE: noise.to_dict(),
        ESTIMATE: estimates_to_keep(found),
        CURVE: curve.to_dict(),
        HOME: home_of(fit.network, task, rows, folds),
        **({} if fit.recipe else {"fine_tuned_from": task.start.untrained[1] or None}),
    }
    return Model(fit.network, task.start.preprocess, threshold, temperature, provenance)


def _say_thresholds(
    task: Task,
    evaluation: Evaluation,
    scores: np.ndarray,
    labels: np.ndarray,
    behind: dict[str, float],
) -> None:
    """Log the threshold and its figures, by the labels and of the particles behind them."""
    request, threshold = task.options.threshold, evaluation.threshold
    plain = (
        f"AUC {evaluation.auc}, recall {evaluation.sensitivity}, precision {evaluation.precision}"
    )
    if not behind:
        log.info("Threshold %g for %s. Against the labels: %s.", threshold, request, plain)
        return
    taken = ""
    if request.kind in ("recall", "precision"):
        try:
            taken = f"; taking the labels as true, {choose_threshold(request, scores, labels):g}"
        except CryoFilterError:
            taken = "; taking the labels as true, there is none"
    log.info(
        "Threshold %g for %s of the particles behind the labels%s. Against the labels: %s. Of the "
        "particles behind them: AUC %.3f, recall %.3f, precision %.3f.",
        threshold, request, taken, plain, behind["auc"], behind["recall"], behind["precision"],
    )  # fmt: skip


def _describe_parts(labels: np.ndarray, split: Split | Folds) -> str:
    return ", ".join(
        f"{name} {len(rows):,} ({labels[rows].sum():,} good, "
        f"{counted(len(np.unique(split.clusters[rows])), split.cluster_unit)})"
        for name, rows in split.parts.items()
    )


def _announce(task: Task, split: Split | Folds) -> None:
    """Log what is trained on what, and what is doubtful about the split."""
    options, labelled, start = task.options, task.labelled, task.start
    labels, network = labelled.labels, start.network
    data, parts = counted(len(labelled), "labelled particle"), _describe_parts(labels, split)
    kinds = f"{labels.sum():,} good, {(~labels).sum():,} bad"
    log.info("%s: %s. Small images: %s.", data, kinds, task.loaded.images.where)
    if isinstance(split, Folds):
        log.info(
            "%s by %s, seed %d: %s. Figures are of every particle's score by a model that has not "
            "seen its %s; the model that is written is trained on all of them.",
            counted(len(split.held), "fold"), split.unit, options.seed, parts, split.unit,
        )  # fmt: skip
    else:
        log.info("Split by %s, seed %d: %s.", split.unit, options.seed, parts)
        share, asked = len(split.train) / len(labelled), options.split or 0.0
        if abs(share - asked) > 0.1:
            log.warning(
                "Whole %ss allow only %.0f %% for training (asked: %.0f %%); more of them would "
                "help.", split.unit, 100 * share, 100 * asked,
            )  # fmt: skip
    if split.unit == "particle" or split.unit != split.cluster_unit:
        log.warning(
            "The %s by %s: no micrographs are known, or too few hold both kinds. Neighbours may "
            "be on two sides, so figures may be somewhat too good.",
            "folds are" if isinstance(split, Folds) else "split is", split.unit,
        )  # fmt: skip
    weights = sum(parameter.numel() for parameter in network.parameters())
    size = f"{network.dim} px, {weights:,} weights"
    how = f"fine-tuned from {start.origin}" if start.origin else "from scratch"
    threads = counted(options.threads, "thread")
    log.info("Network %s, %s, %s; %s.", network.name, size, how, threads)

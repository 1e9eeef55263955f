"""Training as in 2020: a part to train on, one to choose the epoch and the threshold by, a test.

What an explicit ``--split`` asks for; without it, all labels are used (`crossfit`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from relion_cryofilter.evaluation import evaluate
from relion_cryofilter.files import CHECKPOINT, numbered
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.nn.home import HOME, home_of
from relion_cryofilter.nn.measurement import estimates_to_keep, warn_of_a_lax_threshold
from relion_cryofilter.nn.model import ESTIMATE, Model
from relion_cryofilter.nn.networks import choose_devices
from relion_cryofilter.nn.task import NOISE_SEED, Task
from relion_cryofilter.nn.trainer import Epoch, Trainer, TrainingData, predict
from relion_cryofilter.particles.splits import Split
from relion_cryofilter.progress import Progress
from relion_cryofilter.thresholds import CURVE, OperatingCurve, choose_threshold

NOISE_POOL = 512
TEMPERATURES = np.geomspace(0.2, 5.0, 241)

AfterEpoch = Callable[[int, Sequence[Epoch]], None]
"""Given a model's number, from 1, and its history after each epoch."""

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class Member:
    """One model of an ensemble (or the only one): what it is trained on, and how."""

    task: Task
    split: Split
    number: int  # from 1

    def fit(self, progress: Progress, after_epoch: AfterEpoch) -> tuple[Model, list[Epoch], int]:
        """Train and calibrate; return the model, its history and the number of the kept epoch."""
        task, split = self.task, self.split
        options, loaded, start = task.options, task.loaded, task.start
        # Weights, noise and the best epoch.
        torch.manual_seed(options.seed + self.number - 1)
        settings, noise = start.settings(options), None
        if settings.noise_share:
            noise = task.white_noise(split.train, NOISE_POOL, options.seed + NOISE_SEED)
        trainer = Trainer(
            copy.deepcopy(start.network),
            TrainingData(loaded.images, task.labelled.labels, split, noise),
            settings,
            task.folder / numbered(CHECKPOINT, self.number),
            task.identity(list(split.parts.values())),
            choose_devices(gpu_numbers(options.gpu))[0],
        )
        history = trainer.run(progress, lambda epochs: after_epoch(self.number, epochs))
        kept = trainer.best_number
        if not kept:
            log.warning(
                "No epoch did better on the validation part than %s did before (AUC %.4f), so its "
                "weights are kept; only the calibration and the threshold are new.",
                start.origin, trainer.start_auc,
            )  # fmt: skip
        return self._calibrated(trainer), history, kept

    def _calibrated(self, trainer: Trainer) -> Model:
        """Return the trainer's model with temperature and threshold from the validation part.

        A threshold for a recall is the quantile of few scores, so fine-tuning, which hardly fits
        the training part, takes that part's good particles in: benchmarks/results/quality_split.md.
        """
        labelled, loaded, split = self.task.labelled, self.task.loaded, self.split
        network, best, request = trainer.network, trainer.best_number, self.task.options.threshold
        rows, labels = split.validation, labelled.labels[split.validation]

        # Temperature and threshold.
        logits = predict(network, loaded.images, rows).numpy().astype(np.float64)
        temperature = fit_temperature(logits, labels)
        scores, more = calibrated(logits, temperature), np.array([])
        if trainer.settings.fine_tuning:
            known = split.train[labelled.labels[split.train]]
            logits = predict(network, loaded.images, known).numpy().astype(np.float64)
            more = calibrated(logits, temperature)
        curve = OperatingCurve.from_scores(labels, scores, split.clusters[rows], more)
        both = more.size > 0 and request.kind == "recall"
        threshold = curve.threshold(request) if both else choose_threshold(request, scores, labels)

        # What the validation part says of it.
        found = evaluate(
            labels, scores, split.clusters[rows], threshold, seed=self.task.options.seed
        )
        log.info(
            "%s Temperature %.2f. Threshold %g for %s%s; on the validation part alone recall %s, "
            "precision %s, %d of %d accepted.",
            f"Best epoch {best}." if best else "The weights of the start.", temperature, threshold,
            request, " of the good training and validation particles" if both else "",
            found.sensitivity, found.precision, (scores >= threshold).sum(), len(scores),
        )  # fmt: skip
        warn_of_a_lax_threshold(found, labels, request, "validation")
        provenance = {
            **self._provenance(),
            "settings": asdict(trainer.settings),
            "best_epoch": best,
            ESTIMATE: estimates_to_keep(found),
            CURVE: curve.to_dict(),
            HOME: home_of(network, self.task, np.concatenate([split.train, rows]), split),
        }
        preprocess = self.task.start.preprocess
        return Model(network, preprocess, threshold, temperature, provenance)

    def _provenance(self) -> dict[str, Any]:
        """Return what the model file says of the data and the options."""
        split, options = self.split, self.task.options
        return {
            **self.task.provenance(np.concatenate([split.train, split.validation])),
            "split": {
                "unit": split.unit,
                "train_fraction": options.split,
                "seed": options.seed,
                **{name: len(part) for name, part in split.parts.items()},
            },
        }


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that makes sigmoid(logit / temperature) most likely.

    Guo et al., "On calibration of modern neural networks", ICML 2017. Searched from 0.2 to 5, so
    that a small or perfectly separated validation set does not drive it to an extreme.
    """
    signed = np.where(labels, logits, -logits)[:, None]
    losses = np.logaddexp(0, -signed / TEMPERATURES).mean(axis=0)
    return float(TEMPERATURES[int(losses.argmin())])


def calibrated(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return sigmoid(logit / temperature), (n,), with the six decimals of a STAR file."""
    return np.asarray(np.round(1 / (1 + np.exp(-logits / temperature)), 6))

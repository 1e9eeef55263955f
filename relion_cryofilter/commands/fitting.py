"""Training one model: the epochs, then temperature and threshold from the validation part."""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relion_cryofilter.commands.models import CURVE, ESTIMATE
from relion_cryofilter.data.labelled import LabelledSet, Split, seen_units, short_hash
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.calibration import calibrated, fit_temperature
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.network import Network
from relion_cryofilter.nn.preprocess import Preprocess
from relion_cryofilter.nn.ranks import Ranks
from relion_cryofilter.nn.small_images import Loaded, noise_images
from relion_cryofilter.nn.training import (
    Epoch,
    Settings,
    Trainer,
    predict,
)
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.result_files import CHECKPOINT, HISTORY, MODEL
from relion_cryofilter.results.figures import save_history
from relion_cryofilter.results.metrics import evaluate
from relion_cryofilter.results.operating_curve import OperatingCurve
from relion_cryofilter.results.thresholds import choose_threshold
from relion_cryofilter.versions import versions

FROM_SCRATCH = {"epochs": 30, "batch_size": 64}
FROM_MODEL = {"epochs": 12, "batch_size": 32}
NOISE_SHARE, NOISE_POOL, NOISE_SEED = 0.05, 512, 10_000
HARDLY_FILTERS = 0.8

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class Start:
    """The network before training, its images, and the model that it is of; "" for none."""

    network: Network
    preprocess: Preprocess
    origin: str = ""

    @property
    def fine_tuning(self) -> bool:
        """Whether the network has been trained before."""
        return bool(self.origin)


def model_name(number: int) -> str:
    """Return model.safetensors, model_2.safetensors, …"""
    return _numbered(MODEL, number)


def fit(
    options: TrainOptions,
    labelled: LabelledSet,
    loaded: Loaded,
    split: Split,
    start: Start,
    folder: Path,
    number: int,
    progress: Progress,
    ranks: Ranks,
) -> Model:
    """Train, calibrate and write one model of an ensemble (or the only one).

    Parameters
    ----------
    options, labelled, loaded, split
        What to train on, and how.
    start
        Its network is copied.
    folder
        For the checkpoint and whatever has no folder of its own.
    number
        From 1; files of the first have no number.
    progress
        Counts image steps; may raise Aborted.
    ranks
        The processes that train together; the first writes.
    """
    torch.manual_seed(options.seed + number - 1)
    network = copy.deepcopy(start.network)
    settings, noise = settings_of(options, start.fine_tuning), None
    if settings.noise_share:
        box = int(np.median(loaded.boxes_px[split.train]))
        noise = start.preprocess(noise_images(box, NOISE_POOL, options.seed + NOISE_SEED))
    trainer = Trainer(
        network, loaded.images, labelled.labels, split, settings,
        folder / _numbered(CHECKPOINT, number), _identity(labelled, start, split, loaded),
        ranks.device(choose_devices(gpu_numbers(options.gpu)))[0], noise, ranks,
    )  # fmt: skip
    history_path = (options.history_dir or folder) / _numbered(HISTORY, number)
    history = trainer.run(
        progress, lambda epochs: _write_history(history_path, epochs) if ranks.first else None
    )
    if not ranks.first:
        return _calibrated(trainer, start, loaded, labelled, options)
    kept = trainer.best_number
    save_history(history_path.with_suffix(".png"), [asdict(epoch) for epoch in history], kept)
    if not kept:
        log.warning(
            "No epoch did better on the validation part than %s did before (AUC %.4f), so its "
            "weights are kept; only the calibration and the threshold are new.",
            start.origin, trainer.start_auc,
        )  # fmt: skip
    model = _calibrated(trainer, start, loaded, labelled, options)
    target = (options.weight_dir or folder) / model_name(number)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        log.info("Replacing %s by the new model.", target)
    model.save(target)
    log.info("Wrote %s (hash %s).", target, model.hash)
    return model


def settings_of(options: TrainOptions, fine_tuning: bool) -> Settings:
    """Return how to train."""
    usual = FROM_MODEL if fine_tuning else FROM_SCRATCH
    return Settings(
        epochs=options.epochs or usual["epochs"],
        patience=options.patience,
        batch_size=options.batch_size or usual["batch_size"],
        learning_rate=options.learning_rate,
        augmentation=options.augmentation,
        seed=options.seed,
        noise_share=NOISE_SHARE if fine_tuning else 0.0,
        fine_tuning=fine_tuning,
    )


def _numbered(name: str, number: int) -> str:
    path = Path(name)
    return name if number == 1 else f"{path.stem}_{number}{path.suffix}"


def _identity(labelled: LabelledSet, start: Start, split: Split, loaded: Loaded) -> dict[str, Any]:
    """Return what a checkpoint must agree on to be gone on from."""
    particles = labelled.particles
    stats = [(path, path.stat()) for path in particles.stacks if path.exists()]
    rows = " ".join(particles.image_name(row) for row in range(len(particles)))
    parts = [part.tolist() for part in split.parts.values()]
    dark = f" inverted {particles.inverted}" if any(particles.inverted) else ""
    return {
        "labels": labelled.fingerprint,
        "rows": short_hash(f"{rows} {parts}"),
        "stacks": short_hash(" ".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats) + dark),
        "images": loaded.images.precision,
        "network": json.dumps(
            [start.network.name, start.network.kwargs, start.preprocess.to_dict()]
        ),
        "init": start.origin,
    }


def _write_history(path: Path, history: Sequence[Epoch]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, Epoch.__dataclass_fields__, lineterminator="\n")
    writer.writeheader()
    for epoch in history:
        row = {name: f"{value:.6g}" for name, value in asdict(epoch).items()}
        writer.writerow(row)
    write_text(path, text.getvalue())


def _calibrated(
    trainer: Trainer,
    start: Start,
    loaded: Loaded,
    labelled: LabelledSet,
    options: TrainOptions,
) -> Model:
    """Return the trainer's model with temperature and threshold from the validation part.

    A threshold for a recall is the quantile of few scores, so fine-tuning, which hardly fits the
    training part, takes that part's good particles in (benchmarks/results/quality.md).
    """
    network, split, best = trainer.network, trainer.split, trainer.best_number
    rows, labels = split.validation, labelled.labels[split.validation]
    logits = predict(network, loaded.images, rows).numpy().astype(np.float64)
    temperature = fit_temperature(logits, labels)
    scores = calibrated(logits, temperature)
    more = np.array([])
    if start.fine_tuning:
        known = split.train[labelled.labels[split.train]]
        trained = predict(network, loaded.images, known).numpy().astype(np.float64)
        more = calibrated(trained, temperature)
    curve = OperatingCurve.from_scores(labels, scores, split.clusters[rows], more)
    both = more.size > 0 and options.threshold.kind == "recall"
    if both:
        threshold = curve.threshold(options.threshold)
    else:
        threshold = choose_threshold(options.threshold, scores, labels)
    evaluation = evaluate(labels, scores, split.clusters[rows], threshold, seed=options.seed)
    log.info(
        "%s Temperature %.2f. Threshold %g for %s%s; on the validation part alone recall %s, "
        "precision %s, %d of %d accepted.",
        f"Best epoch {best}." if best else "The weights of the start.", temperature, threshold,
        options.threshold, " of the good training and validation particles" if both else "",
        evaluation.sensitivity, evaluation.precision, (scores >= threshold).sum(), len(scores),
    )  # fmt: skip
    bad_accepted = 1 - evaluation.specificity.value
    if bad_accepted > HARDLY_FILTERS:
        log.warning(
            "This threshold accepts %.0f %% of the bad validation particles: it hardly filters. "
            "The model has learnt too little, or %d good validation particles are too few for %s; "
            "try more labels, or score with --threshold recall=0.9 or keep=0.6.",
            100 * bad_accepted, labels.sum(), options.threshold,
        )  # fmt: skip
    provenance = {
        "seen": seen_units(
            labelled.particles.take(np.concatenate([split.train, split.validation]))
        ),
        "source": labelled.particles.source,
        "labels": list(labelled.notes),
        "n_good": int(labelled.labels.sum()),
        "n_bad": int((~labelled.labels).sum()),
        "split": {"unit": split.unit, "train_fraction": options.split, "seed": options.seed,
                  **{name: len(part) for name, part in split.parts.items()}},
        "settings": asdict(trainer.settings),
        "fine_tuned_from": start.origin or None,
        "best_epoch": best,
        ESTIMATE: {
            name: [None if np.isnan(value) else value for value in interval]
            for name, interval in (("recall", evaluation.sensitivity),
                                   ("precision", evaluation.precision), ("auc", evaluation.auc))
        },
        "pixel_sizes_angstrom": sorted(
            {group.pixel_size_angstrom for group in labelled.particles.optics
             if group.pixel_size_angstrom}
        ),
        "boxes_px": np.unique(loaded.boxes_px[loaded.boxes_px > 0]).tolist(),
        "threshold_request": str(options.threshold),
        CURVE: curve.to_dict(),
        "versions": versions(),
    }  # fmt: skip
    return Model(network, start.preprocess, threshold, temperature, provenance)

"""``train``: labelled particles in; a model, its history and an honest figure of it out."""

from __future__ import annotations

import csv
import io
import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import relion_cryofilter
from relion_cryofilter.commands import Output
from relion_cryofilter.commands.evaluation import write_evaluation
from relion_cryofilter.commands.metrics import results_folder
from relion_cryofilter.commands.models import CURVE, check_pixel_size
from relion_cryofilter.commands.selftests import log_self_tests, run_self_tests, unit_name
from relion_cryofilter.data.labelled import LabelledSet, Split, split_by_micrograph
from relion_cryofilter.data.stacks import read_header
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.checkpoint import Model, load_model
from relion_cryofilter.nn.network import Network
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.preprocess import BlurResize, Preprocess, preprocess_from_dict
from relion_cryofilter.nn.small_images import Loaded, load_small_images
from relion_cryofilter.nn.training import (
    Epoch,
    Settings,
    Trainer,
    fit_temperature,
    predict,
)
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion.labels import read_labels
from relion_cryofilter.results.figures import save_history
from relion_cryofilter.results.metrics import evaluate
from relion_cryofilter.results.operating_curve import OperatingCurve
from relion_cryofilter.results.thresholds import choose_threshold

MODEL, HISTORY, CHECKPOINT = "model.safetensors", "history.csv", "checkpoint_last.pt"
DEFAULT_NETWORK = "straight"

log = logging.getLogger("relion_cryofilter")


def train(
    options: TrainOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Train a model; write model.safetensors, history.csv, the test figures and a checkpoint.

    A job that was stopped goes on after its last finished epoch when it is started again with the
    same options in the same folder.

    Raises
    ------
    CryoFilterError
        Something is wrong with the labels, the images or an option.
    Aborted
        `abort_requested` said True.
    """
    folder = results_folder(options.o, options.out_dir)
    if options.threshold.kind == "count":
        raise UsageError(
            "--threshold count=… is for score and select; train knows no set to count."
        )
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    labelled = read_labels(
        options.in_parts, options.pos, options.neg, options.pos_classes, options.neg_classes
    )
    for note in labelled.notes:
        log.info("%s", note)
    network, preprocess = _network(options, labelled)
    labelled, loaded = _load(labelled, preprocess, options, abort_requested)
    split = split_by_micrograph(labelled.particles, labelled.labels, options.split, options.seed)
    _announce(labelled, split, network, loaded, options)
    trainer = Trainer(
        network, loaded.images, labelled.labels, split, _settings(options),
        folder / CHECKPOINT, _identity(options, labelled, network, preprocess),
    )  # fmt: skip
    steps = options.epochs * len(split.train)
    history = trainer.run(Progress(steps, "image steps", abort_requested))
    _write_history(options.history_dir or folder, history)
    model = _calibrated(network, preprocess, loaded, labelled, split, options, trainer.best)
    _save(model, options.weight_dir or folder)
    _measure(folder, model, loaded, labelled, split, options)
    log.info("Results are in %s/", folder)
    return ()


def _network(options: TrainOptions, labelled: LabelledSet) -> tuple[Network, Preprocess]:
    """Return the network to train: a new one, or that of ``--init``."""
    if options.init is not None:
        model = load_model(options.init)
        found = {
            "model": model.network.name,
            "f": model.network.kwargs.get("f"),
            "img_dim": model.network.dim,
            "preprocess": model.preprocess.to_dict()["name"],
        }
        for name, value in found.items():
            asked = getattr(options, name)
            if asked is not None and asked != value:
                raise UsageError(f"--{name} is {asked}, but {options.init} has {value}.")
        check_pixel_size([model], labelled.particles)
        return model.network, model.preprocess
    name = options.model or DEFAULT_NETWORK
    network = build_network(name, f=options.f or 32, dim=options.img_dim or 28)
    recipe = {"name": options.preprocess or BlurResize.name, "dim": network.dim}
    if network.channels > 1:
        recipe["roberts"] = True
    return network, preprocess_from_dict(recipe)


def _load(
    labelled: LabelledSet,
    preprocess: Preprocess,
    options: TrainOptions,
    abort_requested: Callable[[], bool],
) -> tuple[LabelledSet, Loaded]:
    """Read the images; leave out those that can't be used, if that is allowed."""
    progress = Progress(len(labelled), "images read", abort_requested)
    memory = options.max_memory * 1e9
    loaded = load_small_images(
        labelled.particles, preprocess, progress, threads=options.threads, max_memory_bytes=memory
    )
    if not len(loaded.bad):
        return labelled, loaded
    if not options.skip_bad:
        loaded.bad.refuse()
    log.warning("%s\nThey are left out.", loaded.bad.summary())
    labelled = labelled.take(np.setdiff1d(np.arange(len(labelled)), loaded.bad.rows))
    return labelled, load_small_images(
        labelled.particles,
        preprocess,
        Progress(len(labelled), "images read", abort_requested),
        threads=options.threads,
        max_memory_bytes=memory,
    )


def _announce(
    labelled: LabelledSet, split: Split, network: Network, loaded: Loaded, options: TrainOptions
) -> None:
    labels = labelled.labels
    log.info(
        "%s labelled particles: %s good, %s bad. Small images: %s.",
        f"{len(labelled):,}", f"{labels.sum():,}", f"{(~labels).sum():,}", loaded.images.where,
    )  # fmt: skip
    parts = ", ".join(
        f"{name} {len(rows):,} ({labels[rows].sum():,} good, {len(np.unique(split.groups[rows]))} "
        f"{unit_name(labelled, split)}s)"
        for name, rows in split.parts.items()
    )
    log.info("Split by %s, seed %d: %s.", split.unit, options.seed, parts)
    share = len(split.train) / len(labelled)
    if abs(share - options.split) > 0.1:
        log.warning(
            "Whole %ss allow only %.0f %% for training (asked: %.0f %%); more of them would help.",
            split.unit, 100 * share, 100 * options.split,
        )  # fmt: skip
    if split.unit == "particle":
        log.warning(
            "The split is by particle: no micrographs are known, or too few hold both kinds. "
            "Neighbours may be on two sides, so figures may be somewhat too good."
        )
    weights = sum(parameter.numel() for parameter in network.parameters())
    log.info(
        "Network %s, %d px, %s weights%s; %d thread(s).",
        network.name, network.dim, f"{weights:,}",
        f", from {options.init}" if options.init else "", options.threads,
    )  # fmt: skip
    if options.gpu:
        log.info("--gpu %s: training uses the processor.", options.gpu)


def _settings(options: TrainOptions) -> Settings:
    names = Settings.__dataclass_fields__
    return Settings(**{name: getattr(options, name) for name in names})


def _identity(
    options: TrainOptions, labelled: LabelledSet, network: Network, preprocess: Preprocess
) -> dict[str, Any]:
    """Return what a checkpoint must agree on to be gone on from."""
    start = load_model(options.init).hash if options.init else ""
    return {
        "fingerprint": labelled.fingerprint,
        "split": options.split,
        "network": json.dumps([network.name, network.kwargs, preprocess.to_dict()]),
        "init": start,
    }


def _write_history(folder: Path, history: Sequence[Epoch]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, Epoch.__dataclass_fields__, lineterminator="\n")
    writer.writeheader()
    for epoch in history:
        row = {name: f"{value:.6g}" for name, value in asdict(epoch).items()}
        writer.writerow(row)
    write_text(folder / HISTORY, text.getvalue())
    save_history(folder / "history.png", [asdict(epoch) for epoch in history])


def _calibrated(
    network: Network,
    preprocess: Preprocess,
    loaded: Loaded,
    labelled: LabelledSet,
    split: Split,
    options: TrainOptions,
    best: Epoch,
) -> Model:
    """Return the model with temperature and threshold from the validation part."""
    rows, labels = split.validation, labelled.labels[split.validation]
    logits = predict(network, loaded.images, rows).numpy().astype(np.float64)
    temperature = fit_temperature(logits, labels)
    scores = np.round(1 / (1 + np.exp(-logits / temperature)), 6)
    threshold = choose_threshold(options.threshold, scores, labels)
    curve = OperatingCurve.from_scores(labels, scores, split.groups[rows])
    evaluation = evaluate(labels, scores, split.groups[rows], threshold, seed=options.seed)
    log.info(
        "Best epoch %d. Temperature %.2f. Threshold %g for %s; on the validation part recall %s, "
        "precision %s, %d of %d accepted.",
        best.epoch, temperature, threshold, options.threshold, evaluation.sensitivity,
        evaluation.precision, (scores >= threshold).sum(), len(scores),
    )  # fmt: skip
    provenance = {
        "fingerprint": labelled.fingerprint,
        "source": labelled.particles.source,
        "labels": list(labelled.notes),
        "n_good": int(labelled.labels.sum()),
        "n_bad": int((~labelled.labels).sum()),
        "split": {"unit": split.unit, "train_fraction": options.split, "seed": options.seed,
                  **{name: len(part) for name, part in split.parts.items()}},
        "settings": asdict(_settings(options)),
        "best_epoch": best.epoch,
        "validation": {
            name: [None if np.isnan(value) else value for value in interval]
            for name, interval in (("recall", evaluation.sensitivity),
                                   ("precision", evaluation.precision), ("auc", evaluation.auc))
        },
        "pixel_sizes_angstrom": sorted(
            {group.pixel_size_angstrom for group in labelled.particles.optics
             if group.pixel_size_angstrom}
        ),
        "boxes_px": sorted({read_header(path).nx for path in labelled.particles.stacks}),
        "threshold_request": str(options.threshold),
        CURVE: curve.to_dict(),
        "versions": {"relion_cryofilter": relion_cryofilter.__version__,
                     "torch": str(torch.__version__), "numpy": np.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    return Model(network, preprocess, threshold, temperature, provenance)


def _save(model: Model, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / MODEL)
    log.info("Wrote %s (hash %s).", folder / MODEL, model.hash)


def _measure(
    folder: Path,
    model: Model,
    loaded: Loaded,
    labelled: LabelledSet,
    split: Split,
    options: TrainOptions,
) -> None:
    """Measure the model on the test part and ask the self-tests."""
    test = labelled.take(split.test)
    small = loaded.images.get(split.test)
    scores = np.round(model.probabilities(small).numpy().astype(np.float64), 6)
    evaluation = evaluate(
        test.labels, scores, split.groups[split.test], model.threshold, seed=options.seed
    )
    tests = run_self_tests(model, loaded, labelled, split, options.seed)
    about = {
        "data": labelled.particles.source,
        "part": f"test part of a split by {split.unit}, --split {options.split:g}"
        f" --seed {options.seed}",
        "model": model.hash,
        "threshold_request": str(options.threshold),
        "self_tests": [asdict(item) for item in tests],
    }
    write_evaluation(folder, test.particles, test.labels, scores, evaluation, about)
    log.info("On the test part, which played no role in training:\n%s", evaluation.summary())
    log_self_tests(tests)

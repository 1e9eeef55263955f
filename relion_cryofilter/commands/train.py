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
from relion_cryofilter.commands.metrics import labelled_set, results_folder
from relion_cryofilter.commands.models import CURVE, ESTIMATE, check_pixel_size
from relion_cryofilter.commands.selftests import log_self_tests, run_self_tests
from relion_cryofilter.commands.subsets import refuse_to_overwrite
from relion_cryofilter.data.labelled import (
    LabelledSet,
    Split,
    seen_units,
    short_hash,
    split_by_micrograph,
)
from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.checkpoint import Model, load_model
from relion_cryofilter.nn.devices import choose_devices
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
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.results.figures import save_history
from relion_cryofilter.results.metrics import evaluate
from relion_cryofilter.results.operating_curve import OperatingCurve
from relion_cryofilter.results.thresholds import choose_threshold

MODEL, HISTORY, CHECKPOINT = "model.safetensors", "history.csv", "checkpoint_last.pt"
DEFAULT_NETWORK = "straight"
HARDLY_FILTERS = 0.8

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
    labelled = labelled_set(options)
    network, preprocess = _network(options, labelled)
    split = split_by_micrograph(labelled.particles, labelled.labels, options.split, options.seed)
    loaded = _load(labelled, preprocess, options, abort_requested)
    split = split.without(loaded.bad.rows)
    _check_parts(split, labelled.labels)
    _announce(labelled, split, network, loaded, options)
    trainer = Trainer(
        network, loaded.images, labelled.labels, split, _settings(options),
        folder / CHECKPOINT, _identity(options, labelled, network, preprocess, split, loaded),
        choose_devices(gpu_numbers(options.gpu))[0],
    )  # fmt: skip
    steps = options.epochs * len(split.train)
    history_folder = options.history_dir or folder
    history = trainer.run(
        Progress(steps, "image steps", abort_requested),
        lambda epochs: _write_history(history_folder, epochs),
    )
    save_history(history_folder / "history.png", [asdict(epoch) for epoch in history])
    model = _calibrated(network, preprocess, loaded, labelled, split, options, trainer.best)
    _save(model, options.weight_dir or folder)
    _measure(folder, model, loaded, labelled, split, options)
    log.info("Results are in %s/", folder)
    return ()


def _network(options: TrainOptions, labelled: LabelledSet) -> tuple[Network, Preprocess]:
    """Return the network to train: a new one, or that of ``--init``."""
    if options.init is not None:
        target = (options.weight_dir or options.o or options.out_dir or Path()) / MODEL
        refuse_to_overwrite([options.init], [target])
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
) -> Loaded:
    """Read the images; those that can't be used are refused, or left out if that is allowed."""
    loaded = load_small_images(
        labelled.particles,
        preprocess,
        Progress(len(labelled), "images read", abort_requested),
        threads=options.threads,
        max_memory_bytes=options.max_memory * 1e9,
    )
    if not options.skip_bad:
        loaded.bad.refuse("--skip_bad leaves them out")
    elif len(loaded.bad):
        log.warning("%s\nThey are left out.", loaded.bad.summary())
    return loaded


def _check_parts(split: Split, labels: np.ndarray) -> None:
    for name, rows in split.parts.items():
        if len(set(labels[rows].tolist())) < 2:
            raise CryoFilterError(
                f"The {name} part has no {'bad' if labels[rows].any() else 'good'} particle left. "
                "Mend the images or label more."
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
        f"{name} {len(rows):,} ({labels[rows].sum():,} good, "
        f"{len(np.unique(split.clusters[rows]))} {split.cluster_unit}s)"
        for name, rows in split.parts.items()
    )
    log.info("Split by %s, seed %d: %s.", split.unit, options.seed, parts)
    share = len(split.train) / len(labelled)
    if abs(share - options.split) > 0.1:
        log.warning(
            "Whole %ss allow only %.0f %% for training (asked: %.0f %%); more of them would help.",
            split.unit, 100 * share, 100 * options.split,
        )  # fmt: skip
    if split.unit == "particle" or split.unit != split.cluster_unit:
        log.warning(
            "The split is by %s: no micrographs are known, or too few hold both kinds. Neighbours "
            "may be on two sides, so figures may be somewhat too good.", split.unit,
        )  # fmt: skip
    weights = sum(parameter.numel() for parameter in network.parameters())
    log.info(
        "Network %s, %d px, %s weights%s; %d thread(s).",
        network.name, network.dim, f"{weights:,}",
        f", from {options.init}" if options.init else "", options.threads,
    )  # fmt: skip


def _settings(options: TrainOptions) -> Settings:
    names = Settings.__dataclass_fields__
    return Settings(**{name: getattr(options, name) for name in names})


def _identity(
    options: TrainOptions,
    labelled: LabelledSet,
    network: Network,
    preprocess: Preprocess,
    split: Split,
    loaded: Loaded,
) -> dict[str, Any]:
    """Return what a checkpoint must agree on to be gone on from."""
    particles = labelled.particles
    stats = [(path, path.stat()) for path in particles.stacks if path.exists()]
    rows = " ".join(particles.image_name(row) for row in range(len(particles)))
    parts = [part.tolist() for part in split.parts.values()]
    return {
        "labels": labelled.fingerprint,
        "rows": short_hash(f"{rows} {parts}"),
        "stacks": short_hash(" ".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats)),
        "images": loaded.images.precision,
        "network": json.dumps([network.name, network.kwargs, preprocess.to_dict()]),
        "init": load_model(options.init).hash if options.init else "",
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
    curve = OperatingCurve.from_scores(labels, scores, split.clusters[rows])
    evaluation = evaluate(labels, scores, split.clusters[rows], threshold, seed=options.seed)
    log.info(
        "Best epoch %d. Temperature %.2f. Threshold %g for %s; on the validation part recall %s, "
        "precision %s, %d of %d accepted.",
        best.epoch, temperature, threshold, options.threshold, evaluation.sensitivity,
        evaluation.precision, (scores >= threshold).sum(), len(scores),
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
        "settings": asdict(_settings(options)),
        "best_epoch": best.epoch,
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
        test.labels, scores, split.clusters[split.test], model.threshold, seed=options.seed
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

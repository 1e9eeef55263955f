"""From labelled particles to trained models, measured on particles that they have not seen."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.evaluation import evaluate
from relion_cryofilter.files import CHECKPOINT, numbered
from relion_cryofilter.images.contrast import refuse_dark
from relion_cryofilter.images.preprocess import Preprocess, preprocess_from_dict
from relion_cryofilter.images.small_images import Loaded, load_small_images, noise_images
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.nn.measurement import Measured, describe_test_part
from relion_cryofilter.nn.model import BUNDLED_MODEL, ESTIMATE, Model, Models, load_model
from relion_cryofilter.nn.networks import Network, build_network, choose_devices, network_class
from relion_cryofilter.nn.selftests import SelfTest, run_self_tests
from relion_cryofilter.nn.trainer import Epoch, Settings, Trainer, TrainingData, predict
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.particles.labels import LabelledSet
from relion_cryofilter.particles.splits import Split, seen_units, short_hash, split_by_micrograph
from relion_cryofilter.processes import versions
from relion_cryofilter.progress import Progress, counted
from relion_cryofilter.thresholds import CURVE, OperatingCurve, choose_threshold

DEFAULT_NETWORK = "straight"
FROM_SCRATCH = {"epochs": 30, "batch_size": 64}
FROM_MODEL = {"epochs": 12, "batch_size": 32}
NOISE_SHARE, NOISE_POOL, NOISE_SEED = 0.05, 512, 10_000
HARDLY_FILTERS = 0.8
TEMPERATURES = np.geomspace(0.2, 5.0, 241)

log = logging.getLogger("relion_cryofilter")

AfterEpoch = Callable[[int, Sequence[Epoch]], None]
"""Given a model's number, from 1, and its history after each epoch."""


@dataclass(frozen=True)
class Start:
    """The network before training, its images, and the model that it is of; "" for none."""

    network: Network
    preprocess: Preprocess
    origin: str = ""

    def settings(self, options: TrainOptions) -> Settings:
        """Return how to train from here; one that is of a model is fine-tuned."""
        usual = FROM_MODEL if self.origin else FROM_SCRATCH
        return Settings(
            epochs=options.epochs or usual["epochs"],
            patience=options.patience,
            batch_size=options.batch_size or usual["batch_size"],
            learning_rate=options.learning_rate,
            augmentation=options.augmentation,
            seed=options.seed,
            noise_share=NOISE_SHARE if self.origin else 0.0,
            fine_tuning=bool(self.origin),
        )


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gives.

    Attributes
    ----------
    models
        One, or those of the ensemble.
    measured
        The figures of the test part, which played no role in training.
    self_tests
        Whether the figures could be too good to be true.
    histories, kept_epochs
        The epochs of each model, and whose weights it has; 0 for those before any training.
    split
        The parts, in words.
    """

    models: Models
    measured: Measured
    self_tests: Sequence[SelfTest]
    histories: Sequence[Sequence[Epoch]]
    kept_epochs: Sequence[int]
    split: str

    def figures(self, options: TrainOptions) -> dict[str, Any]:
        """Return what metrics.json holds."""
        return {
            "data": self.measured.labelled.particles.source,
            "part": self.measured.part,
            "model": ", ".join(model.hash for model in self.models),
            "threshold_request": str(options.threshold),
            "self_tests": [asdict(item) for item in self.self_tests],
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
        Holds a checkpoint a model, from which a stopped training is resumed.
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
    start = _start(options, labelled)

    # The parts, and every image once; images that can't be used leave their part.
    split = split_by_micrograph(labelled.particles, labelled.labels, options.split, options.seed)
    loaded = load_small_images(
        labelled.particles,
        start.preprocess,
        Progress(len(labelled), "images read", abort_requested),
        threads=options.threads,
        max_memory_bytes=options.max_memory * 1e9,
    )
    if not options.skip_bad:
        loaded.bad.refuse("--skip_bad leaves them out")
    elif len(loaded.bad):
        log.warning("%s\nThey are left out.", loaded.bad.summary())
    split = split.without(loaded.bad.rows)
    for name, rows in split.parts.items():
        if len(set(labelled.labels[rows].tolist())) < 2:
            raise CryoFilterError(
                f"The {name} part has no {'bad' if labelled.labels[rows].any() else 'good'} "
                "particle left. Check the images or label more."
            )
    if not options.any_contrast:
        good = np.flatnonzero(labelled.labels & (loaded.boxes_px > 0))
        refuse_dark(loaded.contrast[good], split.clusters[good], labelled.particles.source)
    _announce(labelled, split, start, loaded, options)

    # The models, each with a validation part of its own.
    members = split.members(labelled.labels, options.ensemble, options.seed)
    steps = start.settings(options).epochs * sum(len(member.train) for member in members)
    progress = Progress(steps, "image steps", abort_requested)
    fits = []
    for number, member in enumerate(members, 1):
        one = _Member(options, labelled, loaded, member, start, folder, number)
        fits.append(one.fit(progress, after_epoch))
    models = Models(tuple(fit[0] for fit in fits), tuple(f"hash {fit[0].hash}" for fit in fits))

    # The test part, which played no role so far.
    test, small = labelled.take(split.test), loaded.images.get(split.test)
    each = np.stack([model.probabilities(small).double().numpy() for model in models])
    chosen = models.choose(each.mean(axis=0), None)
    clusters, threshold, seed = split.clusters[split.test], chosen.threshold, options.seed
    evaluation = evaluate(test.labels, chosen.values, clusters, threshold, seed=seed)
    part = describe_test_part(split, options)
    return Trained(
        models=models,
        measured=Measured(test, chosen, evaluation, split.cluster_unit, part),
        self_tests=run_self_tests(models, threshold, loaded, labelled, split, seed),
        histories=[fit[1] for fit in fits],
        kept_epochs=[fit[2] for fit in fits],
        split=_describe_parts(labelled.labels, split),
    )


def _start(options: TrainOptions, labelled: LabelledSet) -> Start:
    """Return the network to train: that of ``--init``, the bundled one, or a new one."""
    new = any((options.model, options.f, options.img_dim, options.preprocess))
    if options.init is None and new:
        name = options.model or DEFAULT_NETWORK
        kind = network_class(name)
        if options.f is not None and "f" not in kind.parameters_of():
            raise UsageError(f"--f {options.f} is not for --model {name}.")
        if options.preprocess not in (None, *kind.recipes):
            raise UsageError(f"--preprocess {options.preprocess} is not for --model {name}.")
        chosen = {"f": options.f, "dim": options.img_dim}
        network = build_network(name, **{k: v for k, v in chosen.items() if v is not None})
        return Start(network, preprocess_from_dict(network.recipe(options.preprocess)))
    path = options.init or BUNDLED_MODEL
    model = load_model(path)
    asked = {"model": options.model, "f": options.f, "img_dim": options.img_dim}
    model.check_belief(path, **asked, preprocess=options.preprocess)
    if options.init is not None:
        Models((model,), (str(path),)).check(labelled.particles)
    origin = str(options.init or "the bundled model")
    return Start(model.network, model.preprocess, f"{origin} (hash {model.hash})")


def _describe_parts(labels: np.ndarray, split: Split) -> str:
    return ", ".join(
        f"{name} {len(rows):,} ({labels[rows].sum():,} good, "
        f"{counted(len(np.unique(split.clusters[rows])), split.cluster_unit)})"
        for name, rows in split.parts.items()
    )


def _announce(
    labelled: LabelledSet, split: Split, start: Start, loaded: Loaded, options: TrainOptions
) -> None:
    """Log what is trained on what, and what is doubtful about the split."""
    labels, network = labelled.labels, start.network
    data, parts = counted(len(labelled), "labelled particle"), _describe_parts(labels, split)
    kinds = f"{labels.sum():,} good, {(~labels).sum():,} bad"
    log.info("%s: %s. Small images: %s.", data, kinds, loaded.images.where)
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
    size = f"{network.dim} px, {weights:,} weights"
    how = f"fine-tuned from {start.origin}" if start.origin else "from scratch"
    threads = counted(options.threads, "thread")
    log.info("Network %s, %s, %s; %s.", network.name, size, how, threads)


@dataclass(frozen=True, eq=False)
class _Member:
    """One model of an ensemble (or the only one): what it is trained on, and how."""

    options: TrainOptions
    labelled: LabelledSet
    loaded: Loaded
    split: Split
    start: Start
    folder: Path
    number: int  # from 1

    def fit(self, progress: Progress, after_epoch: AfterEpoch) -> tuple[Model, list[Epoch], int]:
        """Train and calibrate; return the model, its history and the number of the kept epoch."""
        options, labelled, loaded = self.options, self.labelled, self.loaded
        particles, split, start = self.labelled.particles, self.split, self.start
        # What a checkpoint must agree on to be resumed.
        rows = " ".join(particles.image_name(row) for row in range(len(particles)))
        parts = [part.tolist() for part in split.parts.values()]
        stats = [(path, path.stat()) for path in particles.stacks if os.path.exists(path)]  # noqa: PTH110
        dark = f" inverted {particles.inverted}" if any(particles.inverted) else ""
        stacks = " ".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats) + dark
        kind = [start.network.name, start.network.kwargs, start.preprocess.to_dict()]
        identity = {
            "labels": labelled.fingerprint,
            "rows": short_hash(f"{rows} {parts}"),
            "stacks": short_hash(stacks),
            "images": loaded.images.precision,
            "network": json.dumps(kind),
            "init": start.origin,
        }
        # Weights, noise and the best epoch.
        torch.manual_seed(options.seed + self.number - 1)
        settings, noise = start.settings(options), None
        if settings.noise_share:
            box = int(np.median(loaded.boxes_px[split.train]))
            noise = start.preprocess(noise_images(box, NOISE_POOL, options.seed + NOISE_SEED))
        trainer = Trainer(
            copy.deepcopy(start.network),
            TrainingData(loaded.images, labelled.labels, split, noise),
            settings,
            self.folder / numbered(CHECKPOINT, self.number),
            identity,
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
        the training part, takes that part's good particles in (benchmarks/results/quality.md).
        """
        labelled, loaded, split = self.labelled, self.loaded, self.split
        network, best, request = trainer.network, trainer.best_number, self.options.threshold
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
        found = evaluate(labels, scores, split.clusters[rows], threshold, seed=self.options.seed)
        log.info(
            "%s Temperature %.2f. Threshold %g for %s%s; on the validation part alone recall %s, "
            "precision %s, %d of %d accepted.",
            f"Best epoch {best}." if best else "The weights of the start.", temperature, threshold,
            request, " of the good training and validation particles" if both else "",
            found.sensitivity, found.precision, (scores >= threshold).sum(), len(scores),
        )  # fmt: skip
        bad_accepted = 1 - found.specificity.value
        if bad_accepted > HARDLY_FILTERS:
            log.warning(
                "This threshold accepts %.0f %% of the bad validation particles: it hardly "
                "filters. The model has learnt too little, or %d good validation particles are too "
                "few for %s; try more labels, or score with --threshold recall=0.9 or keep=0.6.",
                100 * bad_accepted, labels.sum(), request,
            )  # fmt: skip
        estimates = {"recall": found.sensitivity, "precision": found.precision, "auc": found.auc}
        provenance = {
            **self._provenance(),
            "settings": asdict(trainer.settings),
            "best_epoch": best,
            ESTIMATE: {
                name: [None if np.isnan(value) else value for value in interval]
                for name, interval in estimates.items()
            },
            CURVE: curve.to_dict(),
        }
        return Model(network, self.start.preprocess, threshold, temperature, provenance)

    def _provenance(self) -> dict[str, Any]:
        """Return what the model file says of the data and the options."""
        labelled, split, options = self.labelled, self.split, self.options
        particles, boxes = labelled.particles, self.loaded.boxes_px
        sizes = {group.pixel_size_angstrom for group in particles.optics}
        return {
            "seen": seen_units(particles.take(np.concatenate([split.train, split.validation]))),
            "source": particles.source,
            "labels": list(labelled.notes),
            "n_good": int(labelled.labels.sum()),
            "n_bad": int((~labelled.labels).sum()),
            "split": {
                "unit": split.unit,
                "train_fraction": options.split,
                "seed": options.seed,
                **{name: len(part) for name, part in split.parts.items()},
            },
            "fine_tuned_from": self.start.origin or None,
            "pixel_sizes_angstrom": sorted(size for size in sizes if size),
            "boxes_px": np.unique(boxes[boxes > 0]).tolist(),
            "threshold_request": str(options.threshold),
            "versions": versions(),
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

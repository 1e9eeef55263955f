"""``train``: labelled particles in; a model, its history and an honest figure of it out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.closing import log_files
from relion_cryofilter.commands.contrast import refuse_dark
from relion_cryofilter.commands.evaluation import write_evaluation
from relion_cryofilter.commands.fitting import Start, fit, model_name, settings_of
from relion_cryofilter.commands.metrics import (
    describe_test_part,
    labelled_set,
    results_folder,
)
from relion_cryofilter.commands.models import BUNDLED_MODEL, check_pixel_size, resolve_threshold
from relion_cryofilter.commands.report import Tested, write_test_report
from relion_cryofilter.commands.selftests import log_self_tests, run_self_tests
from relion_cryofilter.commands.subsets import refuse_to_overwrite
from relion_cryofilter.data.labelled import LabelledSet, Split, split_by_micrograph
from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.nn.checkpoint import Model, load_model
from relion_cryofilter.nn.equivariant import D4
from relion_cryofilter.nn.network import Network
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.preprocess import (
    BlurResize,
    FourierCrop,
    Preprocess,
    preprocess_from_dict,
)
from relion_cryofilter.nn.ranks import join_ranks
from relion_cryofilter.nn.small_images import Loaded, load_small_images
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.result_files import HISTORY, LOGFILE, METRICS, MODEL, PREDICTIONS, REPORT
from relion_cryofilter.results.metrics import evaluate
from relion_cryofilter.wording import counted

DEFAULT_NETWORK = "straight"
WIDTHS = (4, 8, 16)

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
    return train_on(labelled_set(options), options, folder, abort_requested)


def train_on(
    labelled: LabelledSet,
    options: TrainOptions,
    folder: Path,
    abort_requested: Callable[[], bool] = lambda: False,
) -> tuple[Output, ...]:
    """Train on labelled particles as the options say; results go to `folder`, which exists."""
    ranks = join_ranks()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = _start(options, labelled)
    split = split_by_micrograph(labelled.particles, labelled.labels, options.split, options.seed)
    loaded = _load(labelled, start.preprocess, options, abort_requested)
    split = split.without(loaded.bad.rows)
    _check_parts(split, labelled.labels)
    if not options.any_contrast:
        good = np.flatnonzero(labelled.labels & (loaded.boxes_px > 0))
        refuse_dark(loaded.contrast[good], split.clusters[good], labelled.particles.source)
    _announce(labelled, split, start, loaded, options)
    members = split.members(labelled.labels, options.ensemble, options.seed)
    epochs = settings_of(options, start.fine_tuning).epochs
    steps = epochs * sum(len(member.train) for member in members)
    progress = Progress(steps, "image steps", abort_requested)
    models = [
        fit(options, labelled, loaded, member, start, folder, number, progress, ranks)
        for number, member in enumerate(members, 1)
    ]
    if not ranks.first:
        return ()
    tested = _measure(folder, models, loaded, labelled, split, options)
    outputs = write_test_report(folder, tested)
    log_files(folder, _files(options), f"On the test part: {tested.evaluation.headline()}")
    return outputs


def _files(options: TrainOptions) -> dict[str, str]:
    files = {model_name(number): "for score --weights" for number in range(1, options.ensemble + 1)}
    files |= {HISTORY: "loss, accuracy and AUC of each epoch", METRICS: "figures of the test part"}
    files |= {PREDICTIONS: "scores of the test part", LOGFILE: "for RELION's Display menu"}
    return {**files, REPORT: "the same for a browser"}


def _start(options: TrainOptions, labelled: LabelledSet) -> Start:
    """Return the network to train: that of ``--init``, the bundled one, or a new one."""
    new = any((options.model, options.f, options.img_dim, options.preprocess))
    if options.init is None and new:
        return _new_network(options)
    path = options.init or BUNDLED_MODEL
    target = (options.weight_dir or options.o or options.out_dir or Path()) / MODEL
    refuse_to_overwrite([path], [target])
    model = load_model(path)
    found = {
        "model": model.network.name,
        "f": model.network.kwargs.get("f"),
        "img_dim": model.network.dim,
        "preprocess": model.preprocess.to_dict()["name"],
    }
    for name, value in found.items():
        asked = getattr(options, name)
        if asked is not None and asked != value:
            raise UsageError(f"--{name} is {asked}, but {path} has {value}.")
    if options.init is not None:
        check_pixel_size([model], labelled.particles)
    origin = str(options.init or "the bundled model")
    return Start(model.network, model.preprocess, f"{origin} (hash {model.hash})")


def _new_network(options: TrainOptions) -> Start:
    name = options.model or DEFAULT_NETWORK
    if name == D4.name:
        for word in ("f", "preprocess"):
            if getattr(options, word) is not None:
                raise UsageError(f"--{word} is for straight and roberts, not for --model {name}.")
        network: Network = build_network(name, widths=WIDTHS, dim=options.img_dim or 48)
        return Start(network, FourierCrop(network.dim))
    network = build_network(name, f=options.f or 32, dim=options.img_dim or 28)
    recipe = {"name": options.preprocess or BlurResize.name, "dim": network.dim}
    if network.channels > 1:
        recipe["roberts"] = True
    return Start(network, preprocess_from_dict(recipe))


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


def _describe_parts(labels: np.ndarray, split: Split) -> str:
    return ", ".join(
        f"{name} {len(rows):,} ({labels[rows].sum():,} good, "
        f"{counted(len(np.unique(split.clusters[rows])), split.cluster_unit)})"
        for name, rows in split.parts.items()
    )


def _announce(
    labelled: LabelledSet, split: Split, start: Start, loaded: Loaded, options: TrainOptions
) -> None:
    labels = labelled.labels
    log.info(
        "%s labelled particles: %s good, %s bad. Small images: %s.",
        f"{len(labelled):,}", f"{labels.sum():,}", f"{(~labels).sum():,}", loaded.images.where,
    )  # fmt: skip
    parts = _describe_parts(labels, split)
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
    network = start.network
    weights = sum(parameter.numel() for parameter in network.parameters())
    log.info(
        "Network %s, %d px, %s weights, %s; %s.",
        network.name, network.dim, f"{weights:,}",
        f"fine-tuned from {start.origin}" if start.origin else "from scratch",
        counted(options.threads, "thread"),
    )  # fmt: skip


def _measure(
    folder: Path,
    models: Sequence[Model],
    loaded: Loaded,
    labelled: LabelledSet,
    split: Split,
    options: TrainOptions,
) -> Tested:
    """Measure the models together on the test part and ask the self-tests."""
    test = labelled.take(split.test)
    small = loaded.images.get(split.test)
    each = np.stack([model.probabilities(small).double().numpy() for model in models])
    scores = np.round(each.mean(axis=0), 6)
    threshold = resolve_threshold(None, models, scores)[0]
    evaluation = evaluate(
        test.labels, scores, split.clusters[split.test], threshold, seed=options.seed
    )
    tests = run_self_tests(models, threshold, loaded, labelled, split, options.seed)
    part = describe_test_part(split, options)
    about = {
        "data": labelled.particles.source,
        "part": part,
        "model": ", ".join(model.hash for model in models),
        "threshold_request": str(options.threshold),
        "self_tests": [asdict(item) for item in tests],
    }
    write_evaluation(folder, test.particles, test.labels, scores, evaluation, about)
    log.info("On the test part, which played no role in training:\n%s", evaluation.summary())
    log_self_tests(tests)
    if len(models) > 1:
        target = options.weight_dir or folder
        names = " ".join(str(target / model_name(n)) for n in range(1, len(models) + 1))
        log.info("The scores above are the mean of %d models: --weights %s", len(models), names)
    return Tested(
        mode="train", options=options, labelled=test, values=scores, evaluation=evaluation,
        models=", ".join(f"hash {model.hash}" for model in models), part=part,
        reason=f"for {options.threshold}, from the validation part",
        sources=[*labelled.notes, _describe_parts(labelled.labels, split)], self_tests=tests,
        history=(options.history_dir or folder) / HISTORY,
        kept_epoch=models[0].provenance["best_epoch"],
    )  # fmt: skip

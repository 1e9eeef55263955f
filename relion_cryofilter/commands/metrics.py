"""``metrics``: models and labelled particles in, figures with intervals out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.evaluation import write_evaluation
from relion_cryofilter.commands.models import (
    check_pixel_size,
    describe_models,
    read_models,
    resolve_threshold,
)
from relion_cryofilter.data.labelled import clusters_of, split_by_micrograph
from relion_cryofilter.errors import UsageError
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.scoring import score_particles
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import MetricsOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion.labels import read_labels
from relion_cryofilter.results.metrics import evaluate

log = logging.getLogger("relion_cryofilter")


def metrics(
    options: MetricsOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Measure models on labelled particles; write metrics.json, predictions.csv and figures.

    Raises
    ------
    CryoFilterError
        Something is wrong with the labels, the images or a model.
    Aborted
        `abort_requested` said True.
    """
    folder = results_folder(options.o, options.out_dir)
    labelled = read_labels(
        options.in_parts, options.pos, options.neg, options.pos_classes, options.neg_classes
    )
    for note in labelled.notes:
        log.info("%s", note)
    models = read_models(options)
    check_pixel_size(models, labelled.particles)
    trained_on = {model.provenance.get("fingerprint") for model in models}
    part = "all labelled particles"
    if options.split is not None:
        split = split_by_micrograph(
            labelled.particles, labelled.labels, options.split, options.seed
        )
        part = f"test part of a split by {split.unit}, --split {options.split:g}"
        part += f" --seed {options.seed}"
        labelled = labelled.take(split.test)
    elif labelled.fingerprint in trained_on:
        log.warning(
            "The model was trained on these particles, so the figures are too good. --split with "
            "the training's --split and --seed measures on what it never saw."
        )
    log.info("Model %s; measured on %s.", describe_models(models, options), part)
    scores = score_particles(
        labelled.particles,
        models,
        Progress(len(labelled), "particles scored", abort_requested),
        threads=options.threads,
        devices=choose_devices(gpu_numbers(options.gpu)),
        batch_size=options.batch_size,
        tta=options.tta,
        skip_bad=options.skip_bad,
    )
    good = np.setdiff1d(np.arange(len(labelled)), scores.bad.rows)
    labelled, values = labelled.take(good), np.round(scores.values[good], 6)
    if len(scores.bad):
        log.warning("%s\nThey are left out.", scores.bad.summary())
    threshold, reason = resolve_threshold(options.threshold, models, values)
    evaluation = evaluate(
        labelled.labels, values, clusters_of(labelled.particles), threshold, seed=options.seed
    )
    about = {
        "data": labelled.particles.source,
        "part": part,
        "models": describe_models(models, options),
        "tta": options.tta,
        "threshold_reason": reason,
    }
    write_evaluation(folder, labelled.particles, labelled.labels, values, evaluation, about)
    log.info("Threshold %g (%s).\n%s", threshold, reason, evaluation.summary())
    log.info("Results are in %s/", folder)
    return ()


def results_folder(o: Path | None, out_dir: Path | None) -> Path:
    """Return ``--o`` (or its 2020 name ``--out_dir``), made where it is missing."""
    folder = o or out_dir
    if folder is None:
        raise UsageError("Say where the results go: --o FOLDER/.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder

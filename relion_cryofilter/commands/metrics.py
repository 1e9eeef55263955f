"""``metrics``: models and labelled particles in, figures with intervals out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.closing import FEATURE_SAMPLE, LOGFILE, REPORT, log_files
from relion_cryofilter.commands.contrast import check_contrast
from relion_cryofilter.commands.evaluation import METRICS, PREDICTIONS, write_evaluation
from relion_cryofilter.commands.models import (
    check_pixel_size,
    check_request,
    describe_models,
    read_models,
    resolve_threshold,
)
from relion_cryofilter.commands.report import (
    Tested,
    write_test_report,
)
from relion_cryofilter.data.labelled import (
    LabelledSet,
    clusters_of,
    seen_units,
    split_by_micrograph,
)
from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.scoring import score_particles
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import MetricsOptions, TrainOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion.labels import read_labels
from relion_cryofilter.results.metrics import evaluate
from relion_cryofilter.wording import counted

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
    labelled = labelled_set(options)
    models = read_models(options)
    check_pixel_size(models, labelled.particles)
    check_request(options.threshold, models)
    part = "all labelled particles"
    if options.split is not None:
        split = split_by_micrograph(
            labelled.particles, labelled.labels, options.split, options.seed
        )
        part = f"test part of a split by {split.unit}, --split {options.split:g}"
        part += f" --seed {options.seed}"
        labelled = labelled.take(split.test)
    if options.split is not None and split.unit != split.cluster_unit:
        log.warning("The split is by %s, so neighbours may be on two sides.", split.unit)
    else:
        _warn_of_seen(models, labelled)
    log.info("Model %s; measured on %s.", describe_models(models, options), part)
    if not options.any_contrast:
        wanted = labelled.particles.take(np.flatnonzero(labelled.labels))
        check_contrast(wanted, models[0].preprocess, options.threads)
    scores = score_particles(
        labelled.particles,
        models,
        Progress(len(labelled), "particles scored", abort_requested),
        threads=options.threads,
        devices=choose_devices(gpu_numbers(options.gpu)),
        batch_size=options.batch_size,
        tta=options.tta,
        skip_bad=options.skip_bad,
        sample=FEATURE_SAMPLE,
    )
    good = np.setdiff1d(np.arange(len(labelled)), scores.bad.rows)
    labelled, values = labelled.take(good), np.round(scores.values[good], 6)
    if len(scores.bad):
        log.warning("%s\nThey are left out.", scores.bad.summary())
    if len(set(labelled.labels.tolist())) < 2:
        raise CryoFilterError("Only particles of one kind are left, so nothing can be measured.")
    threshold, reason = resolve_threshold(options.threshold, models, values)
    clusters, unit = clusters_of(labelled.particles)
    evaluation = evaluate(labelled.labels, values, clusters, threshold, seed=options.seed)
    about = {
        "data": labelled.particles.source,
        "part": part,
        "models": describe_models(models, options),
        "tta": options.tta,
        "threshold_reason": reason,
        "clusters": unit,
    }
    write_evaluation(folder, labelled.particles, labelled.labels, values, evaluation, about)
    log.info("Threshold %g (%s).\n%s", threshold, reason, evaluation.summary())
    tested = Tested(
        mode="metrics", options=options, labelled=labelled, values=values, evaluation=evaluation,
        models=describe_models(models, options), part=part, reason=reason, sources=labelled.notes,
        scores=scores,
    )  # fmt: skip
    outputs = write_test_report(folder, tested)
    n = counted(len(labelled), "labelled particle")
    files = {
        METRICS: f"figures of {n}",
        PREDICTIONS: "scores",
        LOGFILE: "for RELION's Display menu",
    }
    log_files(folder, {**files, REPORT: "the same for a browser, with a threshold slider"})
    return outputs


def _warn_of_seen(models: Sequence[Model], labelled: LabelledSet) -> None:
    """Warn where a model was trained or validated on the micrographs that it is measured on."""
    units = seen_units(labelled.particles)
    for model in models:
        shared = len(set(model.provenance.get("seen", ())).intersection(units))
        if shared:
            log.warning(
                "The model (hash %s) was trained or validated on %d of these %d %ss, so the "
                "figures are too good. Measure on the test part of its training: --split and "
                "--seed as there.",
                model.hash, shared, len(units), clusters_of(labelled.particles)[1],
            )  # fmt: skip


def labelled_set(options: MetricsOptions | TrainOptions) -> LabelledSet:
    """Read the labelled particles that the options name, and log where the labels are from."""
    labelled = read_labels(
        options.in_parts, options.pos, options.neg, options.pos_classes, options.neg_classes
    )
    for note in labelled.notes:
        log.info("%s", note)
    return labelled


def results_folder(o: Path | None, out_dir: Path | None) -> Path:
    """Return ``--o`` (or its 2020 name ``--out_dir``), made where it is missing."""
    folder = o or out_dir
    if folder is None:
        raise UsageError("Say where the results go: --o FOLDER/.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder

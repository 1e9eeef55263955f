"""``metrics``: models and labelled particles in, figures with intervals out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.closing import FEATURE_SAMPLE, log_files
from relion_cryofilter.commands.contrast import check_contrast
from relion_cryofilter.commands.evaluation import measure, write_evaluation
from relion_cryofilter.commands.judging import score_as_told
from relion_cryofilter.commands.models import (
    check_pixel_size,
    check_request,
    describe_models,
    read_models,
)
from relion_cryofilter.commands.report import (
    Tested,
    write_test_report,
)
from relion_cryofilter.data.labelled import (
    LabelledSet,
    Split,
    clusters_of,
    seen_units,
    split_by_micrograph,
)
from relion_cryofilter.errors import UsageError
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.options import MetricsOptions, TrainOptions
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion.labels import read_labels
from relion_cryofilter.result_files import LOGFILE, METRICS, PREDICTIONS, REPORT
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
        part = describe_test_part(split, options)
        labelled = labelled.take(split.test)
    if options.split is not None and split.unit != split.cluster_unit:
        log.warning("The split is by %s, so neighbours may be on two sides.", split.unit)
    else:
        _warn_of_seen(models, labelled)
    log.info("Model %s; measured on %s.", describe_models(models, options), part)
    check_contrast(labelled.good(), models, options)
    progress = Progress(len(labelled), "particles scored", abort_requested)
    scores = score_as_told(labelled.particles, models, options, progress, sample=FEATURE_SAMPLE)
    measured = measure(labelled, scores, models, options.threshold, options.seed)
    labelled, values, evaluation = measured.labelled, measured.values, measured.evaluation
    about = {
        "data": labelled.particles.source,
        "part": part,
        "models": describe_models(models, options),
        "tta": options.tta,
        "threshold_reason": measured.reason,
        "clusters": measured.unit,
    }
    write_evaluation(folder, labelled.particles, labelled.labels, values, evaluation, about)
    log.info("Threshold %g (%s).\n%s", evaluation.threshold, measured.reason, evaluation.summary())
    tested = Tested(
        mode="metrics", options=options, labelled=labelled, values=values, evaluation=evaluation,
        models=describe_models(models, options), part=part, reason=measured.reason,
        sources=labelled.notes, scores=scores,
    )  # fmt: skip
    outputs = write_test_report(folder, tested)
    n = counted(len(labelled), "labelled particle")
    files = {
        METRICS: f"figures of {n}",
        PREDICTIONS: "scores",
        LOGFILE: "for RELION's Display menu",
    }
    files[REPORT] = "the same for a browser, with a threshold slider"
    log_files(folder, files, f"On {part}: {evaluation.headline()}")
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


def describe_test_part(split: Split, options: MetricsOptions | TrainOptions) -> str:
    """Return which part of a labelled set is measured, so that it can be had again."""
    return (
        f"the test part of a split by {split.unit}, --split {options.split:g} --seed {options.seed}"
    )


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

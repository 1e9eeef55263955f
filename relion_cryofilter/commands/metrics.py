"""``metrics``: models and labelled particles in, figures with intervals out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from relion_cryofilter.files import LOGFILE, METRICS, PREDICTIONS, REPORT
from relion_cryofilter.images.contrast import check_contrast
from relion_cryofilter.locks import one_run
from relion_cryofilter.nn.measurement import describe_test_part, measure
from relion_cryofilter.nn.model import Models, read_models
from relion_cryofilter.nn.scoring import How, score_particles
from relion_cryofilter.options import MetricsOptions
from relion_cryofilter.particles.labels import LabelledSet, read_labels
from relion_cryofilter.particles.splits import clusters_of, seen_units, split_by_micrograph
from relion_cryofilter.progress import Progress, counted
from relion_cryofilter.results.outputs import (
    FEATURE_SAMPLE,
    Output,
    log_files,
    results_folder,
    write_measured,
)
from relion_cryofilter.results.report_files import Report, write_report

log = logging.getLogger("relion_cryofilter")


@one_run()
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
    # Read.
    folder = results_folder(options.o, options.out_dir)
    labelled = read_labels(
        options.in_parts, options.pos, options.neg, options.pos_classes, options.neg_classes
    )
    models = read_models(options.weights, **options.beliefs)
    models.check(labelled.particles, options.threshold)
    part = "all labelled particles"
    neighbours = False
    if options.split is not None:
        split = split_by_micrograph(
            labelled.particles, labelled.labels, options.split, options.seed
        )
        part = describe_test_part(split, options)
        labelled = labelled.take(split.test)
        neighbours = split.unit != split.cluster_unit
    if neighbours:
        log.warning("The split is by %s, so neighbours may be on two sides.", split.unit)
    else:
        _warn_of_seen(models, labelled)
    log.info("Model %s; measured on %s.", models.describe(), part)
    if not options.any_contrast:
        check_contrast(labelled.good(), models.members[0].preprocess, options.threads)

    # Compute.
    scores = score_particles(
        labelled.particles,
        models,
        Progress(len(labelled), "particles scored", abort_requested),
        How.asked(options),
        sample=FEATURE_SAMPLE,
    )
    measured = measure(labelled, scores, models, options.threshold, part=part, seed=options.seed)
    evaluation, reason = measured.evaluation, measured.chosen.reason

    # Write: the results, then their report.
    figures = {
        "data": labelled.particles.source,
        "part": part,
        "models": models.describe(),
        "tta": options.tta,
        "threshold_reason": reason,
        "clusters": measured.unit,
        **evaluation.to_dict(),
    }
    write_measured(folder, measured, figures)
    log.info("Threshold %g (%s).\n%s", evaluation.threshold, reason, evaluation.summary())

    def report() -> Report:
        from relion_cryofilter.results.report import metrics_report  # slow to import

        return metrics_report(options, measured, models, scores)

    outputs = write_report(folder, report)
    n = counted(len(measured.labelled), "labelled particle")
    files = {
        METRICS: f"figures of {n}",
        PREDICTIONS: "scores",
        LOGFILE: "for RELION's Display menu",
        REPORT: "the same for a browser, with a threshold slider",
    }
    log_files(folder, files, f"On {part}: {evaluation.headline()}")
    return outputs


def _warn_of_seen(models: Models, labelled: LabelledSet) -> None:
    """Warn where a model was trained or validated on the micrographs that it is measured on."""
    units = seen_units(labelled.particles)
    hashes: dict[int, list[str]] = {}  # by how many of them a model has seen
    for model in models:
        shared = len(set(model.provenance.get("seen", ())).intersection(units))
        hashes.setdefault(shared, []).append(model.hash)
    for shared, found in hashes.items():
        if shared:
            log.warning(
                "The model (hash %s) was trained or validated on %d of these %d %ss, so the "
                "figures are too good. Honest ones are in its training's metrics.json; of one with "
                "--split, measure on the test part: --split and --seed as there.",
                ", ".join(found), shared, len(units), clusters_of(labelled.particles)[1],
            )  # fmt: skip

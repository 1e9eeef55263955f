"""``train``: labelled particles in; a model, its history and an honest figure of it out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from relion_cryofilter.files import (
    HISTORY,
    LOGFILE,
    METRICS,
    MODEL,
    PREDICTIONS,
    REPORT,
    SUSPICIOUS,
    numbered,
    remove,
)
from relion_cryofilter.locks import one_run
from relion_cryofilter.nn.model import START_MODEL
from relion_cryofilter.nn.selftests import log_self_tests
from relion_cryofilter.nn.training import Trained, train_models
from relion_cryofilter.options import MOST_MODELS, TrainOptions
from relion_cryofilter.particles.labels import read_labels
from relion_cryofilter.results.outputs import (
    Output,
    log_files,
    refuse_to_overwrite,
    results_folder,
    write_history,
    write_history_chart,
    write_measured,
    write_suspects,
)
from relion_cryofilter.results.report_files import Report, write_report

log = logging.getLogger("relion_cryofilter")


@one_run()
def train(
    options: TrainOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Train a model; write model.safetensors, history.csv, figures, suspects and checkpoints.

    A job that was stopped is resumed after its last finished epoch when it is started again with
    the same options in the same folder.

    Raises
    ------
    CryoFilterError
        Something is wrong with the labels, the images or an option.
    Aborted
        `abort_requested` said True.
    """
    folder = options.o or options.out_dir
    weights, history = options.weight_dir or folder, options.history_dir or folder
    if weights is not None:
        paths = [weights / numbered(MODEL, n) for n in range(1, options.ensemble + 1)]
        refuse_to_overwrite([options.init or START_MODEL], paths, "model")
    folder, _, history = map(results_folder, (folder, weights, history))
    sources = (options.in_parts, *options.pos, *options.neg)
    refuse_to_overwrite(sources, [folder / SUSPICIOUS])
    trained = train_models(
        read_labels(
            options.in_parts, options.pos, options.neg, options.pos_classes, options.neg_classes
        ),
        options,
        folder,
        abort_requested,
        lambda number, epochs: write_history(history, number, epochs),
    )
    return write_trained(folder, trained, options)


def write_trained(folder: Path, trained: Trained, options: TrainOptions) -> tuple[Output, ...]:
    """Write models and figures, then their report, into `folder` and those that options name."""
    # The models.
    weights = options.weight_dir or folder
    weights.mkdir(parents=True, exist_ok=True)
    paths = [weights / numbered(MODEL, n) for n in range(1, len(trained.models) + 1)]
    for path, model in zip(paths, trained.models):
        if path.is_file():
            log.info("Replacing %s by the new model.", path)
        model.save(path)
        log.info("Wrote %s (hash %s).", path, model.hash)

    # What an earlier run with other options left; what is not ours stays.
    for number in range(len(paths) + 1, MOST_MODELS + 1):
        for name in (MODEL, HISTORY, str(Path(HISTORY).with_suffix(".png"))):
            old = folder / numbered(name, number)
            if old.is_file() and not (options.init and old.samefile(options.init)):
                log.info("Removing %s of an earlier run.", old)
                remove(old)
    if trained.suspects is None:
        for suffix in (".star", ".cs", ".csg"):
            remove((folder / SUSPICIOUS).with_suffix(suffix))

    # The figures.
    measured, suspicious = trained.measured, dict[str, str]()
    write_measured(folder, measured, trained.figures(options))
    if trained.suspects is not None:
        suspicious = write_suspects(folder, measured, trained.suspects)
    for number, kept in enumerate(trained.kept_epochs, 1):
        history = trained.histories[number - 1]
        write_history_chart(options.history_dir or folder, number, history, kept)
    summary = measured.evaluation.summary()
    if options.split is None:
        log.info("Against the labels, on %s:\n%s", measured.part, summary)
    else:
        log.info("On the test part, which played no role in training:\n%s", summary)
    log_self_tests(trained.self_tests)
    if len(paths) > 1:
        names = " ".join(map(str, paths))
        log.info("The scores above are the mean of %d models: --weights %s", len(paths), names)

    # The report.
    def report() -> Report:
        from relion_cryofilter.results.report import train_report  # slow to import

        return train_report(options, trained)

    outputs = write_report(folder, report)
    of = "the test part" if trained.suspects is None else "all labelled particles, out of fold"
    files = {
        **{path.name: "for score --weights" for path in paths},
        HISTORY: "loss, accuracy and AUC of each epoch",
        METRICS: f"figures of {of}",
        PREDICTIONS: f"scores of {of}",
        **suspicious,
        LOGFILE: "for RELION's Display menu",
        REPORT: "the same for a browser",
    }
    where = "On the test part" if trained.suspects is None else "Out of fold, against the labels"
    log_files(folder, files, f"{where}: {measured.evaluation.headline()}")
    return outputs

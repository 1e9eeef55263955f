"""``score``: particles in, the same STAR file with scores and its two subsets out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.closing import FEATURE_SAMPLE, log_files
from relion_cryofilter.commands.contrast import check_contrast
from relion_cryofilter.commands.judging import Judged, judge, score_as_told
from relion_cryofilter.commands.models import (
    check_pixel_size,
    check_request,
    describe_models,
    read_models,
)
from relion_cryofilter.commands.report_facts import describe_set
from relion_cryofilter.commands.subsets import (
    describe_all,
    describe_counts,
    refuse_to_overwrite,
    result_names,
    table_of,
    warn_if_none,
    write_all_with_scores,
)
from relion_cryofilter.data import score_cache
from relion_cryofilter.data.bad_images import BadImages
from relion_cryofilter.data.cryosparc import SCORE_FIELD
from relion_cryofilter.data.cryosparc_particles import read_particle_file
from relion_cryofilter.data.particles import ParticleSet, particles_of_stacks
from relion_cryofilter.data.score_cache import ScoreCache
from relion_cryofilter.data.star_labels import SCORE_LABEL
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.ranks import Ranks, join_ranks
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import ScoreOptions
from relion_cryofilter.processes import process_count
from relion_cryofilter.progress import Progress, duration
from relion_cryofilter.result_files import BAD_IMAGES, FEATURES, LOGFILE, REPORT, SCORES_CSV
from relion_cryofilter.wording import counted

log = logging.getLogger("relion_cryofilter")


def score(
    options: ScoreOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Score particles; write the STAR file with scores, its accepted and rejected subsets.

    Raises
    ------
    CryoFilterError
        Something is wrong with the input; nothing was written.
    Aborted
        `abort_requested` said True; nothing was written.
    """
    places = _places(options)
    _check_processes(options)
    particles = _read_input(options)
    models = read_models(options)
    check_pixel_size(models, particles)
    check_request(options.threshold, models)
    ranks = join_ranks()
    devices = ranks.device(choose_devices(gpu_numbers(options.gpu)))
    _announce(particles, models, options, ranks)
    check_contrast(particles, models, options)
    for folder in (places.star, places.csv.parent, places.extras):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(len(particles), "particles scored", abort_requested)
    scores = score_as_told(
        particles,
        models,
        options,
        progress,
        devices=devices,
        features_path=places.extras / FEATURES if options.features else None,
        cache=_cache(options, models, particles, ranks),
        ranks=ranks,
        sample=FEATURE_SAMPLE if options.o is not None else 0,
    )
    if not ranks.first:
        return ()
    judged = judge(scores, models, options.threshold)
    values, accepted = judged.values, judged.accepted
    warn_if_none(accepted, values, judged.threshold)
    outputs: tuple[Output, ...] = ()
    table = table_of(particles, options.score_label)
    if places.star is not None and table is not None:
        outputs = write_all_with_scores(places.star, table, accepted, values)
        _remove_stale(places.star, options, scores.bad)
    _write_scores_csv(places.csv, scores.values)
    if len(scores.bad):
        scores.bad.write_csv(places.extras / BAD_IMAGES)
        log.warning(
            "%s\nThey are scored 0, rejected, and listed in %s.",
            scores.bad.summary(), places.extras / BAD_IMAGES,
        )  # fmt: skip
    from relion_cryofilter.commands.report import Scored, write_score_report  # slow to import

    scored = Scored(
        options, particles, describe_models(models, options), scores, values, judged.threshold,
        judged.reason, accepted,
    )  # fmt: skip
    outputs += write_score_report(scored)
    written = describe_all(table, accepted) if places.star and table else {}
    _close(places, written, scores, judged)
    return outputs


def _check_processes(options: ScoreOptions) -> None:
    if options.features and process_count() > 1:
        raise UsageError("--features is written by one process; leave it out, or start one.")


def _close(places: _Places, files: dict[str, str], scores: Scores, judged: Judged) -> None:
    """Name the files, with the numbers of their rows; say how many particles are accepted."""
    n, new = len(judged.values), len(judged.values) - scores.n_known
    files |= {places.csv.name: counted(n, "score"), FEATURES: counted(n, "feature vector")}
    files |= {f"{score_cache.NAME}{score_cache.SUFFIX}": "scores for Continue; may be deleted"}
    files |= {BAD_IMAGES: counted(len(scores.bad), "image"), LOGFILE: "for RELION's Display menu"}
    files |= {REPORT: "the same for a browser, with a threshold slider"}
    rate = f"{new / max(scores.seconds, 1e-9):,.0f}/s"
    known = f"{scores.n_known:,} were known" if scores.n_known else ""
    scored = f"Scored {counted(new, 'particle')} in {duration(scores.seconds)} ({rate})"
    done = ", ".join(filter(None, [scored if new else "", known]))
    log_files(
        places.extras, files,
        f"Threshold {judged.threshold:g} ({judged.reason}).\n"
        f"{done}: {describe_counts(judged.accepted)}.",
    )  # fmt: skip


@dataclass(frozen=True)
class _Places:
    """Where results go: the STAR files (None without --o), scores.csv, and everything else."""

    star: Path | None
    csv: Path
    extras: Path


def _places(options: ScoreOptions) -> _Places:
    if (options.in_parts is None) == (not options.mrc):
        raise UsageError("Give either --in_parts particles.star or --mrc a.mrcs b.mrcs.")
    if options.o is None and options.out_file is None:
        raise UsageError("Say where the results go: --o FOLDER/, or --out_file scores.csv.")
    csv = options.out_file or Path(options.o or "") / SCORES_CSV
    extras = options.o or csv.parent
    names = (FEATURES, BAD_IMAGES, *(result_names() if options.o else ()))
    others = [extras / name for name in names]
    if csv.is_dir() or os.path.realpath(csv) in map(os.path.realpath, others):
        raise UsageError(f"--out_file {csv} is a folder or another result. Name a .csv file.")
    sources = (options.in_parts, options.passthrough, *options.weights, *options.mrc)
    refuse_to_overwrite(sources, (csv, *others))
    return _Places(options.o, csv, extras)


def _remove_stale(folder: Path, options: ScoreOptions, bad: BadImages) -> None:
    """Remove what an earlier run left in the job's folder and this one does not write."""
    if not options.features:
        (folder / FEATURES).unlink(missing_ok=True)
    if not len(bad):
        (folder / BAD_IMAGES).unlink(missing_ok=True)


def _cache(
    options: ScoreOptions, models: Sequence[Model], particles: ParticleSet, ranks: Ranks
) -> ScoreCache | None:
    """Return the scores that earlier runs of this job left, if they can be used."""
    if options.o is None or options.features:
        return None
    if options.rescore:
        for journal in options.o.glob(f"{score_cache.NAME}*{score_cache.SUFFIX}"):
            journal.unlink(missing_ok=True)
    hashes = " ".join(model.hash for model in models)
    key = f"{hashes} tta={options.tta} precision={options.precision}"
    cache = ScoreCache(options.o, key, particles, ranks.number)
    known = int(np.isfinite(cache.values).sum())
    if known:
        log.info(
            "%s of %s particles were scored by an earlier run (%s; --rescore scores them again).",
            f"{known:,}", f"{len(particles):,}", cache.path,
        )  # fmt: skip
    return cache


def _read_input(options: ScoreOptions) -> ParticleSet:
    if options.in_parts is None:
        return particles_of_stacks(options.mrc)
    if options.in_parts.suffix in (".mrcs", ".mrc"):
        raise UsageError(f"{options.in_parts} is an image stack. Give it as --mrc, not --in_parts.")
    particles = read_particle_file(options.in_parts, options.passthrough, options.project_dir)
    _check_label(options.score_label)
    if particles.cs is not None and options.score_label != SCORE_LABEL:
        raise UsageError(
            f"--score_label is for STAR files; scores of .cs files are in {SCORE_FIELD}."
        )
    return particles


def _check_label(label: str) -> None:
    """Refuse labels that aren't any, and those in which RELION keeps something else."""
    if not (label.isascii() and label.isidentifier()) or label.startswith(("loop_", "data_")):
        raise UsageError(f"--score_label is {label!r}; expected a label like {SCORE_LABEL}.")
    own = any(word in label.lower() for word in ("score", "cryofilter"))
    if label.startswith("rln") and label != SCORE_LABEL and not own:
        raise UsageError(
            f"--score_label {label}: RELION keeps something else in columns that begin with rln. "
            f"Choose {SCORE_LABEL}, or a name of your own such as cryofilterScore."
        )


def _announce(
    particles: ParticleSet, models: Sequence[Model], options: ScoreOptions, ranks: Ranks
) -> None:
    log.info("Read %s: %s.", particles.source, describe_set(particles))
    views = ""
    if options.tta:
        same = all(model.network.equivariant for model in models)
        views = ", the same for all eight views" if same else ", averaged over eight views"
    shared = f" in each of {ranks.count} processes" if ranks.count > 1 else ""
    log.info(
        "Model %s%s; %s%s.", describe_models(models, options), views,
        counted(options.threads, "thread"), shared,
    )  # fmt: skip
    log.info(
        "To do: score every particle and accept %s; results go to %s.",
        f"at threshold {options.threshold}" if options.threshold else "at the model's threshold",
        f"{options.o}/" if options.o else options.out_file,
    )  # fmt: skip
    if not options.weights:
        log.warning(
            "The bundled model knows simulated particles only. Look at both subsets before you "
            "discard anything, and train a model on your own choices (mode train)."
        )
    label = options.score_label
    if particles.loop is not None and label in particles.loop.labels:
        log.info("The input has a column %s already; it is overwritten in the results.", label)


def _write_scores_csv(path: Path, values: np.ndarray) -> None:
    """Write lines ``0, 0.0320`` in input order, as the 2020 program did."""
    write_text(path, "".join(f"{row}, {value:.4f}\n" for row, value in enumerate(values.tolist())))

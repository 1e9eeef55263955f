"""``score``: particles in, the same STAR file with scores and its two subsets out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import (
    ADAPTED_MODEL,
    ADAPTING,
    BAD_IMAGES,
    FEATURES,
    LOGFILE,
    REPORT,
    SCORE_LABEL,
    SCORES_CSV,
    claim,
    is_result,
    remove,
    require_ours,
    write_text,
)
from relion_cryofilter.images.contrast import check_contrast
from relion_cryofilter.kinds import OF_LABELS
from relion_cryofilter.locks import one_run
from relion_cryofilter.nn import score_cache
from relion_cryofilter.nn.model import Models, read_models
from relion_cryofilter.nn.score_cache import ScoreCache
from relion_cryofilter.nn.scoring import How, Scores, score_particles
from relion_cryofilter.options import ScoreOptions
from relion_cryofilter.particles.cryosparc import SCORE_FIELD
from relion_cryofilter.particles.particles import ParticleSet, particles_of_stacks
from relion_cryofilter.particles.stacks import is_stack
from relion_cryofilter.particles.tables import read_particle_file
from relion_cryofilter.processes import Ranks, join_ranks, process_count
from relion_cryofilter.progress import Progress, counted, duration
from relion_cryofilter.results.outputs import (
    FEATURE_SAMPLE,
    Output,
    log_files,
    refuse_to_overwrite,
    results_folder,
    subset_names,
    write_subsets,
)
from relion_cryofilter.results.report_files import Report, write_report
from relion_cryofilter.thresholds import DECIMALS, Chosen, share_interval

log = logging.getLogger("relion_cryofilter")


@one_run()
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
    filtered = filter_particles(options, _read_input, abort_requested)
    return filtered.outputs if filtered else ()


@dataclass(frozen=True, eq=False)
class Filtered:
    """What `score` gives: who is accepted, and the files that RELION should know."""

    chosen: Chosen
    outputs: tuple[Output, ...]


def filter_particles(
    options: ScoreOptions,
    read: Callable[[ScoreOptions], ParticleSet],
    abort_requested: Callable[[], bool],
) -> Filtered | None:
    """Score what `read` reads and write the results; None if another process does that."""
    # Read, once it is known that nothing would be overwritten.
    places = _places(options)
    if options.features and process_count() > 1:
        raise UsageError("--features is written by one process; leave it out, or start one.")
    particles = read(options)
    models = read_models(options.weights, **options.beliefs)
    models.check(particles, options.threshold)
    ranks = join_ranks()
    how = How.asked(options, ranks)
    _announce(particles, models, options, ranks)
    if not options.any_contrast:
        check_contrast(particles, models.members[0].preprocess, options.threads)

    # Compute: the scores, and who is accepted.
    places.csv.parent.mkdir(parents=True, exist_ok=True)
    if options.adapt:
        models = _adapted(models, particles, options, ranks, abort_requested)
    if not options.weights and not models.adapted:
        log.warning(
            "The bundled model knows simulated particles and few real ones. Its own threshold lets "
            "hardly any noise or ice pass and loses weak particles with them; --threshold balanced "
            "loses fewer, keep=0.6 asks for a share, and --adapt sorts better. Look at both "
            "subsets before you discard anything, and train a model on your own choices (mode "
            "train)."
        )
    scores = score_particles(
        particles,
        models,
        Progress(len(particles), "particles scored", abort_requested),
        how,
        cache=_cache(options, models, particles, ranks),
        features_path=places.extras / FEATURES if options.features else None,
        sample=FEATURE_SAMPLE if options.o is not None else 0,
    )
    known = None
    if options.junk is not None:
        junk = read_particle_file(options.junk)
        progress = Progress(len(junk), "known junk scored", abort_requested)
        known = score_particles(junk, models, progress, how).values
    if not ranks.first:
        return None
    chosen = models.choose(scores.values, options.threshold, scores.bad.rows)
    if known is not None:
        passing = float((known.round(DECIMALS) >= chosen.threshold).mean())
        said = f"{chosen.reason}; of {len(known):,} known junk particles a share "
        said += f"of {share_interval(passing, len(known))} would pass"
        chosen = replace(chosen, reason=said)

    # Write: the results, then their report.
    outputs, holds = _write(places, options, particles, scores, chosen)

    def report() -> Report:
        from relion_cryofilter.results.report import score_report  # slow to import

        return score_report(options, particles, models, scores, chosen)

    if options.o is not None:
        outputs += write_report(options.o, report)
    _conclude(places, holds, scores, chosen)
    return Filtered(chosen, outputs)


def _adapted(
    models: Models,
    particles: ParticleSet,
    options: ScoreOptions,
    ranks: Ranks,
    abort_requested: Callable[[], bool],
) -> Models:
    """Return the model in ``--o`` that was adapted to these particles, made if it is not there."""
    from relion_cryofilter.nn.adaptation import adapt  # slow to import

    path = Path(options.o or "") / ADAPTED_MODEL
    if ranks.first:
        adapt(particles, models, options, path, abort_requested)
    ranks.wait()
    if not path.exists():
        return models
    models = read_models([path], **options.beliefs)
    log.info("Model %s.", models.describe())
    return models


def _write(
    places: _Places, options: ScoreOptions, particles: ParticleSet, scores: Scores, chosen: Chosen
) -> tuple[tuple[Output, ...], dict[str, str]]:
    """Write all results but the report; remove what an earlier run left and this one lacks."""
    chosen.warn_if_none()
    outputs: tuple[Output, ...] = ()
    holds: dict[str, str] = {}
    table, bad = particles.table, scores.bad
    if places.star is not None and table is not None:
        outputs, holds = write_subsets(
            places.star, table, chosen.accepted, chosen.values, options.score_label
        )
    # Lines ``0, 0.0320`` in input order, as the 2020 program wrote them.
    lines = (f"{row}, {value:.4f}\n" for row, value in enumerate(scores.values.tolist()))
    write_text(places.csv, "".join(lines))
    if len(bad):
        bad.write_csv(places.extras / BAD_IMAGES)
        log.warning(
            "%s\nThey are scored 0, rejected, and listed in %s.",
            bad.summary(), places.extras / BAD_IMAGES,
        )  # fmt: skip
    further = {
        FEATURES: counted(len(scores.values), "feature vector") if options.features else "",
        BAD_IMAGES: counted(len(bad), "image") if len(bad) else "",
        ADAPTED_MODEL: "the bundled model, adapted to these particles" if options.adapt else "",
        ADAPTING: "",
    }
    for name, held in further.items():
        if not held:
            remove(places.extras / name)
            if (places.extras / name).is_dir():
                log.warning("%s is a folder and stays as it is.", places.extras / name)
    holds[places.csv.name] = counted(len(scores.values), "score")
    return outputs, holds | {name: held for name, held in further.items() if held}


def _conclude(places: _Places, holds: dict[str, str], scores: Scores, chosen: Chosen) -> None:
    """Name the files, with the numbers of their rows; say how many particles are accepted."""
    n, bad = len(chosen.values), len(scores.bad)
    new = n - scores.n_known - bad
    files = {
        **holds,
        f"{score_cache.NAME}{score_cache.SUFFIX}": "scores for Continue; may be deleted",
        LOGFILE: "for RELION's Display menu",
        REPORT: "the same for a browser, with a threshold slider",
    }
    rate = f"{new / max(scores.seconds, 1e-9):,.0f}/s"
    known = f"{scores.n_known:,} were known" if scores.n_known else ""
    scored = f"Scored {counted(new, 'particle')} in {duration(scores.seconds)} ({rate})"
    unusable = f"{bad:,} can't be used" if bad else ""
    done = ", ".join(filter(None, [scored if new else "", known, unusable]))
    log_files(
        places.extras, files,
        f"Threshold {chosen.threshold:g} ({chosen.reason}).\n{done}: {chosen.describe()}.",
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
    if options.adapt and (options.o is None or options.weights):
        raise UsageError(
            "--adapt is of the bundled model, and keeps what comes of it in --o FOLDER/: give --o, "
            "and no --weights."
        )
    asked = options.threshold
    if options.adapt and asked is not None and asked.kind in OF_LABELS:
        raise UsageError(
            f"--threshold {asked} is for models that were measured on labels; what is adapted has "
            "seen none. Leave --threshold out (its own loses and lets pass about as much), or ask "
            "for a share such as keep=0.6."
        )
    if options.o is None and options.out_file is None:
        raise UsageError("Say where the results go: --o FOLDER/, or --out_file scores.csv.")
    csv = options.out_file or Path(options.o or "") / SCORES_CSV
    extras = options.o or csv.parent
    names = (FEATURES, BAD_IMAGES, ADAPTED_MODEL, *(subset_names() if options.o else ()))
    others = [extras / name for name in names]
    beside = csv.parent.resolve() == extras.resolve() and csv.name != SCORES_CSV
    if csv.is_dir() or (beside and is_result(csv.name)):
        raise UsageError(f"--out_file {csv} is a folder or another result. Name a .csv file.")
    written = [path for path in others if path.name != FEATURES or options.features]
    if folders := [path for path in written if path.is_dir()]:
        raise UsageError(f"{folders[0]} is a folder; a result is to go there. Move it away.")
    sources = (options.in_parts, options.passthrough, options.junk, *options.weights, *options.mrc)
    refuse_to_overwrite(sources, (csv, *others))
    refuse_to_overwrite(sources, (csv,) if options.out_file else (), "scores")
    if options.o is not None:
        results_folder(options.o)
    elif options.features:  # beside scores of ours, its features are ours
        if csv.is_file():
            claim(extras, known=True)
        require_ours(extras / FEATURES)
    return _Places(options.o, csv, extras)


def _cache(
    options: ScoreOptions, models: Models, particles: ParticleSet, ranks: Ranks
) -> ScoreCache | None:
    """Return the scores that earlier runs of this job left, if they can be used."""
    if options.o is None or options.features:
        return None
    if options.rescore:
        for journal in options.o.glob(f"{score_cache.NAME}*{score_cache.SUFFIX}"):
            remove(journal)
    key = f"{models.hashes} tta={options.tta} precision={options.precision}"
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
    if is_stack(options.in_parts):
        raise UsageError(f"{options.in_parts} is an image stack. Give it as --mrc, not --in_parts.")
    particles = read_particle_file(options.in_parts, options.passthrough, options.project_dir)
    if particles.table is not None and particles.table.suffix == ".cs":
        if options.score_label != SCORE_LABEL:
            raise UsageError(
                f"--score_label is for STAR files; scores of .cs files are in {SCORE_FIELD}."
            )
        return particles
    # Labels that aren't any, and those in which RELION keeps something else.
    label = options.score_label
    if not (label.isascii() and label.isidentifier()) or label.startswith(("loop_", "data_")):
        raise UsageError(f"--score_label is {label!r}; expected a label like {SCORE_LABEL}.")
    own = any(word in label.lower() for word in ("score", "cryofilter"))
    if label.startswith("rln") and label != SCORE_LABEL and not own:
        raise UsageError(
            f"--score_label {label}: RELION keeps something else in columns that begin with rln. "
            f"Choose {SCORE_LABEL}, or a name of your own such as cryofilterScore."
        )
    return particles


def _announce(particles: ParticleSet, models: Models, options: ScoreOptions, ranks: Ranks) -> None:
    log.info("Read %s: %s.", particles.source, particles.describe())
    views = ""
    if options.tta:
        same = all(model.network.equivariant for model in models)
        views = ", the same for all eight views" if same else ", averaged over eight views"
    shared = f" in each of {ranks.count} processes" if ranks.count > 1 else ""
    log.info(
        "Model %s%s; %s%s.", models.describe(), views,
        counted(options.threads, "thread"), shared,
    )  # fmt: skip
    log.info(
        "To do: score every particle and accept %s; results go to %s.",
        f"at threshold {options.threshold}" if options.threshold else "at the model's threshold",
        f"{options.o}/" if options.o else options.out_file,
    )  # fmt: skip
    label = options.score_label
    if particles.table is not None and label in particles.table.labels:
        log.info("The input has a column %s already; it is overwritten in the results.", label)

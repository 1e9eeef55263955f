"""``score``: particles in, the same STAR file with scores and its two subsets out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.models import (
    check_pixel_size,
    describe_models,
    read_models,
    resolve_threshold,
)
from relion_cryofilter.commands.subsets import (
    ACCEPTED,
    ALL,
    REJECTED,
    describe_counts,
    refuse_to_overwrite,
    write_all_with_scores,
)
from relion_cryofilter.data.bad_images import BadImages
from relion_cryofilter.data.particles import ParticleSet, particles_of_stacks, read_particles
from relion_cryofilter.data.star_labels import SCORE_LABEL
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.scoring import score_particles
from relion_cryofilter.options import ScoreOptions, gpu_numbers
from relion_cryofilter.progress import Progress, duration

SCORES_CSV, FEATURES, BAD_IMAGES = "scores.csv", "features.npy", "bad_images.csv"

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
    folder, csv_path = _places(options)
    particles = _read_input(options)
    models = read_models(options)
    check_pixel_size(models, particles)
    devices = choose_devices(gpu_numbers(options.gpu) if options.gpu else [])
    _announce(particles, models, options)
    scores = score_particles(
        particles,
        models,
        Progress(len(particles), "particles scored", abort_requested),
        threads=options.threads,
        devices=devices,
        batch_size=options.batch_size,
        tta=options.tta,
        features_path=csv_path.parent / FEATURES if options.features else None,
        skip_bad=options.skip_bad,
    )
    values = np.round(scores.values, 6)
    threshold, reason = resolve_threshold(options.threshold, models, values)
    accepted = values >= threshold
    outputs: tuple[Output, ...] = ()
    if folder is not None and particles.star is not None and particles.loop is not None:
        label = options.score_label.removeprefix("_")
        outputs = write_all_with_scores(
            folder, particles.star, particles.loop, accepted, label, values
        )
    _write_scores_csv(csv_path, values)
    _write_bad_images(csv_path.parent / BAD_IMAGES, scores.bad)
    log.info("Threshold %g (%s).", threshold, reason)
    log.info(
        "Scored %s particles in %s (%s/s): %s.",
        f"{len(values):,}", duration(scores.seconds),
        f"{len(values) / max(scores.seconds, 1e-9):,.0f}", describe_counts(accepted),
    )  # fmt: skip
    log.info("Results are in %s/", csv_path.parent)
    return outputs


def _places(options: ScoreOptions) -> tuple[Path | None, Path]:
    """Return the results' folder and the path of scores.csv."""
    if (options.in_parts is None) == (not options.mrc):
        raise UsageError("Give either --in_parts particles.star or --mrc a.mrcs b.mrcs.")
    if options.o is None and options.out_file is None:
        raise UsageError("Say where the results go: --o FOLDER/, or --out_file scores.csv.")
    folder = options.o
    csv_path = options.out_file or Path(folder or "") / SCORES_CSV
    names = (ALL, ACCEPTED, REJECTED) if folder else ()
    refuse_to_overwrite(
        (options.in_parts, *options.weights, *options.mrc),
        (csv_path, *[Path(folder or "") / name for name in names]),
    )
    for place in (folder, csv_path.parent):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
    return folder, csv_path


def _read_input(options: ScoreOptions) -> ParticleSet:
    if options.in_parts is None:
        return particles_of_stacks(options.mrc)
    if options.in_parts.suffix in (".mrcs", ".mrc"):
        raise UsageError(f"{options.in_parts} is an image stack. Give it as --mrc, not --in_parts.")
    particles = read_particles(options.in_parts)
    label = options.score_label.removeprefix("_")
    assert particles.loop is not None
    if not label.isidentifier():
        raise UsageError(f"--score_label is {label!r}; expected a label like {SCORE_LABEL}.")
    if label in particles.loop.labels and label.startswith("rln") and label != SCORE_LABEL:
        raise UsageError(
            f"--score_label {label} would overwrite RELION's column of that name in "
            f"{options.in_parts}. Choose {SCORE_LABEL} or a name of your own."
        )
    return particles


def _announce(particles: ParticleSet, models: Sequence[Model], options: ScoreOptions) -> None:
    log.info(
        "Read %s: %s particles in %s stacks, %s micrographs, %d optics group(s).",
        particles.source, f"{len(particles):,}", f"{len(particles.stacks):,}",
        f"{len(particles.micrographs):,}", len(particles.optics),
    )  # fmt: skip
    log.info(
        "Model %s%s; %d thread(s).",
        describe_models(models, options),
        ", averaged over eight views" if options.tta else "", options.threads,
    )  # fmt: skip
    label = options.score_label.removeprefix("_")
    if particles.loop is not None and label in particles.loop.labels:
        log.info("The input has a column %s already; it is overwritten in the results.", label)


def _write_scores_csv(path: Path, values: np.ndarray) -> None:
    """Write lines ``0, 0.0320`` in input order, as the 2020 program did."""
    write_text(path, "".join(f"{row}, {value:.4f}\n" for row, value in enumerate(values.tolist())))


def _write_bad_images(path: Path, bad: BadImages) -> None:
    if not len(bad):
        path.unlink(missing_ok=True)
        return
    bad.write_csv(path)
    log.warning("%s\nThey are scored 0 and listed in %s.", bad.summary(), path)

"""``select``: a scored STAR file in, its two subsets by another threshold out; no images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import ACCEPTED, BAD_IMAGES, RANDOM, REJECTED
from relion_cryofilter.images.bad import usable_in
from relion_cryofilter.kinds import OF_LABELS, ThresholdRequest
from relion_cryofilter.locks import one_run
from relion_cryofilter.options import SelectOptions
from relion_cryofilter.particles.particles import named_in
from relion_cryofilter.particles.tables import read_particle_file, read_table
from relion_cryofilter.progress import counted
from relion_cryofilter.results.outputs import (
    Output,
    log_files,
    refuse_to_overwrite,
    results_folder,
    subset_names,
    write_subsets,
)
from relion_cryofilter.thresholds import Chosen, read_curve, threshold_and_reason

log = logging.getLogger("relion_cryofilter")


@one_run()
def select(
    options: SelectOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Sort an already scored STAR file again.

    Raises
    ------
    CryoFilterError
        The file has no scores, or the threshold can't be found.
    """
    # Read.
    again = options.add or options.random
    if options.in_parts is None or options.o is None or not (options.threshold or again):
        raise UsageError(
            "Give --in_parts scored.star, --threshold (0.5, keep=0.6, count=50000 …) and --o DIR/."
        )
    sources = (options.in_parts, *options.add)
    refuse_to_overwrite(sources, [options.o / name for name in subset_names()])
    results_folder(options.o)
    table = read_table(options.in_parts)
    scores = table.scores(options.score_label)
    log.info(
        "Read %s: %s, scores %.4f to %.4f.", options.in_parts, counted(len(scores), "particle"),
        scores.min(), scores.max(),
    )  # fmt: skip

    # Compute: who is accepted, by a threshold or as in the job that scored, and who is added.
    if options.threshold is not None:
        chosen = _by_threshold(options.threshold, options.weights, scores)
        how = f"Threshold {chosen.threshold:g} ({chosen.reason})"
    else:
        chosen = _as_accepted(options.in_parts, scores)
        how = f"Accepted {chosen.reason}"
    usable = np.ones(len(scores), bool)
    if (options.in_parts.parent / BAD_IMAGES).is_file():
        usable = usable_in(read_particle_file(options.in_parts), options.in_parts.parent)
    chosen = replace(chosen, accepted=chosen.accepted & usable)
    accepted = chosen.accepted
    if options.add:
        accepted = accepted | _added(options.in_parts, options.add, accepted)
        chosen = Chosen(scores, accepted, chosen.threshold, chosen.reason)
        how += " or added"
    drawn = None
    if options.random:
        drawn = np.zeros(len(scores), bool)
        rng = np.random.default_rng(options.seed)
        among = np.flatnonzero(usable | accepted)
        drawn[rng.choice(among, int(accepted.sum()), replace=False)] = True

    # Write.
    if options.threshold is not None:
        chosen.warn_if_none()
    table.remove((options.o / RANDOM).with_suffix(table.suffix))  # of an earlier run
    outputs, holds = write_subsets(options.o, table, accepted, drawn=drawn)
    log_files(options.o, holds, f"{how}: {chosen.describe()}.")
    return outputs


def _by_threshold(request: ThresholdRequest, weights: Path | None, scores: np.ndarray) -> Chosen:
    """Accept by a threshold from the scores (n,), or from the curve of the model that made them."""
    reason = request.reason
    if request.kind in OF_LABELS:
        if weights is None:
            raise UsageError(f"The threshold {request} needs the model that scored: --weights.")
        curve = read_curve(weights)
        threshold = curve.threshold(request)
        reason += f"; {curve.describe(threshold)}"
        log.info("Taking it that the scores were made by %s: they don't tell.", weights)
    else:
        threshold, reason = threshold_and_reason(request, scores)
    accepted = scores >= threshold
    if request.kind == "count" and accepted.sum() > request.value:
        reason += "; particles that tie with the last one are accepted too"
    return Chosen(scores, accepted, threshold, reason)


def _as_accepted(scored: Path, scores: np.ndarray) -> Chosen:
    """Accept those of (n,) particles that are in the accepted file beside `scored`."""
    before, others = (
        scored.with_name(name).with_suffix(scored.suffix) for name in (ACCEPTED, REJECTED)
    )
    accepted = np.zeros(len(scores), bool)
    if before.is_file():
        accepted = named_in(read_particle_file(scored), read_particle_file(before))
    elif not others.is_file():
        raise UsageError(
            f"There is no {before}, so what was accepted isn't known. Give the particles.star of a "
            "score job, or --threshold."
        )
    return Chosen(scores, accepted, float("nan"), f"as in {before}")


def _added(scored: Path, paths: Sequence[Path], accepted: np.ndarray) -> np.ndarray:
    """Return which of the particles in `scored` are in any of the files; (n,) bool."""
    particles = read_particle_file(scored)
    everything = np.zeros(len(particles), bool)
    for path in paths:
        further = read_particle_file(path)
        found = named_in(particles, further)
        known = int(named_in(further, particles).sum())
        if not known:
            raise UsageError(
                f"--add {path}: none of its {len(further):,} particles is in {scored}. Give the "
                "particles.star of a selection among the rejected of that job."
            )
        new = int((found & ~accepted & ~everything).sum())
        log.info(
            "Added %s of %s: %s accepted already, %s not in %s.",
            counted(new, "particle"), path, f"{int(found.sum()) - new:,}",
            f"{len(further) - known:,}", scored,
        )  # fmt: skip
        everything |= found
    return everything

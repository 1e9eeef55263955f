"""``select``: a scored STAR file in, its two subsets by another threshold out; no images."""

from __future__ import annotations

import logging
from collections.abc import Callable

from relion_cryofilter.errors import UsageError
from relion_cryofilter.locks import one_run
from relion_cryofilter.options import SelectOptions
from relion_cryofilter.particles.tables import read_table
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
    if options.in_parts is None or options.o is None or options.threshold is None:
        raise UsageError(
            "Give --in_parts scored.star, --threshold (0.5, keep=0.6, count=50000 …) and --o DIR/."
        )
    refuse_to_overwrite([options.in_parts], [options.o / name for name in subset_names()])
    results_folder(options.o)
    table = read_table(options.in_parts)
    scores = table.scores(options.score_label)
    log.info(
        "Read %s: %s, scores %.4f to %.4f.", options.in_parts, counted(len(scores), "particle"),
        scores.min(), scores.max(),
    )  # fmt: skip

    # Compute: the threshold, from the scores or from the curve of the model that made them.
    request = options.threshold
    reason = request.reason
    if request.kind in ("recall", "precision"):
        if options.weights is None:
            raise UsageError("A threshold for recall or precision needs the model: --weights.")
        curve = read_curve(options.weights)
        threshold = curve.threshold(request)
        reason += f"; {curve.describe(threshold)}"
        log.info("Taking it that the scores were made by %s: they don't tell.", options.weights)
    else:
        threshold, reason = threshold_and_reason(request, scores)
    accepted = scores >= threshold
    if request.kind == "count" and accepted.sum() > request.value:
        reason += "; particles that tie with the last one are accepted too"
    chosen = Chosen(scores, accepted, threshold, reason)

    # Write.
    chosen.warn_if_none()
    outputs, holds = write_subsets(options.o, table, chosen.accepted)
    log_files(options.o, holds, f"Threshold {threshold:g} ({reason}): {chosen.describe()}.")
    return outputs

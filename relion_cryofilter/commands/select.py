"""``select``: a scored STAR file in, its two subsets by another threshold out; no images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.commands.closing import log_files
from relion_cryofilter.commands.subsets import (
    Table,
    describe_counts,
    describe_subsets,
    refuse_to_overwrite,
    result_names,
    warn_if_none,
    write_accepted_and_rejected,
)
from relion_cryofilter.data.cryosparc import CS_SUFFIXES, read_cs
from relion_cryofilter.data.star import Loop, StarFile, columns, particle_loop, read_star
from relion_cryofilter.data.star_writing import StarTable
from relion_cryofilter.errors import ModelError, StarError, UsageError
from relion_cryofilter.options import SelectOptions
from relion_cryofilter.results.operating_curve import OperatingCurve
from relion_cryofilter.results.thresholds import choose_threshold
from relion_cryofilter.wording import counted

log = logging.getLogger("relion_cryofilter")


def select(
    options: SelectOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Sort an already scored STAR file again.

    Raises
    ------
    CryoFilterError
        The file has no scores, or the threshold can't be found.
    """
    if options.in_parts is None or options.o is None or options.threshold is None:
        raise UsageError(
            "Give --in_parts scored.star, --threshold (0.5, keep=0.6, count=50000 …) and --o DIR/."
        )
    refuse_to_overwrite([options.in_parts], [options.o / name for name in result_names()])
    table, scores = _read_scored(options.in_parts, options.score_label)
    request = options.threshold
    reason = "as asked" if request.kind == "score" else f"for {request}"
    if request.kind in ("recall", "precision"):
        curve = _stored_curve(options.weights)
        threshold = curve.threshold(request)
        reason += f"; {curve.describe(threshold)}"
        log.info("Taking it that the scores were made by %s: they don't tell.", options.weights)
    else:
        threshold = choose_threshold(request, scores)
    log.info(
        "Read %s: %s, scores %.4f to %.4f.", options.in_parts, counted(len(scores), "particle"),
        scores.min(), scores.max(),
    )  # fmt: skip
    accepted = scores >= threshold
    if request.kind == "count" and accepted.sum() > request.value:
        reason += "; particles that tie with the last one are accepted too"
    options.o.mkdir(parents=True, exist_ok=True)
    warn_if_none(accepted, scores, threshold)
    outputs = write_accepted_and_rejected(options.o, table, accepted)
    log_files(
        options.o, describe_subsets(table, accepted),
        f"Threshold {threshold:g} ({reason}): {describe_counts(accepted)}.",
    )  # fmt: skip
    return outputs


def _read_scored(path: Path, label: str) -> tuple[Table, np.ndarray]:
    """Return the particles of a scored file and their scores (n,)."""
    if path.suffix in CS_SUFFIXES:
        table = read_cs(path)
        return table, table.scores()
    star = read_star(path)
    loop = particle_loop(star)
    return StarTable(star, loop, label), read_scores(star, loop, label)


def read_scores(star: StarFile, loop: Loop, label: str) -> np.ndarray:
    """Return the scores (n,) in column `label` of a scored STAR file.

    Raises
    ------
    StarError
        The column is missing or holds something that is no number.
    """
    if label not in loop.labels:
        raise StarError(
            f"{star.path}: has no column {label}. Give the particles.star of a score job, or name "
            "the column with --score_label."
        )
    scores = np.empty(loop.n_rows)
    for row, (text,) in enumerate(columns(star, loop, [label])):
        try:
            scores[row] = float(text)
        except ValueError:
            scores[row] = np.nan
        if not 0 <= scores[row] <= 1:
            raise StarError(
                f"{star.path}, line {loop.first_line + row}: {label} is {text!r}; expected "
                "a score from 0 to 1."
            )
    return scores


def _stored_curve(path: Path | None) -> OperatingCurve:
    """Read a model's validation curve without torch."""
    if path is None:
        raise UsageError("A threshold for recall or precision needs the model: --weights.")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            text = (file.metadata() or {})["relion_cryofilter"]
        return OperatingCurve.from_dict(json.loads(text)["provenance"]["operating_curve"])
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: can't be read as one model file ({error}). Name the .safetensors of a train "
            "job; select takes one."
        ) from error
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{path}: has no validation curve ({error!r}). Give a model made by `train`, or "
            "ask for a threshold such as 0.5 or keep=0.6."
        ) from error

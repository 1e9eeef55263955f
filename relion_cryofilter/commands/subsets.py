"""Accepted and rejected particles as STAR files, for `score` and `select`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.data.star import Loop, StarFile
from relion_cryofilter.data.star_writing import write_scored, write_subsets
from relion_cryofilter.errors import UsageError

ALL, ACCEPTED, REJECTED = "particles.star", "particles_accepted.star", "particles_rejected.star"

log = logging.getLogger("relion_cryofilter")


def write_accepted_and_rejected(
    folder: Path, star: StarFile, loop: Loop, accepted: np.ndarray
) -> tuple[Output, ...]:
    """Write the two subsets, rows byte for byte."""
    filled = _filled(folder, {ACCEPTED: accepted, REJECTED: ~accepted})
    write_subsets(star, loop, {folder / name: mask for name, mask in filled.items()})
    return tuple(Output(name, "particles") for name in filled)


def write_all_with_scores(
    folder: Path,
    star: StarFile,
    loop: Loop,
    accepted: np.ndarray,
    label: str,
    values: np.ndarray,
) -> tuple[Output, ...]:
    """Write the two subsets and the whole set, each row with its score in column `label`."""
    subsets = {ACCEPTED: accepted, REJECTED: ~accepted, ALL: np.ones_like(accepted)}
    filled = _filled(folder, subsets)
    files = {folder / name: mask for name, mask in filled.items()}
    write_scored(star, loop, label, values, files)
    return tuple(Output(name, "particles") for name in filled)


def _filled(folder: Path, subsets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out empty subsets (relion_refine crashes on one) and remove their older files."""
    for name, mask in subsets.items():
        if not mask.any():
            (folder / name).unlink(missing_ok=True)
            log.warning("No particles for %s, so it is not written.", name)
    return {name: mask for name, mask in subsets.items() if mask.any()}


def refuse_to_overwrite(sources: Iterable[Path | None], results: Iterable[Path]) -> None:
    """Raise a UsageError if a result would replace an input."""
    targets = {os.path.realpath(path) for path in results}
    for source in sources:
        if source is not None and os.path.realpath(source) in targets:
            raise UsageError(
                f"The results would overwrite the input {source}. Choose another folder for --o."
            )


def describe_counts(accepted: np.ndarray) -> str:
    """Return ``812 accepted (81.2 %), 188 rejected``."""
    n, kept = len(accepted), int(accepted.sum())
    return f"{kept:,} accepted ({100 * kept / n:.1f} %), {n - kept:,} rejected"


def warn_if_none(accepted: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    """Say how far the best particle is from a threshold that none reaches."""
    if not accepted.any():
        log.warning(
            "The highest score is %.6f, below the threshold %g. keep=0.5 would accept half.",
            scores.max(), threshold,
        )  # fmt: skip

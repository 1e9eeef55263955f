"""Accepted and rejected particles as files like the input's, for `score` and `select`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from relion_cryofilter.commands import Output
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.star_writing import StarTable
from relion_cryofilter.errors import UsageError
from relion_cryofilter.result_files import ACCEPTED, ALL, REJECTED
from relion_cryofilter.wording import counted

log = logging.getLogger("relion_cryofilter")


class Table(Protocol):
    """Particles that can be written again: a STAR file's, or CryoSPARC's."""

    @property
    def suffix(self) -> str:
        """End of the names of its files."""

    def write(self, subsets: Mapping[Path, np.ndarray], values: np.ndarray | None = None) -> None:
        """Write the rows of each mask to its file, with scores (n,) if given."""

    def remove(self, path: Path) -> None:
        """Remove what an earlier `write` made of `path`."""


def table_of(particles: ParticleSet, label: str) -> Table | None:
    """Return how to write the particles again, None for plain stacks.

    Parameters
    ----------
    particles
        As they were read.
    label
        The column of a STAR file for the scores; CryoSPARC's files have one field for them.
    """
    if particles.star is not None and particles.loop is not None:
        return StarTable(particles.star, particles.loop, label)
    return particles.cs


def result_names() -> list[str]:
    """Return the names of all files that this module may write."""
    names = [Path(name) for name in (ALL, ACCEPTED, REJECTED)]
    ends = (".star", ".cs", ".csg", "_passthrough.cs")
    return [name.stem + end for name in names for end in ends]


def write_accepted_and_rejected(
    folder: Path, table: Table, accepted: np.ndarray
) -> tuple[Output, ...]:
    """Write the two subsets as they were read."""
    return _write(folder, table, {ACCEPTED: accepted, REJECTED: ~accepted}, None)


def write_all_with_scores(
    folder: Path, table: Table, accepted: np.ndarray, values: np.ndarray
) -> tuple[Output, ...]:
    """Write the two subsets and the whole set, each particle with its score."""
    subsets = {ACCEPTED: accepted, REJECTED: ~accepted, ALL: np.ones_like(accepted)}
    return _write(folder, table, subsets, values)


def _write(
    folder: Path, table: Table, subsets: dict[str, np.ndarray], values: np.ndarray | None
) -> tuple[Output, ...]:
    """Write the subsets; leave out empty ones (relion_refine crashes on them)."""
    filled = {}
    for name, mask in subsets.items():
        path = (folder / name).with_suffix(table.suffix)
        if mask.any():
            filled[path] = mask
            continue
        table.remove(path)
        log.warning("No particles for %s, so it is not written.", path.name)
    table.write(filled, values)
    outputs = tuple(Output(path.name, "particles") for path in filled)
    return outputs if table.suffix == ".star" else ()


def describe_all(table: Table, accepted: np.ndarray) -> dict[str, str]:
    """Return what the files of `write_all_with_scores` hold, by name, for the end of run.out."""
    everything = {_file_name(ALL, table): counted(len(accepted), "particle") + " with scores"}
    return {**everything, **describe_subsets(table, accepted)}


def describe_subsets(table: Table, accepted: np.ndarray) -> dict[str, str]:
    """Return what the files of `write_accepted_and_rejected` hold, by name."""
    kept = int(accepted.sum())
    counts = {ACCEPTED: kept, REJECTED: len(accepted) - kept}
    return {_file_name(name, table): counted(count, "particle") for name, count in counts.items()}


def _file_name(name: str, table: Table) -> str:
    return Path(name).with_suffix(table.suffix).name


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

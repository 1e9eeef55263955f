"""Particles with labels, and how they are shared out for training, validation and test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.errors import CryoFilterError

UNITS = ("micrograph", "stack", "particle")
ATTEMPTS = 200


@dataclass(frozen=True)
class LabelledSet:
    """Particles of known kind.

    Attributes
    ----------
    particles
        n particles, each once.
    labels
        (n,) bool, True for particles to keep.
    notes
        What was left out and why, with counts; for the log.
    """

    particles: ParticleSet
    labels: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray, note: str = "") -> LabelledSet:
        """Return the part of this set in `rows`, with one more note."""
        notes = (*self.notes, note) if note else self.notes
        return LabelledSet(self.particles.take(rows), self.labels[rows], notes)

    @property
    def fingerprint(self) -> str:
        """Short hex SHA-256 of the image names and labels, whatever their order."""
        names = [self.particles.image_name(row) for row in range(len(self))]
        lines = sorted(f"{name} {label}" for name, label in zip(names, self.labels.tolist()))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Split:
    """Rows for training, validation (choices) and test (the figure that is reported).

    Attributes
    ----------
    train, validation, test
        Row numbers, ascending.
    unit
        What is never on two sides: ``micrograph``, ``stack`` or ``particle``.
    groups
        (n,) the unit of each row, as numbers; the clusters of the bootstrap.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    unit: str
    groups: np.ndarray

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The three parts by name."""
        return {"training": self.train, "validation": self.validation, "test": self.test}


def split_by_micrograph(
    particles: ParticleSet, labels: np.ndarray, train_fraction: float, seed: int
) -> Split:
    """Share out particles so that no micrograph is on two sides and every side has both labels.

    Where that can't be (too few micrographs, or one kind of particle in too few of them), whole
    stacks are shared out, and where that can't be either, particles.

    Parameters
    ----------
    particles, labels
        n particles and (n,) bool.
    train_fraction
        Share of the training part; the rest is halved between validation and test.
    seed
        The same seed gives the same split.

    Raises
    ------
    CryoFilterError
        There are fewer than three particles of a kind.
    """
    for kind, count in (("positive", labels.sum()), ("negative", (~labels).sum())):
        if count < len(("train", "validation", "test")):
            raise CryoFilterError(
                f"Only {count} {kind} particle(s); training, validation and test need at least "
                "one each. Label more."
            )
    for unit in UNITS[:2]:
        groups = _units(particles, unit)
        parts = _share_out_groups(groups, labels, train_fraction, seed)
        if parts is not None and (unit == "stack" or particles.has_micrographs):
            return Split(*parts, unit, groups)
    return Split(
        *_share_out_particles(labels, train_fraction, seed), "particle", clusters_of(particles)
    )


def clusters_of(particles: ParticleSet) -> np.ndarray:
    """Return (n,) the micrograph of each particle, or its own number where none is known.

    Particles of one micrograph are alike, so intervals resample whole micrographs.
    """
    return _units(particles, "micrograph" if particles.has_micrographs else "particle")


def _units(particles: ParticleSet, unit: str) -> np.ndarray:
    if unit == "particle":
        return np.arange(len(particles))
    return particles.micrograph_of if unit == "micrograph" else particles.stack_of


def _share_out_groups(
    groups: np.ndarray, labels: np.ndarray, train_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the most even of many random splits of whole groups; None if none has all labels."""
    numbers, group_of = np.unique(groups, return_inverse=True)
    n = len(numbers)
    if n < 3:
        return None
    counts = np.stack([np.bincount(group_of, kind, n) for kind in (labels, ~labels)])
    n_train = min(n - 2, max(1, round(train_fraction * n)))
    cuts = [n_train, n_train + (n - n_train) // 2]
    rest = (1 - train_fraction) / 2
    wanted = np.array([train_fraction, rest, rest])
    rng = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(ATTEMPTS):
        parts = np.split(rng.permutation(n), cuts)
        held = np.stack([counts[:, part].sum(axis=1) for part in parts], axis=1)
        off = np.abs(held / held.sum(axis=1, keepdims=True) - wanted).max(axis=1).sum()
        if held.min() > 0 and off < least:
            best, least = parts, off
    if best is None:
        return None
    train, validation, test = (np.flatnonzero(np.isin(group_of, part)) for part in best)
    return train, validation, test


def _share_out_particles(
    labels: np.ndarray, train_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share out single particles, each kind by itself."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for kind in (labels, ~labels):
        rows = rng.permutation(np.flatnonzero(kind))
        n_train = min(len(rows) - 2, max(1, round(train_fraction * len(rows))))
        middle = n_train + (len(rows) - n_train) // 2
        for part, share in zip(parts, np.split(rows, [n_train, middle])):
            part.append(share)
    train, validation, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, validation, test

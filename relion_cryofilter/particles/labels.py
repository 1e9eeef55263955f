"""Labels: a Select job, classes, or files of good and bad particles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.particles.particles import (
    ParticleSet,
    Table,
    concatenate,
    particles_of_stacks,
    read_particles,
)
from relion_cryofilter.particles.selections import (
    classes_in,
    read_selections,
    sizes_in_words,
)
from relion_cryofilter.particles.splits import short_hash
from relion_cryofilter.particles.stacks import is_stack
from relion_cryofilter.particles.tables import is_cryosparc, read_particle_file

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class Origin:
    """The classification that labels come from.

    Attributes
    ----------
    table, rows
        Its table of particles, and (n,) the row of each labelled particle in it.
    classes
        (n,) class numbers.
    count
        How many rows the table has.
    """

    table: Table
    rows: np.ndarray
    classes: np.ndarray
    count: int

    def take(self, rows: np.ndarray) -> Origin:
        """Return the part in `rows`."""
        return replace(self, rows=self.rows[rows], classes=self.classes[rows])

    def views(self) -> np.ndarray | None:
        """Return the directions (n, 3) that the particles are seen from, None without poses."""
        seen = self.table.views()
        return None if seen is None else seen[self.rows]


@dataclass(frozen=True)
class LabelledSet:
    """Particles of known kind.

    Attributes
    ----------
    particles
        n particles, each once.
    labels
        (n,) bool, True for good particles.
    notes
        What was left out and why, with counts; for the log.
    origin
        The classification that labels come from; None where they come from files.
    """

    particles: ParticleSet
    labels: np.ndarray
    notes: tuple[str, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray, note: str = "") -> LabelledSet:
        """Return the part of this set in `rows`, with one more note."""
        notes = (*self.notes, note) if note else self.notes
        origin = self.origin.take(rows) if self.origin else None
        return LabelledSet(self.particles.take(rows), self.labels[rows], notes, origin)

    def good(self) -> ParticleSet:
        """Return the particles to keep."""
        return self.particles.take(np.flatnonzero(self.labels))

    @property
    def fingerprint(self) -> str:
        """Short hex SHA-256 of the image names and labels, whatever their order."""
        names = [self.particles.image_name(row) for row in range(len(self))]
        lines = sorted(f"{name} {label}" for name, label in zip(names, self.labels.tolist()))
        return short_hash("\n".join(lines))


def read_labels(
    in_parts: Path | None,
    pos: Sequence[Path] = (),
    neg: Sequence[Path] = (),
    pos_classes: Sequence[int] = (),
    neg_classes: Sequence[int] = (),
) -> LabelledSet:
    """Return labelled particles from whichever source is given; log where the labels are from.

    `pos` and `neg` are files of good and of bad particles, STAR, .cs or plain stacks. A particle
    that stands there twice counts once; one that is on both sides is left out.

    Raises
    ------
    CryoFilterError
        No source is given, or two, or there are not particles of both kinds.
    """
    if (pos or neg) and (in_parts or pos_classes or neg_classes):
        raise UsageError("Labels come from --pos and --neg, or from --in_parts; not from both.")
    if neg_classes and not pos_classes:
        raise UsageError("--neg_classes is given without --pos_classes. Name the good ones too.")
    if pos or neg:
        sides: list[list[ParticleSet]] = [[], []]
        for name, paths, side in zip(("--pos", "--neg"), (pos, neg), sides):
            if not paths:
                raise UsageError(f"{name} names no file; training and metrics need both sides.")
            for path in paths:
                read = read_particle_file
                side.append(particles_of_stacks([path]) if is_stack(path) else read(path))
        note = f"Labels from files: {len(pos)} positive, {len(neg)} negative."
        labelled = labelled_particles(sides[0], sides[1], note)
    elif in_parts is None:
        raise UsageError(
            "Labels are needed: --in_parts Select/job009/particles.star, --in_parts …_data.star "
            "with --pos_classes 1,4,7, or --pos good.star --neg bad.star."
        )
    elif pos_classes:
        labelled = labels_of_classes(in_parts, pos_classes, neg_classes)
    else:
        labelled = labels_of_select_job(in_parts)
    for note in labelled.notes:
        log.info("%s", note)
    return labelled


def labels_of_select_job(particles_star: Path) -> LabelledSet:
    """Return the particles of a classification, positive where a Select job kept their class.

    `particles_star` is the Select job's; the job.star beside it names the classification. Where
    particles of several were joined, all of them are returned; see `read_selections`.
    """
    _refuse_without_choice(particles_star)
    found = read_selections(particles_star)
    sets = [selection.particles for selection in found]
    particles = sets[0] if len(sets) == 1 else concatenate(sets)
    labels = np.concatenate([selection.labels for selection in found])
    notes = [note for selection in found for note in selection.notes]
    # The job's particles should be those of the kept classes.
    selected, classes = read_particles(particles_star), np.where(labels, 1, 0)
    n_kept, there = int(labels.sum()), len(selected)
    good = int((classes_in(selected, particles, classes) == 1).sum())
    if (n_kept, there) != (good, good):
        notes.append(
            f"{particles_star} has {there:,} particles, the kept classes {n_kept:,} ("
            f"{n_kept - good:,} missing there, {there - good:,} only there). Classes count."
        )
    origin = None
    if len(found) == 1:
        table, everyone = particles.table, np.arange(len(particles))
        assert table is not None
        origin = Origin(table, everyone, found[0].classes, len(particles))
    return _checked(particles, labels, notes, origin)


def labels_of_classes(
    data_star: Path, positive: Sequence[int], negative: Sequence[int]
) -> LabelledSet:
    """Return the particles of the named classes; without negative classes, all others are bad."""
    particles = read_particle_file(data_star)
    assert particles.table is not None
    classes = particles.table.classes()
    both = sorted(set(positive) & set(negative))
    if both:
        raise UsageError(f"Class {both[0]} is in --pos_classes and in --neg_classes. Choose one.")
    for number in (*positive, *negative):
        if number not in classes:
            raise UsageError(
                f"No particle of {data_star} is in class {number}. Classes (particles): "
                f"{sizes_in_words(classes)}."
            )
    labels = np.isin(classes, positive)
    named = labels | (np.isin(classes, negative) if negative else True)
    notes = [f"Labels from the classes of {data_star}: {_listed(positive)} are positive, "
             f"{_listed(negative) if negative else 'all others'} negative."]  # fmt: skip
    if not named.all():
        notes.append(f"{(~named).sum():,} particles of classes that are not named are left out.")
    rows = np.flatnonzero(named)
    origin = Origin(particles.table, rows, classes[rows], len(classes))
    return _checked(particles.take(rows), labels[rows], notes, origin)


def labelled_particles(
    good: Sequence[ParticleSet], bad: Sequence[ParticleSet], note: str
) -> LabelledSet:
    """Return good and bad particles as one set, each once and none as both."""
    particles = concatenate([*good, *bad])
    labels = np.arange(len(particles)) < sum(map(len, good))
    return _checked(particles, labels, [note])


def _checked(
    particles: ParticleSet,
    labels: np.ndarray,
    notes: Sequence[str],
    origin: Origin | None = None,
) -> LabelledSet:
    """Return each particle once, those named as both kinds left out; refuse one kind only."""
    key = np.stack([particles.stack_of.astype(np.int64), particles.index])
    _, first, image_of = np.unique(key, axis=1, return_index=True, return_inverse=True)
    image_of = image_of.reshape(-1)
    good, bad = (np.bincount(image_of[kind], minlength=len(first)) for kind in (labels, ~labels))
    both = (good > 0) & (bad > 0)
    twice = int((np.maximum(good + bad, 1) - 1)[~both].sum())
    rows = np.sort(first[~both])
    if both.any():
        notes = [*notes, f"{both.sum():,} particles are named as good and as bad; left out."]
    if twice:
        notes = [*notes, f"{twice:,} rows name a particle again; each is counted once."]
    labels = labels[rows]
    for kind, count in (("positive", labels.sum()), ("negative", (~labels).sum())):
        if count == 0:
            raise CryoFilterError(
                f"No {kind} particles are left. {' '.join(notes)} Both kinds are needed: choose "
                "the classes or files so that some particles are good and some are bad."
            )
    origin = origin.take(rows) if origin else None
    return LabelledSet(particles.take(rows), labels, tuple(notes), origin)


def _refuse_without_choice(particles_star: Path) -> None:
    """Raise a UsageError for what can't be a Select job's particles."""
    if not particles_star.is_file():
        raise UsageError(f"--in_parts {particles_star} does not exist (in {Path.cwd()}).")
    if is_stack(particles_star):
        raise UsageError(f"{particles_star} is an image stack; give stacks as --pos and --neg.")
    if is_cryosparc(particles_star):
        raise UsageError(
            f"{particles_star} holds no labels. Give the two particle outputs of Select 2D as "
            "--pos particles_selected.cs --neg particles_excluded.cs, or --pos_classes."
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

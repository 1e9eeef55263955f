"""Labels: a Select job, classes, or files of good and bad particles."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import CryoFilterError, StarError, UsageError
from relion_cryofilter.files import find_project
from relion_cryofilter.particles.cryosparc import CS_SUFFIXES
from relion_cryofilter.particles.particles import (
    ParticleSet,
    concatenate,
    particles_of_stacks,
    read_particles,
)
from relion_cryofilter.particles.splits import short_hash
from relion_cryofilter.particles.star import CLASS_NUMBER, read_star
from relion_cryofilter.particles.tables import read_particle_file

STACK_SUFFIXES = (".mrcs", ".mrc", ".st")
_REFERENCE, _SELECTED = "rlnReferenceImage", "rlnSelected"

log = logging.getLogger("relion_cryofilter")


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
                stack = path.suffix in STACK_SUFFIXES
                side.append(particles_of_stacks([path]) if stack else read_particle_file(path))
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
    """Return the particles of a Class2D job, positive where the Select job kept their class.

    `particles_star` is the Select job's; the job.star beside it names the classification.
    """
    folder = particles_star.parent
    data_star = _classified_particles(folder, particles_star)
    # The classes in class_averages.star are those that were kept.
    averages = folder / "class_averages.star"
    table = _small_table(averages, _REFERENCE, CLASS_NUMBER)
    if not table.get(_REFERENCE):
        raise CryoFilterError(f"{averages}: lists no classes. Select some in the Select job.")
    label, pattern, expected = CLASS_NUMBER, r"(\d+)(?:\.0*)?$", "a number"
    if CLASS_NUMBER not in table:  # 000003@…_classes.mrcs in 2D, …class003.mrc in 3D
        label, pattern, expected = _REFERENCE, r".*class(\d+)\.mrc|(\d+)@", "a class's number in it"
    kept = set()
    for text in table[label]:
        found = re.match(pattern, text)
        if not found:
            raise CryoFilterError(f"{averages}: {label} is {text!r}; expected {expected}.")
        kept.add(int(next(filter(None, found.groups()))))
    particles = read_particles(data_star)
    assert particles.table is not None
    classes = particles.table.classes()
    labels = np.isin(classes, sorted(kept))
    notes = [
        f"Labels from {folder}: of the {len(set(classes.tolist()))} classes in {data_star}, "
        f"kept: {_listed(sorted(kept))}."
    ]
    # The job's particles should be those of the kept classes, and so should its backup.
    selected = read_particles(particles_star)
    there = {selected.image_name(row) for row in range(len(selected))}
    names = {particles.image_name(row) for row in np.flatnonzero(labels).tolist()}
    if not there & names:
        raise CryoFilterError(
            f"{particles_star} has none of the {len(names):,} particles of the kept classes, so "
            "the Select job and the classification don't belong together. Select again."
        )
    if there != names:
        notes.append(
            f"{particles_star} has {len(there):,} particles, the kept classes {len(names):,} ("
            f"{len(names - there):,} missing there, {len(there - names):,} only there). Classes "
            "count."
        )
    backup = folder / "backup_selection.star"
    if backup.is_file():
        chosen = _small_table(backup, _SELECTED).get(_SELECTED, [])
        classes_there = {number for number, text in enumerate(chosen, 1) if text == "1"}
        if classes_there != kept:
            notes.append(
                f"{backup} names other classes ({_listed(sorted(classes_there))}); "
                "class_averages.star counts."
            )
    return _checked(particles, labels, notes)


def labels_of_classes(
    data_star: Path, positive: Sequence[int], negative: Sequence[int]
) -> LabelledSet:
    """Return the particles of the named classes; without negative classes, all others are bad."""
    particles = read_particle_file(data_star)
    assert particles.table is not None
    classes = particles.table.classes()
    present = Counter(classes.tolist())
    both = sorted(set(positive) & set(negative))
    if both:
        raise UsageError(f"Class {both[0]} is in --pos_classes and in --neg_classes. Choose one.")
    for number in (*positive, *negative):
        if number not in present:
            there = ", ".join(f"{c} ({n:,})" for c, n in sorted(present.items()))
            raise UsageError(
                f"No particle of {data_star} is in class {number}. Classes (particles): {there}."
            )
    labels = np.isin(classes, positive)
    named = labels | (np.isin(classes, negative) if negative else True)
    notes = [f"Labels from the classes of {data_star}: {_listed(positive)} are positive, "
             f"{_listed(negative) if negative else 'all others'} negative."]  # fmt: skip
    if not named.all():
        notes.append(f"{(~named).sum():,} particles of classes that are not named are left out.")
    rows = np.flatnonzero(named)
    return _checked(particles.take(rows), labels[rows], notes)


def labelled_particles(
    good: Sequence[ParticleSet], bad: Sequence[ParticleSet], note: str
) -> LabelledSet:
    """Return good and bad particles as one set, each once and none as both."""
    particles = concatenate([*good, *bad])
    labels = np.arange(len(particles)) < sum(map(len, good))
    return _checked(particles, labels, [note])


def _checked(particles: ParticleSet, labels: np.ndarray, notes: Sequence[str]) -> LabelledSet:
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
    return LabelledSet(particles.take(rows), labels, tuple(notes))


def _classified_particles(folder: Path, particles_star: Path) -> Path:
    """Return the _data.star of the classification that a Select job worked on.

    Not read with starfile, which fails on values with both kinds of quotes, and on missing ones.
    """
    if not particles_star.is_file():
        raise UsageError(f"--in_parts {particles_star} does not exist (in {Path.cwd()}).")
    if particles_star.suffix in STACK_SUFFIXES:
        raise UsageError(f"{particles_star} is an image stack; give stacks as --pos and --neg.")
    if particles_star.suffix in CS_SUFFIXES:
        raise UsageError(
            f"{particles_star} holds no labels. Give the two particle outputs of Select 2D as "
            "--pos particles_selected.cs --neg particles_excluded.cs, or --pos_classes."
        )
    try:
        job_star = read_star(folder / "job.star")
    except StarError as error:
        raise CryoFilterError(
            f"{particles_star}: no labels here. Expected the particles.star of a Select job (with "
            "its job.star beside it), a _data.star with --pos_classes 1,4,7, or --pos and --neg "
            f"files. ({error})"
        ) from error
    loop = job_star.loop("joboptions_values")
    options = loop.columns(["rlnJobOptionVariable", "rlnJobOptionValue"]) if loop else ()
    model = next((value for name, value in options if name == "fn_model"), "")
    root = Path() if os.path.isfile(model) else find_project(folder) or Path()  # noqa: PTH113
    if model.endswith("_model.star"):
        data_star = root / model.replace("_model.star", "_data.star")
    elif model.endswith("_optimiser.star"):
        named = read_star(root / model).pairs.get("rlnExperimentalDataStarFile", "")
        if not named:
            raise CryoFilterError(f"{root / model}: has no _rlnExperimentalDataStarFile.")
        data_star = root / named.strip("\"'")
    else:
        raise CryoFilterError(
            f"{folder}/job.star: fn_model is {model!r}, so this Select job did not choose classes. "
            "Give one that did, or name files with --pos and --neg."
        )
    if not os.path.isfile(data_star):  # noqa: PTH113 - False for names of any length
        raise CryoFilterError(f"{folder}/job.star names {model}, but {data_star} is missing.")
    return data_star


def _small_table(path: Path, *labels: str) -> dict[str, list[str]]:
    """Return the columns that the first table with `labels[0]` has of `labels`; {} if none has."""
    import linecache

    import starfile  # half a second, with pandas

    linecache.clearcache()  # or starfile may give a file's text of before
    try:
        tables = starfile.read(path, always_dict=True, parse_as_string=list(labels))
    except OSError as error:
        raise CryoFilterError(f"{path}: can't be read ({error.strerror or 'missing'}).") from error
    except (ValueError, TypeError, IndexError) as error:
        raise CryoFilterError(f"{path}: can't be read as a STAR table ({error}).") from error
    if not tables:
        raise CryoFilterError(f"{path}: no table found; is this a STAR file in UTF-8?")
    for table in tables.values():
        if labels[0] in table:
            there = [label for label in labels if label in table]
            return {label: [str(value) for value in table[label]] for label in there}
    return {}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

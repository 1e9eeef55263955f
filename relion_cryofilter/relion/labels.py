"""Labels that a project holds already: a Select job, classes, files of good and bad particles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relion_cryofilter.data.cryosparc import CS_SUFFIXES
from relion_cryofilter.data.cryosparc_particles import read_particle_file
from relion_cryofilter.data.labelled import LabelledSet
from relion_cryofilter.data.names import parse_image_name
from relion_cryofilter.data.particles import (
    ParticleSet,
    concatenate,
    particles_of_stacks,
    read_particles,
)
from relion_cryofilter.data.project import find_project
from relion_cryofilter.data.star import StarFile, columns, read_star
from relion_cryofilter.data.star_labels import CLASS_NUMBER
from relion_cryofilter.errors import CryoFilterError, CryoSparcError, StarError, UsageError

STACK_SUFFIXES = (".mrcs", ".mrc", ".st")


def read_labels(
    in_parts: Path | None,
    pos: Sequence[Path] = (),
    neg: Sequence[Path] = (),
    pos_classes: Sequence[int] = (),
    neg_classes: Sequence[int] = (),
) -> LabelledSet:
    """Return labelled particles from whichever source is given.

    Raises
    ------
    UsageError
        No source is given, or two.
    CryoFilterError
        The source does not give particles of both kinds.
    """
    if pos or neg:
        if in_parts or pos_classes or neg_classes:
            raise UsageError("Labels come from --pos and --neg, or from --in_parts; not from both.")
        return labels_of_files(pos, neg)
    if in_parts is None:
        raise UsageError(
            "Labels are needed: --in_parts Select/job009/particles.star, --in_parts …_data.star "
            "with --pos_classes 1,4,7, or --pos good.star --neg bad.star."
        )
    if pos_classes:
        return labels_of_classes(in_parts, pos_classes, neg_classes)
    if neg_classes:
        raise UsageError("--neg_classes is given without --pos_classes. Name the good ones too.")
    return labels_of_select_job(in_parts)


def labels_of_select_job(particles_star: Path) -> LabelledSet:
    """Return the particles of a Class2D job, positive where the Select job kept their class.

    Parameters
    ----------
    particles_star
        The particles.star of a Select job. The job's job.star names the classification.

    Raises
    ------
    CryoFilterError
        This is no Select job on classes, or its files are gone; the message says which.
    """
    folder = particles_star.parent
    data_star = _classified_particles(folder, particles_star)
    kept = _kept_classes(folder)
    particles = read_particles(data_star)
    classes = _class_numbers(particles)
    labels = np.isin(classes, sorted(kept))
    notes = [
        f"Labels from {folder}: of the {len(set(classes.tolist()))} classes in {data_star}, "
        f"kept: {_listed(sorted(kept))}."
    ]
    notes += _compare_with_selection(particles, labels, particles_star)
    notes += _compare_with_backup(folder, kept)
    return _checked(particles, labels, notes)


def labels_of_classes(
    data_star: Path, positive: Sequence[int], negative: Sequence[int]
) -> LabelledSet:
    """Return the particles of the named classes; without negative classes, all others are.

    Raises
    ------
    CryoFilterError
        The file has no classes, a class is on both sides, or no particle is in a named class.
    """
    particles = read_particle_file(data_star)
    classes = _class_numbers(particles)
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


def labels_of_files(positive: Sequence[Path], negative: Sequence[Path]) -> LabelledSet:
    """Return the particles of STAR files and plain stacks that hold good and bad ones.

    A particle that stands there twice counts once; one that is on both sides is left out.
    """
    sides = [[_read(path) for path in paths] for paths in (positive, negative)]
    for name, side in zip(("--pos", "--neg"), sides):
        if not side:
            raise UsageError(f"{name} names no file; training and metrics need both sides.")
    note = f"Labels from files: {len(positive)} positive, {len(negative)} negative."
    return labelled_particles(sides[0], sides[1], note)


def labelled_particles(
    good: Sequence[ParticleSet], bad: Sequence[ParticleSet], note: str
) -> LabelledSet:
    """Return good and bad particles as one set, as `labels_of_files` does."""
    particles = concatenate([*good, *bad])
    labels = np.arange(len(particles)) < sum(map(len, good))
    return _checked(particles, labels, [note])


def _read(path: Path) -> ParticleSet:
    stack = path.suffix in STACK_SUFFIXES
    return particles_of_stacks([path]) if stack else read_particle_file(path)


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
    """Return the _data.star of the classification that a Select job worked on."""
    if not particles_star.is_file():
        raise UsageError(f"--in_parts {particles_star} does not exist (in {Path.cwd()}).")
    if particles_star.suffix in STACK_SUFFIXES:
        raise UsageError(f"{particles_star} is an image stack; give stacks as --pos and --neg.")
    if particles_star.suffix in CS_SUFFIXES:
        raise UsageError(
            f"{particles_star} tells no labels. Give the two particle outputs of Select 2D as "
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
    model = _job_options(job_star).get("fn_model", "")
    project = find_project(folder) or Path()
    root = Path() if (Path() / model).is_file() else project
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
    if not data_star.is_file():
        raise CryoFilterError(f"{folder}/job.star names {model}, but {data_star} is missing.")
    return data_star


def _job_options(job_star: StarFile) -> dict[str, str]:
    loop = job_star.loop("joboptions_values")
    if loop is None:
        return {}
    names = ["rlnJobOptionVariable", "rlnJobOptionValue"]
    return {row[0]: row[1] for row in columns(job_star, loop, names)}


def _kept_classes(folder: Path) -> set[int]:
    """Return the classes in class_averages.star."""
    path = folder / "class_averages.star"
    star = read_star(path)
    loop = next((loop for loop in star.loops if "rlnReferenceImage" in loop.labels), None)
    if loop is None or not loop.n_rows:
        raise CryoFilterError(f"{path}: lists no classes. Select some in the Select job.")
    if CLASS_NUMBER in loop.labels:
        return {_class_number(path, number) for (number,) in columns(star, loop, [CLASS_NUMBER])}
    return {_class_of(path, name) for (name,) in columns(star, loop, ["rlnReferenceImage"])}


def _class_of(path: Path, reference: str) -> int:
    """Return the class of ``000003@…classes.mrcs`` (2D) or ``…class003.mrc`` (3D)."""
    volume = re.search(r"class(\d+)\.mrc", reference)
    if volume:
        return int(volume[1])
    if "@" not in reference:
        raise CryoFilterError(f"{path}: can't tell the class of {reference!r}.")
    return parse_image_name(reference)[0] + 1


def _class_number(path: Path | str, text: str) -> int:
    try:
        number = float(text)
        if number != int(number):
            raise ValueError(text)
    except (ValueError, OverflowError):
        raise CryoFilterError(f"{path}: {CLASS_NUMBER} is {text!r}; expected a number.") from None
    return int(number)


def _class_numbers(particles: ParticleSet) -> np.ndarray:
    if particles.cs is not None:
        numbers = particles.cs.column("alignments2D/class")
        if numbers is None:
            raise CryoSparcError(f"{particles.source}: has no field alignments2D/class.")
        return numbers.astype(np.int64)
    assert particles.star is not None
    assert particles.loop is not None
    if CLASS_NUMBER not in particles.loop.labels:
        raise CryoFilterError(
            f"{particles.source}: has no column {CLASS_NUMBER}. Give the _data.star of a Class2D "
            "or Class3D job, or the particles.star of a Select job on classes."
        )
    values = columns(particles.star, particles.loop, [CLASS_NUMBER])
    return np.array([_class_number(particles.source, number) for (number,) in values])


def _compare_with_selection(
    particles: ParticleSet, labels: np.ndarray, particles_star: Path
) -> list[str]:
    """Say where the Select job's particles differ from those of the kept classes."""
    selected = read_particles(particles_star)
    names = {selected.image_name(row) for row in range(len(selected))}
    kept = {particles.image_name(row) for row in np.flatnonzero(labels).tolist()}
    if names == kept:
        return []
    if not names & kept:
        raise CryoFilterError(
            f"{particles_star} has none of the {len(kept):,} particles of the kept classes, so the "
            "Select job and the classification don't belong together. Select again."
        )
    return [
        f"{particles_star} has {len(names):,} particles, the kept classes {len(kept):,} ("
        f"{len(kept - names):,} missing there, {len(names - kept):,} only there). Classes count."
    ]


def _compare_with_backup(folder: Path, kept: set[int]) -> list[str]:
    path = folder / "backup_selection.star"
    if not path.is_file():
        return []
    star = read_star(path)
    loop = next((loop for loop in star.loops if "rlnSelected" in loop.labels), None)
    values = columns(star, loop, ["rlnSelected"]) if loop else []
    backup = {number for number, (chosen,) in enumerate(values, 1) if chosen == "1"}
    if backup == kept:
        return []
    return [f"{path} names other classes ({_listed(sorted(backup))}); class_averages.star counts."]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

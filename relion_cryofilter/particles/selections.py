"""What Select jobs chose: which classes of which classifications.

Three witnesses tell which classes a job kept, and they must agree about those that hold particles:

1. the particles in its particles.star, by their classes in the classification's own file;
2. class_averages.star, by rlnClassNumber, else by the places in the classification's own stack
   (``000003@Class2D/job002/run_it025_classes.mrcs``, ``…_it025_class003.mrc``): in a stack of the
   Select job's, such as recentred averages, places are no class numbers;
3. backup_selection.star, whose row i is class i + 1. RELION can leave it from before: where the
   other two agree, it is outvoted.

Jobs on classes of Class2D (VDAM or not), Class3D or the class ranker name their model or optimiser.
Jobs that split, sort or join what others had chosen are followed to those.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relion_cryofilter.errors import CryoFilterError, StarError
from relion_cryofilter.files import find_project
from relion_cryofilter.inputs import seen
from relion_cryofilter.particles.particles import ParticleSet, numbers_of, read_particles
from relion_cryofilter.particles.star import CLASS_NUMBER, StarFile, particle_loop, read_star

AVERAGES, BACKUP = "class_averages.star", "backup_selection.star"
_REFERENCE, _SELECTED = "rlnReferenceImage", "rlnSelected"
_PARTICLES_FILE, _ROOT_NAME = "rlnExperimentalDataStarFile", "rlnOutputRootName"
_STACK, _CLASS = r"(\d+)@(.+)", r"(.*_)class(\d+)\.mrcs?"
_SOURCES = ("fn_part1", "fn_part2", "fn_part3", "fn_part4", "fn_data")  # of JoinStar, of Select
_MOST_LISTED = 20


@dataclass(frozen=True)
class Selection:
    """The classes of one classification that were kept.

    Attributes
    ----------
    particles, classes
        All n particles of the classification, and (n,) int64, their classes.
    kept
        The classes, ascending.
    notes
        Where this is from, and what is odd about it.
    """

    particles: ParticleSet
    classes: np.ndarray
    kept: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """(n,) bool, True in kept classes."""
        return np.isin(self.classes, self.kept)


def read_selections(particles_star: Path, followed: tuple[Path, ...] = ()) -> tuple[Selection, ...]:
    """Return what a Select job, or those that it or a JoinStar job has its particles from, chose.

    Raises
    ------
    CryoFilterError
        There is no such job, it did not choose classes, or its files contradict each other.
    """
    folder = particles_star.parent
    try:
        job_star = read_star(folder / "job.star")
    except StarError as error:
        raise _no_choice(
            particles_star,
            f"{particles_star}: no labels here. Expected the particles.star of a Select job (with "
            "its job.star beside it), a _data.star with --pos_classes 1,4,7, or --pos and --neg "
            f"files. ({error})",
        ) from error
    options = _options(job_star)
    model = options.get("fn_model", "")
    if model:
        return _selections_of_model(particles_star, _root_of(folder, model), model)

    # A range of class numbers, or what other jobs had chosen.
    sources = [options[name] for name in _SOURCES if options.get(name) and _sorts(job_star)]
    root = _root_of(folder, *sources)
    by_value = options.get("do_select_values") == "Yes"
    if sources and by_value and options.get("select_label") == CLASS_NUMBER:
        return (_selection(particles_star, root / sources[-1], {}, ()),)
    found: dict[tuple[str, tuple[int, ...]], Selection] = {}
    for source in sources:
        path = root / source
        if path in followed:
            raise CryoFilterError(f"{folder}/job.star: its input {source} is made of its output.")
        for selection in read_selections(path, (*followed, particles_star)):
            found.setdefault((selection.particles.source, selection.kept), selection)
    if not found:
        raise _no_choice(
            particles_star,
            f"{folder}/job.star: fn_model is {model!r}, so this Select job did not choose classes. "
            "Give one that did, or name files with --pos and --neg.",
        )
    return tuple(found.values())


def _root_of(folder: Path, *names: str) -> Path:
    """Return what the `names` in a job's folder are relative to: its project, or here."""
    project = find_project(folder) or Path()
    roots = (Path() if project == Path().resolve() else project, Path())
    return next((root for root in roots if all((root / n).is_file() for n in names)), roots[0])


def _options(job_star: StarFile) -> dict[str, str]:
    """Return a job's options by name.

    Not read with starfile, which fails on values with both kinds of quotes, and on missing ones.
    """
    loop = job_star.loop("joboptions_values")
    pairs = loop.columns(["rlnJobOptionVariable", "rlnJobOptionValue"]) if loop else ()
    return {name: value.strip("\"'") for name, value in pairs}


def _sorts(job_star: StarFile) -> bool:
    """Tell whether a job only sorts or joins particles: Select (7) or JoinStar (13)."""
    kind = job_star.pairs.get("rlnJobTypeLabel") or job_star.pairs.get("rlnJobType", "")
    return kind in ("7", "13") or "select" in kind or "joinstar" in kind


def _selections_of_model(particles_star: Path, root: Path, model: str) -> tuple[Selection, ...]:
    """Return what a Select job on the classes of `model` kept; of one classification, usually."""
    folder, own = particles_star.parent, [re.sub(r"(model|optimiser)\.star$", "", model)]
    if model.endswith("_model.star"):
        data_star = root / model.replace("_model.star", "_data.star")
    elif model.endswith("_optimiser.star"):
        pairs = read_star(root / model).pairs
        if not pairs.get(_PARTICLES_FILE):
            raise CryoFilterError(f"{root / model}: has no _{_PARTICLES_FILE}.")
        data_star = root / pairs[_PARTICLES_FILE].strip("\"'")
        # The class ranker's optimiser stands in the Select job's folder, and its stack does not.
        own += [f"{pairs[_ROOT_NAME]}_"] if pairs.get(_ROOT_NAME) else []
    else:
        raise CryoFilterError(
            f"{folder}/job.star: fn_model is {model!r}, so this Select job did not choose classes. "
            "Give one that did, or name files with --pos and --neg."
        )
    if not data_star.is_file():
        raise CryoFilterError(f"{folder}/job.star names {model}, but {data_star} is missing.")
    averages = _classes_of_averages(folder / AVERAGES, root, data_star, own)
    if len(averages) < 2:
        return (_selection(particles_star, data_star, averages, _kept_in_backup(folder)),)

    # Averages of several classifications: each particle must be in a kept class of its own.
    selected = read_particles(particles_star)
    numbers, explained, found = _own_classes(selected), np.zeros(len(selected), bool), []
    for path, kept in averages.items():
        particles = read_particles(path)
        classes = _classes(particles)
        there = classes_in(selected, particles, classes)
        explained |= np.isin(there, sorted(kept)) & ((numbers == there) | (numbers < 0))
        notes = (_whence(folder, path, classes, kept),)
        found.append(Selection(particles, classes, tuple(sorted(kept)), notes))
    if not explained.all():
        raise CryoFilterError(
            f"{particles_star}: {(~explained).sum():,} of its {len(explained):,} particles are in "
            f"none of the classes that {folder / AVERAGES} lists, of {_listed(averages)}. Give the "
            "Select jobs' particles with --pos, and what they left with --neg."
        )
    return tuple(found)


def _selection(
    particles_star: Path,
    data_star: Path,
    averages: Mapping[Path, set[int]],
    backup: Sequence[int] | None,
) -> Selection:
    """Return the classes of one classification that a job's particles are of, if all agree.

    `averages` are the classes that class_averages.star names, if it does; `backup` are those of
    backup_selection.star, None without such a file, () if it is not asked.
    """
    folder, selected = particles_star.parent, read_particles(particles_star)
    particles = read_particles(data_star)
    classes = _classes(particles)
    there, numbers = classes_in(selected, particles, classes), _own_classes(selected)
    known = there >= 0
    cure = (
        f"Select again, or name the good classes yourself: --in_parts {data_star} --pos_classes 1,4"
    )
    kept = set(there[known].tolist())
    named = averages.get(data_star)
    held = set(classes.tolist())
    if not kept or (named is not None and not kept & named):
        count = np.isin(classes, sorted(named or held)).sum()
        raise CryoFilterError(
            f"{particles_star} has none of the {count:,} particles of the kept classes, so "
            f"the Select job and the classification don't belong together. {cure}."
        )
    moved = known & (numbers >= 0) & (numbers != there)
    if moved.any():
        row = int(moved.argmax())
        raise CryoFilterError(
            f"{particles_star}: {moved.sum():,} of its particles are in other classes than in "
            f"{data_star} ({selected.image_name(row)}: {numbers[row]} here, {there[row]} there). "
            f"The classification went on since, or files of several were joined. {cure}."
        )
    if named is not None and named & held != kept:
        raise CryoFilterError(
            f"{folder / AVERAGES} names the classes {_listed(sorted(named))}, but {particles_star} "
            f"has particles of {_listed(sorted(kept))}. {cure}."
        )
    notes = [_whence(folder, data_star, classes, named or kept)]
    if backup is None or backup == () or set(backup) & held == kept:
        pass
    elif named is None:
        raise CryoFilterError(
            f"{folder / BACKUP} names the classes {_listed(backup)}, but {particles_star} has "
            f"particles of {_listed(sorted(kept))}. {cure}."
        )
    else:
        notes.append(
            f"{folder / BACKUP} names other classes ({_listed(backup)}); {AVERAGES} counts."
        )
    if not known.all():
        notes.append(
            f"{(~known).sum():,} particles of {particles_star} are not in {data_star}, so nothing "
            "is known of their classes; left out. Were files joined? Name those with --pos."
        )
    return Selection(particles, classes, tuple(sorted(named or kept)), tuple(notes))


def _whence(folder: Path, data_star: Path, classes: np.ndarray, kept: Iterable[int]) -> str:
    return (
        f"Labels from {folder}: of the {len(np.unique(classes))} classes in {data_star}, "
        f"kept: {_listed(sorted(kept))}."
    )


def classes_in(selected: ParticleSet, particles: ParticleSet, classes: np.ndarray) -> np.ndarray:
    """Return (m,) the classes that the `selected` have among n `particles`; -1 for those not there.

    Images are known by their names, for RELION sorts rows anew; `classes` are (n,).
    """
    stacks: dict[str, int] = {}
    keys = []
    for item in (particles, selected):
        number = numbers_of(item.stack_names, stacks).astype(np.int64)
        keys.append((number[item.stack_of] << 32) + item.index)
    there, wanted = keys
    order = np.argsort(there, kind="stable")
    place = order[np.searchsorted(there, wanted, sorter=order).clip(max=len(there) - 1)]
    return np.where(there[place] == wanted, classes[place], -1)


def _classes(particles: ParticleSet) -> np.ndarray:
    assert particles.table is not None
    return particles.table.classes()


def _own_classes(selected: ParticleSet) -> np.ndarray:
    """Return (m,) the class numbers in a file itself; -1 where it has none."""
    there = selected.table is not None and CLASS_NUMBER in selected.table.labels
    return _classes(selected) if there else np.full(len(selected), -1)


def _classes_of_averages(
    path: Path, root: Path, data_star: Path, own: Sequence[str]
) -> dict[Path, set[int]]:
    """Return the classes that class_averages.star names, by the classification's particles.

    Empty if there is no such file, or if its images are in no classification's stack.
    """
    if not path.is_file():
        return {}
    table = _small_table(path, _REFERENCE, CLASS_NUMBER)
    if not table.get(_REFERENCE):
        raise CryoFilterError(f"{path}: lists no classes. Select some in the Select job.")
    numbers: list[str] | None = table.get(CLASS_NUMBER)
    found: dict[Path, set[int]] = {}
    for row, reference in enumerate(table[_REFERENCE]):
        place, _, stack = reference.rpartition("@")
        single = re.fullmatch(_CLASS, reference)
        if not single and not re.fullmatch(_STACK, reference) and numbers is None:
            raise CryoFilterError(
                f"{path}: {_REFERENCE} is {reference!r}; expected a class's number in it."
            )
        # Whose stack it is: this classification's, another's, or none's.
        start = single[1] if single else stack.removesuffix("classes.mrcs")
        other = root / f"{start}data.star"
        mine = any(start.startswith(name) for name in own) or other == data_star
        of = data_star if mine or not (start != stack and other.is_file()) else other
        if numbers is not None:
            text = re.fullmatch(r"(\d+)(?:\.0*)?", numbers[row])
            if not text:
                raise CryoFilterError(
                    f"{path}: {CLASS_NUMBER} is {numbers[row]!r}; expected a number."
                )
            found.setdefault(of, set()).add(int(text[1]))
        elif mine or of != data_star:
            found.setdefault(of, set()).add(int(single[2] if single else place))
    return found


def _kept_in_backup(folder: Path) -> tuple[int, ...] | None:
    """Return the classes that backup_selection.star names; None without the file."""
    path = folder / BACKUP
    if not path.is_file():
        return None
    chosen = _small_table(path, _SELECTED).get(_SELECTED, [])
    return tuple(number for number, text in enumerate(chosen, 1) if text in ("1", "1.0"))


def _no_choice(particles_star: Path, otherwise: str) -> CryoFilterError:
    """Return the error about a file without labels: its classes, if it has any to choose from."""
    try:
        loop = particle_loop(read_star(particles_star))
        classes = loop.classes() if CLASS_NUMBER in loop.labels else np.array([])
    except StarError as error:  # which is what is wrong with it
        return error
    if len(np.unique(classes)) < 2:
        return CryoFilterError(otherwise)
    return CryoFilterError(
        f"{particles_star}: nothing here says which of its classes are good. Name them: "
        f"--pos_classes 1,4,7 (all others are bad, but for --neg_classes). Classes (particles): "
        f"{sizes_in_words(classes)}."
    )


def sizes_in_words(classes: np.ndarray) -> str:
    """Return ``1 (12), 2 (1,024)`` of classes (n,): the largest, if there are many."""
    sizes = Counter(classes.tolist())
    shown = sorted(number for number, _ in sizes.most_common(_MOST_LISTED))
    text = ", ".join(f"{number} ({sizes[number]:,})" for number in shown)
    return text if len(shown) == len(sizes) else f"{text} and {len(sizes) - len(shown)} smaller"


def _small_table(path: Path, *labels: str) -> dict[str, list[str]]:
    """Return the columns that the first table with `labels[0]` has of `labels`; {} if none has."""
    import linecache

    import starfile  # half a second, with pandas

    linecache.clearcache()  # or starfile may give a file's text of before
    try:
        seen(path, path.stat())
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


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"

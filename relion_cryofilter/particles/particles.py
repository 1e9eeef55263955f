"""Particles in input order: which image each row names, its micrograph and its optics group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import repeat
from operator import contains
from pathlib import Path
from typing import ClassVar, Protocol, TypeAlias

import numpy as np

from relion_cryofilter.errors import ImageError, StarError
from relion_cryofilter.files import SCORE_LABEL, find_project
from relion_cryofilter.particles.stacks import read_header
from relion_cryofilter.particles.star import (
    IMAGE_NAME,
    IMAGE_PIXEL_SIZE,
    IMAGE_SIZE,
    MICROGRAPH_NAME,
    OPTICS_GROUP,
    Loop,
    particle_loop,
    read_star,
)
from relion_cryofilter.progress import counted

_LARGEST_INDEX = 2**31 - 1  # RELION and the MRC header count images with 32 bits
_MOST_MISSING = 100_000  # more are a damaged header, not a truncated stack
_NO_NAMES = {"", "null", "none", "nan", "na", "n/a", "<na>", "undefined", "unknown", "-", "0"}
_TRIED = 100  # so many stacks tell which folder their names are relative to
_LABELS = (IMAGE_NAME, MICROGRAPH_NAME, OPTICS_GROUP)  # the columns that are read
Numbered: TypeAlias = tuple[Iterable[str], np.ndarray]  # names, each once; of each row its number


class Table(Protocol):
    """The file that particles were read from, row for row: a STAR loop, or CryoSPARC's .cs."""

    suffix: ClassVar[str]  # end of the names of its files

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its columns."""

    def write(
        self,
        subsets: Mapping[Path, np.ndarray],
        scores: np.ndarray | None = None,
        label: str = SCORE_LABEL,
    ) -> None:
        """Write the rows of each mask (n,) to its file, with scores (n,) if given."""

    def remove(self, path: Path) -> None:
        """Remove what an earlier `write` made of `path`."""

    def numbers(self, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return those of RELION's columns that it has, (n,) float32, NaN for no number."""

    def scores(self, label: str = SCORE_LABEL) -> np.ndarray:
        """Return the scores (n,), 0 to 1, of particles that were scored."""

    def classes(self) -> np.ndarray:
        """Return the class numbers (n,) int64."""

    def views(self) -> np.ndarray | None:
        """Return the directions (n, 3) that particles are seen from, None without poses."""

    def place(self, row: int) -> str:
        """Return where a 0-based row stands, for messages."""


def parse_image_name(name: str) -> tuple[int, str]:
    """Split ``000012@path/x.mrcs`` into (11, ``path/x.mrcs``); only this module knows 1-based.

    A name without ``@`` is a file with one image: index 0. RELION's type suffix (``x.mrc:mrcs``)
    and CryoSPARC's leading ``>`` are taken off. What has no number of at least 1, or no path, is a
    ValueError.
    """
    number, at, path = name.removeprefix(">").partition("@")
    if not at:
        number, path = "1", name
    path = path.removeprefix(">")
    whole = number.isascii() and number.isdecimal()
    if not (whole and path and 1 <= int(number) <= _LARGEST_INDEX):
        raise ValueError(name)
    stem, colon, suffix = path.rpartition(":")
    if colon and suffix in ("mrcs", "mrc"):
        path = stem
    return int(number) - 1, path


def parse_image_names(
    names: Sequence[str], where: Callable[[int], str], first: int = 0
) -> tuple[list[int], list[str]]:
    """Split many image names into 0-based places and stacks, as `parse_image_name` does each.

    `where` says where the name of a row stands and `first` is the row of the first one, for the
    StarError about a name that is none.
    """
    # Where all names look like 12@x.mrcs, they are split at once.
    parts = "\n".join(names).replace("@", "\n").split("\n")
    numbers, stacks = parts[::2], parts[1::2]
    if len(parts) == 2 * len(names) and all(map(contains, names, repeat("@"))):
        digits = "".join(numbers)
        plain = digits.isascii() and digits.isdecimal() and all(numbers)
        path_text = "".join(stacks)
        if plain and all(stacks) and ":" not in path_text and ">" not in path_text:
            with suppress(ValueError):  # of numbers with thousands of digits
                places = [int(number) - 1 for number in numbers]
                if min(places) >= 0 and max(places) < _LARGEST_INDEX:
                    return places, stacks
    both = []
    for row, name in enumerate(names, first):
        try:
            both.append(parse_image_name(name))
        except ValueError:
            raise StarError(
                f"{where(row)}: the image name is {name!r}; expected N@stack.mrcs with N from 1."
            ) from None
    return [place for place, _ in both], [stack for _, stack in both]


def numbers_of(names: Iterable[str], seen: dict[str, int]) -> np.ndarray:
    """Return the number of each name, (n,) int32; a name that was not `seen` gets the next one."""
    return np.fromiter((seen.setdefault(name, len(seen)) for name in names), np.int32)


def numbered(names: Iterable[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return each name once, in order of appearance, and (n,) int32 into them."""
    seen: dict[str, int] = {}
    of_rows = numbers_of(names, seen)
    return tuple(seen), of_rows


@dataclass(frozen=True)
class OpticsGroup:
    """One optics group: the value of rlnOpticsGroup; pixel size and box of its images if known."""

    name: str
    pixel_size_angstrom: float | None = None
    box_px: float | None = None


def group_name(text: str) -> str:
    """Return an optics group's number as RELION reads it: ``01`` and ``1.000000`` are ``1``."""
    number = _positive(text)
    return str(int(number)) if number and number == int(number) else text


def _positive(text: str) -> float | None:
    """Return a positive number, or None for anything else (0, text)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


@dataclass(frozen=True)
class ParticleSet:
    """Particles in input order and where their images are.

    Attributes
    ----------
    source
        What was read: a file's path, or a description of the stacks.
    stacks, stack_names
        Each stack once, as it can be opened, and as the input names it.
    stack_of, index
        (n,) int32 into `stacks`, and (n,) int64, the image's 0-based place in its stack.
    micrographs, micrograph_of
        Micrograph names and (n,) int32 into them. Without rlnMicrographName the stacks stand in.
    optics, optics_of
        Optics groups and (n,) int32 into them.
    has_micrographs
        Whether the input names micrographs.
    unnumbered
        Names of stacks that are named without a number, so they should hold one image.
    inverted
        For each stack, whether protein is dark in it, so that its images are contrast-inverted
        when read; empty if it is dark in none.
    table
        The file they were read from, row for row; None for plain stacks and for parts of sets.
    """

    source: str
    stacks: tuple[Path, ...]
    stack_names: tuple[str, ...]
    stack_of: np.ndarray
    index: np.ndarray
    micrographs: tuple[str, ...]
    micrograph_of: np.ndarray
    optics: tuple[OpticsGroup, ...]
    optics_of: np.ndarray
    has_micrographs: bool = False
    inverted: tuple[bool, ...] = ()
    table: Table | None = None
    unnumbered: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.stack_of)

    @property
    def optics_used(self) -> list[OpticsGroup]:
        """The optics groups that particles are of."""
        return [self.optics[number] for number in np.unique(self.optics_of).tolist()]

    def image_name(self, row: int) -> str:
        """Return the image of `row` as RELION writes it, ``000012@path`` (1-based)."""
        return f"{self.index[row] + 1:06d}@{self.stack_names[self.stack_of[row]]}"

    def take(self, rows: np.ndarray) -> ParticleSet:
        """Return the particles of `rows`, in that order."""
        return replace(
            self,
            stack_of=self.stack_of[rows],
            index=self.index[rows],
            micrograph_of=self.micrograph_of[rows],
            optics_of=self.optics_of[rows],
            table=None,
        )

    def describe(self) -> str:
        """Return ``1,400 particles in 14 stacks, 14 micrographs, 1 optics group``."""
        held = (self.stack_of, self.micrograph_of, self.optics_of)
        stacks, micrographs, groups = (len(np.unique(numbers)) for numbers in held)
        text = f"{counted(len(self), 'particle')} in {counted(stacks, 'stack')}"
        if self.has_micrographs:
            text += f", {counted(micrographs, 'micrograph')}"
        return f"{text}, {counted(groups, 'optics group')}"

    def place(self, row: int) -> str:
        """Return where `row` stands, for messages: its place in the file, or the image."""
        return self.image_name(row) if self.table is None else self.table.place(row)


def particle_set(
    source: object,
    root: Path,
    stacks: Numbered,
    index: np.ndarray | Sequence[int],
    micrographs: Numbered | None = None,
    optics: tuple[Iterable[OpticsGroup], np.ndarray] | None = None,
    inverted: Sequence[bool] = (),
    table: Table | None = None,
) -> ParticleSet:
    """Return particles whose stacks are named from `root`, with what stands in for None.

    Every reader ends here: micrographs that are None are the stacks, as are those whose names are
    none (``null``), and optics are one group.
    """
    names, stack_of = tuple(stacks[0]), stacks[1].astype(np.int32, copy=False)
    groups, optics_of = optics or ([OpticsGroup("1")], np.zeros(len(stack_of)))
    # A name that is none stands for no micrograph: the image's stack stands in.
    if micrographs is not None:
        known = list(micrographs[0])
        none = np.array([name.strip().lower() in _NO_NAMES for name in known], bool)
        if none.all():
            micrographs = None
        elif none.any():
            nameless, seen = none[micrographs[1]], {name: n for n, name in enumerate(known)}
            stands_in = numbers_of(names, seen)[stack_of]
            micrographs = list(seen), np.where(nameless, stands_in, micrographs[1])
    mics, micrograph_of = micrographs or (names, stack_of)
    return ParticleSet(
        source=str(source),
        stacks=tuple(root / name for name in names),
        stack_names=names,
        stack_of=stack_of,
        index=np.asarray(index, np.int64),
        micrographs=tuple(mics),
        micrograph_of=micrograph_of,
        optics=tuple(groups),
        optics_of=optics_of.astype(np.int32, copy=False),
        has_micrographs=micrographs is not None,
        inverted=tuple(inverted),
        table=table,
    )


def read_particles(path: str | Path) -> ParticleSet:
    """Read the particles of a STAR file, streaming.

    Raises
    ------
    StarError
        The file is one that RELION or this program would misread; the message says why.
    """
    path = Path(path)
    star = read_star(path)
    loop = particle_loop(star)
    labels = [label for label in _LABELS if label in loop.labels]
    # Optics groups by their numbers; without a table of them there is one.
    groups: dict[str, OpticsGroup] = {}
    table = star.loop("optics")
    if table and OPTICS_GROUP in table.labels:
        known = [
            label for label in (OPTICS_GROUP, IMAGE_PIXEL_SIZE, IMAGE_SIZE) if label in table.labels
        ]
        for texts_of in table.columns(known):
            about = dict(zip(known, texts_of))
            sizes = [_positive(about.get(label, "")) for label in (IMAGE_PIXEL_SIZE, IMAGE_SIZE)]
            name = group_name(about[OPTICS_GROUP])
            groups[name] = OpticsGroup(name, *sizes)
    if not groups:
        groups["1"] = OpticsGroup("1", _pixel_size_of_rows(loop))
        labels = [label for label in labels if label != OPTICS_GROUP]
    # Of each row the numbers of its stack, micrograph and optics group, and its image's place.
    stacks, micrographs, unnumbered = dict[str, int](), dict[str, int](), set[str]()
    groups_seen = {name: number for number, name in enumerate(groups)}
    stack_of, micrograph_of, optics_of = np.zeros((3, loop.n_rows), np.int32)
    index = np.empty(loop.n_rows, np.int64)
    first = 0
    for chunk in loop.column_chunks(labels):
        texts = dict(zip(labels, chunk))
        part = slice(first, first + len(chunk[0]))
        index[part], names = parse_image_names(texts[IMAGE_NAME], loop.place, first)
        stack_of[part] = numbers_of(names, stacks)
        for row in np.flatnonzero(index[part] == 0).tolist():  # where a name without number is
            if "@" not in texts[IMAGE_NAME][row]:
                unnumbered.add(names[row])
        if MICROGRAPH_NAME in texts:
            micrograph_of[part] = numbers_of(texts[MICROGRAPH_NAME], micrographs)
        if OPTICS_GROUP in texts:
            shown = {text: group_name(text) for text in dict.fromkeys(texts[OPTICS_GROUP])}
            optics_of[part] = numbers_of((shown[t] for t in texts[OPTICS_GROUP]), groups_seen)
        first = part.stop
    if len(groups_seen) > len(groups):
        row = int(np.argmax(optics_of >= len(groups)))
        raise StarError(
            f"{loop.place(row)}: optics group {list(groups_seen)[len(groups)]} is not in "
            f"data_optics, which has {', '.join(groups)}. Add it there, or make the file again "
            "with the job that wrote it."
        )
    named = (micrographs, micrograph_of) if micrographs else None
    root = project_root(path, list(stacks))
    optics = groups.values(), optics_of
    found = particle_set(path, root, (stacks, stack_of), index, named, optics, table=loop)
    return replace(found, unnumbered=frozenset(unnumbered)) if unnumbered else found


def _pixel_size_of_rows(loop: Loop) -> float | None:
    """Return the pixel size (Å/px) in the first row itself, or None."""
    for label in (IMAGE_PIXEL_SIZE, "rlnPixelSize"):  # of cryoDRGN and Warp
        if label in loop.labels:
            return _positive(next(loop.columns([label]))[0])
    # RELION 3.0 has the detector pixel (µm) and the magnification.
    labels = ["rlnDetectorPixelSize", "rlnMagnification"]
    if not all(label in loop.labels for label in labels):
        return None
    detector, magnification = map(_positive, next(loop.columns(labels)))
    return detector * 1e4 / magnification if detector and magnification else None


def particles_of_stacks(paths: Sequence[Path]) -> ParticleSet:
    """Return every image of plain stacks, in the order given; an ImageError if one is damaged."""
    headers = [read_header(path) for path in paths]
    for header in headers:
        if header.n_images > _MOST_MISSING + header.n_complete:
            raise ImageError(
                f"{header.path}: its header says {header.n_images:,} images, the file holds "
                f"{header.n_complete:,}. The file is damaged; copy or extract it again."
            )
    counts = [header.n_images for header in headers]
    stack_of = np.repeat(np.arange(len(paths)), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    for header in headers:
        if header.is_volume and header.n_images == header.ny == header.nx:
            raise ImageError(
                f"{header.path}: looks like a map ({header.nx} px in each direction), not a stack "
                "of particle images. Give stacks of 2D images."
            )
    optics = [OpticsGroup("1", headers[0].pixel_size_angstrom)], np.zeros(len(index))
    names = list(map(str, paths))
    return particle_set(" ".join(names), Path(), (names, stack_of), index, optics=optics)


def concatenate(sets: Sequence[ParticleSet]) -> ParticleSet:
    """Return the particles of several sets one after the other.

    A stack that several sets name (by whatever path) is one stack. Micrographs of one name are one;
    optics groups of different sets are different.
    """
    stacks, micrographs = dict[str, int](), dict[str, int]()
    held: dict[int, tuple[str, Path, bool]] = {}  # name, path and contrast of each stack
    rows, groups = [], 0
    for item in sets:
        inverted = item.inverted or (False,) * len(item.stacks)
        parts = list(zip(item.stack_names, item.stacks, inverted))
        keys = (f"{os.path.realpath(path)} {dark}" for _, path, dark in parts)
        numbers = numbers_of(keys, stacks)
        for number, part in zip(numbers.tolist(), parts):
            held.setdefault(number, part)
        mic_of = numbers_of(item.micrographs, micrographs)[item.micrograph_of]
        rows.append((numbers[item.stack_of], item.index, mic_of, item.optics_of + groups))
        groups += len(item.optics)
    stack_of, index, micrograph_of, optics_of = map(np.concatenate, zip(*rows))
    names, paths, dark = zip(*held.values())
    named = any(item.has_micrographs for item in sets)
    optics = [group for item in sets for group in item.optics], optics_of
    source, mics = ", ".join(item.source for item in sets), (micrographs, micrograph_of)
    joined = particle_set(source, Path(), (names, stack_of), index, mics, optics, dark)
    unnumbered = frozenset[str]().union(*(item.unnumbered for item in sets))
    return replace(joined, stacks=paths, has_micrographs=named, unnumbered=unnumbered)


def named_in(particles: ParticleSet, others: ParticleSet) -> np.ndarray:
    """Return which of n particles `others` has too, (n,) bool: the same image of the same stack."""
    joined = concatenate([particles, others])
    images = (joined.stack_of.astype(np.int64) << 32) + joined.index
    return np.isin(images[: len(particles)], images[len(particles) :])


def project_root(star_path: Path, stacks: Sequence[str]) -> Path:
    """Return the folder that image paths are relative to, ``Path()`` for the working directory.

    RELION's rule is the working directory, which is the project. When run from elsewhere: the
    nearest parent of the STAR file that holds default_pipeline.star, or a folder above the STAR
    file (CryoSPARC's project, for csparc2star); the first of those in which most stacks exist, of
    a hundred that are spread over the file. Where the working directory has another stack of that
    name than the nearest of the others, nobody can tell which is meant: a StarError.
    """
    tried = [stacks[n] for n in np.unique(np.linspace(0, len(stacks) - 1, _TRIED).astype(int))]
    most, best = 0, None
    project = find_project(star_path.parent)
    here = Path()
    folders = [here, *filter(None, (project, star_path.parent, *star_path.resolve().parents))]
    for folder in folders:
        there = sum(_is_file(folder / name) for name in tried)
        if there > most:
            most, best = there, folder
        if there == len(tried):
            break
    if best is not None:
        first = next(name for name in tried if _is_file(best / name))
        nearest = next((one for one in folders[1:] if _is_file(one / first)), best)
        if best is here and not (here / first).samefile(nearest / first):
            raise StarError(
                f"{star_path}: its image stack {first} is in the working directory, "
                f"{Path.cwd()}, and another of that name in {nearest.resolve()}. Start this in the "
                "folder of the project that the STAR file belongs to."
            )
        return best
    return here if project is None or find_project(here) == here.resolve() else project


def _is_file(path: Path) -> bool:
    """Tell whether a file is there; False for names that are too long for one."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for these

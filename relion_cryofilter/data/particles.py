"""ParticleSet: which image each row of the input names, and what is known about it.

Rows stay in input order for ever: scores, labels and splits refer to them by position.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from relion_cryofilter.data import star as star_text
from relion_cryofilter.data.cryosparc import CsTable
from relion_cryofilter.data.names import Numbers, parse_image_names
from relion_cryofilter.data.optics import (
    OpticsGroup,
    group_name,
    pixel_size_of_rows,
    read_optics,
)
from relion_cryofilter.data.project import find_project
from relion_cryofilter.data.stacks import read_header
from relion_cryofilter.data.star import Loop, StarFile
from relion_cryofilter.data.star_labels import (
    IMAGE_NAME,
    MICROGRAPH_NAME,
    OPTICS_GROUP,
)
from relion_cryofilter.errors import ImageError, StarError

_MOST_IMAGES = 10_000_000
"""More missing images than this are a damaged header, not a truncated stack."""

"""RELION and the MRC header count images with 32 bits."""


@dataclass(frozen=True)
class ParticleSet:
    """Particles in input order and where their images are.

    Attributes
    ----------
    source
        What was read: a STAR file's path, or a description of the stacks.
    stacks
        Each stack once, as it can be opened.
    stack_names
        The same as the input names them.
    stack_of
        (n,) int32, which of `stacks` a row's image is in.
    index
        (n,) int64, the image's 0-based place in its stack.
    micrographs, micrograph_of
        Micrograph names and (n,) int32 into them. Without rlnMicrographName the stacks stand in.
    optics, optics_of
        Optics groups and (n,) int32 into them.
    has_micrographs
        Whether the input names micrographs.
    star, loop
        The STAR file and its particle loop; None for plain stacks and for parts of sets.
    inverted
        For each stack, whether protein is dark in it; empty if it is nowhere.
    cs
        The CryoSPARC table, likewise.
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
    star: StarFile | None = None
    loop: Loop | None = None
    inverted: tuple[bool, ...] = ()
    cs: CsTable | None = None

    def __len__(self) -> int:
        return len(self.stack_of)

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
            star=None,
            loop=None,
            cs=None,
        )

    def place(self, row: int) -> str:
        """Return where `row` stands, for messages: the file's line, or the image."""
        if self.loop is None:
            return self.image_name(row)
        return f"{self.source}, row {row + 1} (line {self.loop.first_line + row})"


def read_particles(path: str | Path) -> ParticleSet:
    """Read the particles of a STAR file, streaming.

    Raises
    ------
    StarError
        The file is one that RELION or this program would misread; the message says why.
    """
    path = Path(path)
    star = star_text.read_star(path)
    loop = star_text.particle_loop(star)
    optics_table = read_optics(star)
    groups = optics_table or {"1": OpticsGroup("1", pixel_size_of_rows(star, loop))}
    has_optics = bool(optics_table) and OPTICS_GROUP in loop.labels
    labels = [IMAGE_NAME, _micrograph_label(loop)]
    labels += [OPTICS_GROUP] if has_optics else []
    stacks, micrographs, groups_seen = Numbers(), Numbers(), Numbers(groups)
    ids = np.zeros((loop.n_rows, 3), np.int32)
    index = np.empty(loop.n_rows, np.int64)
    first = 0

    def in_line(row: int) -> str:
        return f"{path}, line {loop.first_line + row}"

    for images, mics, *group in star_text.column_chunks(star, loop, labels):
        part = slice(first, first + len(images))
        index[part], names = parse_image_names(images, in_line, first)
        ids[part, 0] = stacks.of(names)
        ids[part, 1] = micrographs.of(mics if labels[1] != IMAGE_NAME else names)
        if has_optics:
            shown = {text: group_name(text) for text in dict.fromkeys(group[0])}
            ids[part, 2] = groups_seen.of([shown[text] for text in group[0]])
        first = part.stop
    _check_groups(star, loop, list(groups), list(groups_seen), ids[:, 2])
    root = project_root(path, next(iter(stacks)))
    return ParticleSet(
        source=str(path),
        stacks=tuple(root / name for name in stacks),
        stack_names=tuple(stacks),
        stack_of=ids[:, 0].copy(),
        index=index,
        micrographs=tuple(micrographs),
        micrograph_of=ids[:, 1].copy(),
        optics=tuple(groups.values()),
        optics_of=ids[:, 2].copy(),
        has_micrographs=labels[1] == MICROGRAPH_NAME,
        star=star,
        loop=loop,
    )


def particles_of_stacks(paths: Sequence[Path]) -> ParticleSet:
    """Return every image of plain stacks, in the order given.

    Raises
    ------
    ImageError
        A stack is missing or not an MRC file.
    """
    headers = [read_header(path) for path in paths]
    for header in headers:
        if header.n_images > _MOST_IMAGES + header.n_complete:
            raise ImageError(
                f"{header.path}: its header says {header.n_images:,} images, the file holds "
                f"{header.n_complete:,}. The file is damaged; copy or extract it again."
            )
    counts = [header.n_images for header in headers]
    stack_of = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
    index = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    pixel_size = headers[0].pixel_size_angstrom
    names = tuple(map(str, paths))
    return ParticleSet(
        source=" ".join(names),
        stacks=tuple(paths),
        stack_names=names,
        stack_of=stack_of,
        index=index,
        micrographs=names,
        micrograph_of=stack_of,
        optics=(OpticsGroup("1", pixel_size),),
        optics_of=np.zeros(len(stack_of), np.int32),
    )


def concatenate(sets: Sequence[ParticleSet]) -> ParticleSet:
    """Return the particles of several sets one after the other.

    A stack that several sets name (by whatever path) is one stack; micrographs are told apart by
    their names, optics groups by their set.
    """
    stacks, micrographs = Numbers(), Numbers()
    paths: list[tuple[str, Path, bool]] = []
    parts: list[list[np.ndarray]] = [[], [], [], []]
    n_optics = 0
    for item in sets:
        inverted = item.inverted or (False,) * len(item.stacks)
        numbers = [
            stacks[f"{os.path.realpath(path)} {dark}"] for path, dark in zip(item.stacks, inverted)
        ]
        for number, stack in zip(numbers, zip(item.stack_names, item.stacks, inverted)):
            if number == len(paths):
                paths.append(stack)
        mics = [micrographs[name] for name in item.micrographs]
        parts[0].append(np.array(numbers, np.int32)[item.stack_of])
        parts[1].append(item.index)
        parts[2].append(np.array(mics, np.int32)[item.micrograph_of])
        parts[3].append(item.optics_of + np.int32(n_optics))
        n_optics += len(item.optics)
    stack_of, index, micrograph_of, optics_of = (np.concatenate(part) for part in parts)
    return ParticleSet(
        source=", ".join(item.source for item in sets),
        stacks=tuple(path for _, path, _ in paths),
        stack_names=tuple(name for name, _, _ in paths),
        stack_of=stack_of,
        index=index,
        micrographs=tuple(micrographs),
        micrograph_of=micrograph_of,
        optics=tuple(group for item in sets for group in item.optics),
        optics_of=optics_of,
        has_micrographs=any(item.has_micrographs for item in sets),
        inverted=tuple(dark for _, _, dark in paths),
    )


def project_root(star_path: Path, first_stack: str) -> Path:
    """Return the folder that image paths are relative to, ``Path()`` for the working directory.

    RELION's rule is the working directory, which is the project. When run from elsewhere: the
    nearest parent of the STAR file that holds default_pipeline.star, or the STAR file's own
    folder or one above it (CryoSPARC's project, for csparc2star); the first of these in which the
    first row's stack exists.
    """
    project = find_project(star_path.parent)
    here = Path()
    for folder in filter(None, (here, project, star_path.parent, *star_path.resolve().parents)):
        if (folder / first_stack).is_file():
            return folder
    return here if project is None or find_project(here) == here.resolve() else project


def _micrograph_label(loop: Loop) -> str:
    labels = (MICROGRAPH_NAME, IMAGE_NAME)
    return next(label for label in labels if label in loop.labels)


def _check_groups(
    star: StarFile, loop: Loop, known: list[str], seen: list[str], group_of: np.ndarray
) -> None:
    if len(seen) == len(known):
        return
    row = int(np.argmax(group_of >= len(known)))
    raise StarError(
        f"{star.path}, line {loop.first_line + row}: optics group {seen[len(known)]} is not in "
        f"data_optics, which has {', '.join(known)}. Add it there, or make the file again with "
        "the job that wrote it."
    )

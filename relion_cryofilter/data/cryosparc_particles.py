"""Particles of CryoSPARC's .cs and .csg files as a `ParticleSet`; which reader a file needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relion_cryofilter.data.cryosparc import CS_SUFFIXES, CsTable, read_cs
from relion_cryofilter.data.names import numbered
from relion_cryofilter.data.optics import OpticsGroup
from relion_cryofilter.data.particles import ParticleSet, read_particles
from relion_cryofilter.data.result_groups import HERE, folders_above
from relion_cryofilter.errors import CryoSparcError, UsageError

log = logging.getLogger("relion_cryofilter")

_TRIED = 100
"""So many stacks are looked for before the project's folder is called unknown."""


def read_particle_file(
    path: Path, passthrough: Path | None = None, project: Path | None = None
) -> ParticleSet:
    """Read the particles of a STAR file, or of CryoSPARC's .cs or .csg.

    Parameters
    ----------
    path
        The file.
    passthrough
        For .cs: a file with other fields of the same particles.
    project
        For .cs: the folder that image paths are relative to; found if not given.

    Raises
    ------
    CryoFilterError
        The file, or what it names, can't be read.
    """
    if path.suffix in CS_SUFFIXES:
        return particles_of_cs(read_cs(path, passthrough), project)
    if passthrough or project:
        raise UsageError(f"--passthrough and --project_dir are for .cs files; {path} is none.")
    return read_particles(path)


def particles_of_cs(table: CsTable, project: Path | None = None) -> ParticleSet:
    """Return the images, micrographs and pixel sizes that a CryoSPARC table names.

    ``blob/sign`` is -1 where protein is dark in the stored images, as in micrographs. Those
    images are turned over when they are read: the networks want protein white.

    Raises
    ------
    CryoSparcError
        The table does not name images, or none of the stacks is where it should be.
    """
    names, stack_of = numbered(text.removeprefix(HERE) for text in _needed(table, "blob/path"))
    stacks, inverted, stack_of = _by_sign(names, stack_of, table.column("blob/sign"))
    if any(inverted):
        log.info("Protein is dark in %d stack(s) (blob/sign -1); turned over.", sum(inverted))
    micrographs, micrograph_of = stacks, stack_of
    paths = table.column("location/micrograph_path")
    if paths is not None:
        micrographs, micrograph_of = numbered(paths)
    optics, optics_of = _optics(table)
    root = _project_of(table.source, names, project)
    return ParticleSet(
        source=str(table.source),
        stacks=tuple(root / name for name in stacks),
        stack_names=stacks,
        stack_of=stack_of,
        index=np.asarray(_needed(table, "blob/idx")).astype(np.int64),
        micrographs=micrographs,
        micrograph_of=micrograph_of,
        optics=optics,
        optics_of=optics_of,
        has_micrographs=paths is not None,
        inverted=inverted,
        cs=table,
    )


def _needed(table: CsTable, name: str) -> np.ndarray:
    values = table.column(name)
    if values is None:
        there = ", ".join(slot for file in table.files for slot in file.slots())
        raise CryoSparcError(
            f"{table.source}: has no field {name} (it has {there}). Name the file that has it: "
            "--passthrough J12_passthrough_particles.cs, or give the .csg result group, which "
            "names both."
        )
    return values


def _by_sign(
    names: Sequence[str], stack_of: np.ndarray, sign: np.ndarray | None
) -> tuple[tuple[str, ...], tuple[bool, ...], np.ndarray]:
    """Return the stacks, whether they are to be turned over, and which one each row is in.

    A stack with both signs is two.
    """
    dark = np.zeros(len(stack_of), bool) if sign is None else sign < 0
    keys, place = np.unique(2 * stack_of + dark, return_inverse=True)
    pairs = [divmod(int(key), 2) for key in keys]
    stacks = tuple(names[number] for number, _ in pairs)
    return stacks, tuple(bool(odd) for _, odd in pairs), place.astype(np.int32)


def _optics(table: CsTable) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """Return one group for each pixel size (Å/px) and box (px), and (n,) int32 into them."""
    sizes, shapes = table.column("blob/psize_A"), table.column("blob/shape")
    n = len(table)
    size = np.zeros(n) if sizes is None else sizes.astype(float)
    box = np.zeros(n) if shapes is None else shapes.reshape(n, -1)[:, -1]
    kinds, place = np.unique(np.stack([size, box], axis=1), axis=0, return_inverse=True)
    groups = tuple(
        OpticsGroup(str(number), float(a) if a > 0 else None, int(b) or None)
        for number, (a, b) in enumerate(kinds, 1)
    )
    return groups, place.reshape(-1).astype(np.int32)


def _project_of(source: Path, names: Sequence[str], project: Path | None) -> Path:
    """Return the project's folder: the named one, or the nearest above `source` with the stacks."""
    folders = (project,) if project else (*folders_above(source), Path.cwd())
    for name in names[:_TRIED]:
        for folder in folders:
            if (folder / name).is_file():
                return folder
    if project:
        raise CryoSparcError(
            f"{source}: its image stack {names[0]} is not in the project's folder {project}. Check "
            "that this is its CryoSPARC project, and that links to imported stacks are not broken."
        )
    raise CryoSparcError(
        f"{source}: its image stack {names[0]} is in none of the folders above it. Expected the "
        "file in its CryoSPARC project's folder; name that folder with --project_dir, or check "
        "that links to imported stacks are not broken."
    )

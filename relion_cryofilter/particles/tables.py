"""Whatever names particles, as a ParticleSet: STAR files, CryoSPARC files, tables of pandas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from relion_cryofilter.errors import StarError, UsageError
from relion_cryofilter.particles.cryosparc import CS_SUFFIXES, particles_of_cs, read_cs
from relion_cryofilter.particles.particles import (
    OpticsGroup,
    ParticleSet,
    Table,
    group_name,
    numbered,
    parse_image_names,
    particle_set,
    read_particles,
)
from relion_cryofilter.particles.signatures import CRYOSPARC, first_bytes, kind_of_bytes
from relion_cryofilter.particles.star import (
    IMAGE_NAME,
    IMAGE_PIXEL_SIZE,
    MICROGRAPH_NAME,
    OPTICS_GROUP,
    particle_loop,
    read_star,
)

if TYPE_CHECKING:
    import pandas as pd


def read_particle_file(
    path: Path, passthrough: Path | None = None, project: Path | None = None
) -> ParticleSet:
    """Read the particles of a STAR file, or of CryoSPARC's .cs or .csg.

    For the latter: `passthrough` has other fields of the same particles, and `project` is the
    folder that image paths are relative to (found if not given).
    """
    if is_cryosparc(path):
        return particles_of_cs(read_cs(path, passthrough), project)
    if passthrough or project:
        raise UsageError(f"--passthrough and --project_dir are for .cs files; {path} is none.")
    return read_particles(path)


def read_table(path: Path) -> Table:
    """Read the table of a particle file, STAR or .cs, without its images."""
    return read_cs(path) if is_cryosparc(path) else particle_loop(read_star(path))


def is_cryosparc(path: Path) -> bool:
    """Tell whether a file is CryoSPARC's: by its name, as for .csg, or by its first bytes."""
    return path.suffix in CS_SUFFIXES or kind_of_bytes(first_bytes(path)) is CRYOSPARC


Frames: TypeAlias = Union["pd.DataFrame", Mapping[str, "pd.DataFrame"]]
"""Particles as a table, or tables with the keys ``particles`` and ``optics``."""


def particles_of_table(table: Frames, folder: Path = Path()) -> ParticleSet:
    """Return the particles of a table, row for row, with image paths relative to `folder`.

    It has the column rlnImageName, ``000012@stack.mrcs``; rlnMicrographName and rlnOpticsGroup are
    used where they are there.
    """
    frame = frame_of(table)
    if IMAGE_NAME not in frame.columns:
        raise StarError(f"The table has no column {IMAGE_NAME}; it has {', '.join(frame.columns)}.")
    names = [str(name) for name in frame[IMAGE_NAME]]
    index, stacks = parse_image_names(names, lambda row: f"Row {row} of the table")
    named = MICROGRAPH_NAME in frame.columns
    micrographs = numbered(map(str, frame[MICROGRAPH_NAME])) if named else None
    optics = None
    if isinstance(table, Mapping) and "optics" in table and OPTICS_GROUP in frame:
        known = table["optics"]
        sizes = known[IMAGE_PIXEL_SIZE] if IMAGE_PIXEL_SIZE in known else [None] * len(known)
        size_of = {group_name(str(n)): size for n, size in zip(known[OPTICS_GROUP], sizes)}
        groups, optics_of = numbered(group_name(str(name)) for name in frame[OPTICS_GROUP])
        found = [size_of.get(name) for name in groups]
        optics = [OpticsGroup(n, float(x) if x else None) for n, x in zip(groups, found)], optics_of
    source = f"a table of {len(frame):,} particles"
    return particle_set(source, folder, numbered(stacks), index, micrographs, optics)


def table_of_particles(particles: ParticleSet) -> pd.DataFrame:
    """Return image and micrograph names of particles as a table, row for row."""
    import pandas as pd  # half a second

    columns = {IMAGE_NAME: [particles.image_name(row) for row in range(len(particles))]}
    if particles.has_micrographs:
        columns[MICROGRAPH_NAME] = [particles.micrographs[n] for n in particles.micrograph_of]
    return pd.DataFrame(columns)


def is_table(value: object) -> bool:
    """Tell whether a value is a table, or tables by their names."""
    return isinstance(value, Mapping) or hasattr(value, "columns")


def frame_of(table: Frames) -> pd.DataFrame:
    """Return the particles among the tables of a STAR file, or the one table that is given."""
    if not isinstance(table, Mapping):
        return table
    if "particles" not in table:
        raise StarError(f"Found the tables {', '.join(table)}; expected one named particles.")
    return table["particles"]

"""pandas tables of particles, as `starfile.read` gives them, in and out.

pandas is imported only where a table is made: the package does not require it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from relion_cryofilter.data.names import numbered, parse_image_names
from relion_cryofilter.data.optics import OpticsGroup, group_name
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.star_labels import (
    IMAGE_NAME,
    IMAGE_PIXEL_SIZE,
    MICROGRAPH_NAME,
    OPTICS_GROUP,
)
from relion_cryofilter.errors import CryoFilterError, StarError

if TYPE_CHECKING:
    import pandas as pd

Table: TypeAlias = Union["pd.DataFrame", Mapping[str, "pd.DataFrame"]]
"""Particles as a table, or tables with the keys ``particles`` and ``optics``."""


def particles_of_table(table: Table, folder: Path = Path()) -> ParticleSet:
    """Return the particles of a table, row for row.

    Parameters
    ----------
    table
        With the column rlnImageName, ``000012@stack.mrcs``; rlnMicrographName and rlnOpticsGroup
        are used where they are there.
    folder
        What image paths are relative to: the RELION project.

    Raises
    ------
    StarError
        The table has no image names, or one of them can't be read.
    """
    frame = frame_of(table)
    if IMAGE_NAME not in frame.columns:
        raise StarError(f"The table has no column {IMAGE_NAME}; it has {', '.join(frame.columns)}.")
    names = [str(name) for name in frame[IMAGE_NAME]]
    index, names_of_stacks = parse_image_names(names, lambda row: f"Row {row} of the table")
    stacks, stack_of = numbered(names_of_stacks)
    named = MICROGRAPH_NAME in frame.columns
    micrographs, micrograph_of = (
        numbered(map(str, frame[MICROGRAPH_NAME])) if named else (stacks, stack_of)
    )
    optics, optics_of = _optics(table, frame)
    return ParticleSet(
        source=f"a table of {len(frame):,} particles",
        stacks=tuple(folder / name for name in stacks),
        stack_names=stacks,
        stack_of=stack_of,
        index=np.array(index, np.int64),
        micrographs=micrographs,
        micrograph_of=micrograph_of,
        optics=optics,
        optics_of=optics_of,
        has_micrographs=named,
    )


def table_of_particles(particles: ParticleSet) -> pd.DataFrame:
    """Return image and micrograph names of particles as a table, row for row."""
    rows = range(len(particles))
    columns = {IMAGE_NAME: [particles.image_name(row) for row in rows]}
    if particles.has_micrographs:
        columns[MICROGRAPH_NAME] = [particles.micrographs[n] for n in particles.micrograph_of]
    return table_of_columns(columns)


def table_of_columns(columns: Any) -> pd.DataFrame:
    """Return columns by name, or rows as mappings, as a table.

    Raises
    ------
    CryoFilterError
        pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise CryoFilterError("Tables need pandas. Install it: pip install pandas") from None
    return pd.DataFrame(columns)


def is_table(value: object) -> bool:
    """Tell whether a value is a table, or tables by their names."""
    return isinstance(value, Mapping) or hasattr(value, "columns")


def frame_of(table: Table) -> pd.DataFrame:
    """Return the particles among the tables of a STAR file, or the one table that is given."""
    if not isinstance(table, Mapping):
        return table
    if "particles" not in table:
        raise StarError(f"Found the tables {', '.join(table)}; expected one named particles.")
    return table["particles"]


def _optics(table: Table, frame: pd.DataFrame) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    if not isinstance(table, Mapping) or "optics" not in table or OPTICS_GROUP not in frame:
        return (OpticsGroup("1"),), np.zeros(len(frame), np.int32)
    optics = table["optics"]
    sizes = optics[IMAGE_PIXEL_SIZE] if IMAGE_PIXEL_SIZE in optics else [None] * len(optics)
    known = {group_name(str(name)): size for name, size in zip(optics[OPTICS_GROUP], sizes)}
    names, of_row = numbered([group_name(str(name)) for name in frame[OPTICS_GROUP]])
    groups = [OpticsGroup(name, float(known[name]) if known.get(name) else None) for name in names]
    return tuple(groups), of_row

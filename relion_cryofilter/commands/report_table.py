"""What the particle table says besides: defocus, CTF fit, picker score and coordinates."""

from __future__ import annotations

import numpy as np

from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.star_labels import (
    AUTOPICK_FIGURE_OF_MERIT,
    COORDINATES,
    CTF_MAX_RESOLUTION,
    DEFOCUS,
)
from relion_cryofilter.data.star_numbers import read_numbers
from relion_cryofilter.results.report_data import (
    Micrographs,
    PickMap,
    Trend,
    micrographs_of,
    trend_of,
)

MAPS_A_SIDE = 2
LABELS = (*DEFOCUS, CTF_MAX_RESOLUTION, AUTOPICK_FIGURE_OF_MERIT, *COORDINATES)


def read_columns(particles: ParticleSet) -> dict[str, np.ndarray]:
    """Read the columns of `LABELS` that the STAR file has; (n,) float32, NaN for no number."""
    if particles.star is None or particles.loop is None:
        return {}
    return read_numbers(particles.star, particles.loop, LABELS)


def trends(table: dict[str, np.ndarray], accepted: np.ndarray) -> tuple[list[Trend], list[str]]:
    """Bin acceptance by what the table knows; return notes on what it does not."""
    quantities: dict[str, np.ndarray] = {}
    if all(label in table for label in DEFOCUS):
        quantities["Defocus (µm)"] = (table[DEFOCUS[0]] + table[DEFOCUS[1]]) / 2e4
    elif DEFOCUS[0] in table:
        quantities["Defocus (µm)"] = table[DEFOCUS[0]] / 1e4
    if CTF_MAX_RESOLUTION in table:
        quantities["CTF fit (maximum resolution, Å)"] = table[CTF_MAX_RESOLUTION]
    if AUTOPICK_FIGURE_OF_MERIT in table:
        quantities["Picker score (figure of merit)"] = table[AUTOPICK_FIGURE_OF_MERIT]
    found = {label: trend_of(label, values, accepted) for label, values in quantities.items()}
    notes = [
        f"{label.partition(' (')[0]} is unknown or the same for all particles, so acceptance is "
        "not shown against it."
        for label, trend in found.items()
        if trend is None
    ]
    return [trend for trend in found.values() if trend is not None], notes


def micrograph_table(particles: ParticleSet, accepted: np.ndarray) -> Micrographs | None:
    """Count by micrograph, or by stack without micrograph names; None for a single one."""
    table = micrographs_of(particles.micrographs, particles.micrograph_of, accepted)
    return table if len(table.names) > 1 else None


def pick_maps(
    particles: ParticleSet, table: dict[str, np.ndarray], accepted: np.ndarray
) -> list[PickMap]:
    """Return the picks of the micrographs that accept least and most.

    Micrographs with less than half of the median number of picks say little and are left out.
    """
    if not particles.has_micrographs or not all(label in table for label in COORDINATES):
        return []
    counted = micrographs_of(particles.micrographs, particles.micrograph_of, accepted)
    order = counted.order
    order = order[counted.total[order] >= np.median(counted.total) / 2]
    sides = [*order[:MAPS_A_SIDE].tolist(), *order[::-1][:MAPS_A_SIDE].tolist()]
    maps = []
    for number in dict.fromkeys(sides):
        name = counted.names[number]
        rows = np.flatnonzero(particles.micrograph_of == particles.micrographs.index(name))
        xy = np.stack([table[label][rows] for label in COORDINATES], axis=1).astype(np.float64)
        known = np.isfinite(xy).all(axis=1)
        if known.any():
            maps.append(PickMap(name, xy[known], accepted[rows][known]))
    return maps

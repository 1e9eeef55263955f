"""Simulated cryo-EM micrographs with particles and junk, as arrays or as a RELION project.

A `Molecule` is a cloud of pseudo-atoms. `simulate_micrograph` scatters rotated copies and junk over
a field, images it as a weak phase object (projection x CTF, then noise) and returns the picks;
`extract` cuts and normalises boxes as RELION does. The same seed and numpy give the same bytes.
"""

from __future__ import annotations

from relion_cryofilter.data.simulate.micrograph import (
    ATOM_SIGMA_ANGSTROM,
    BACKGROUND_RADIUS,
    FIELD_PER_SITE,
    MOLECULE_PER_BOX,
    PICKS_PER_MICROGRAPH,
    SHOT_NOISE_SLOPE,
    CtfParameters,
    Field,
    Picks,
    SimulatedImages,
    ctf,
    extract,
    simulate_images,
    simulate_micrograph,
)
from relion_cryofilter.data.simulate.project import (
    OPTICS_LABELS,
    PARTICLE_LABELS,
    VERSIONS,
    simulate_project,
)
from relion_cryofilter.data.simulate.selection import simulate_selection
from relion_cryofilter.data.simulate.specimen import (
    ATOMS_PER_ROD,
    JUNK_SHARES,
    KINDS,
    PARTICLE,
    SITE_SPACING,
    Array,
    Molecule,
    draw_kinds,
    random_molecule,
)
from relion_cryofilter.data.simulate.variety import (
    Ranges,
    degrade,
    molecule_of_map,
    random_shape,
    simulate_varied,
)

__all__ = [
    "ATOMS_PER_ROD",
    "ATOM_SIGMA_ANGSTROM",
    "BACKGROUND_RADIUS",
    "FIELD_PER_SITE",
    "JUNK_SHARES",
    "KINDS",
    "MOLECULE_PER_BOX",
    "OPTICS_LABELS",
    "PARTICLE",
    "PARTICLE_LABELS",
    "PICKS_PER_MICROGRAPH",
    "SHOT_NOISE_SLOPE",
    "SITE_SPACING",
    "VERSIONS",
    "Array",
    "CtfParameters",
    "Field",
    "Molecule",
    "Picks",
    "Ranges",
    "SimulatedImages",
    "ctf",
    "degrade",
    "draw_kinds",
    "extract",
    "molecule_of_map",
    "random_molecule",
    "random_shape",
    "simulate_images",
    "simulate_micrograph",
    "simulate_project",
    "simulate_selection",
    "simulate_varied",
]

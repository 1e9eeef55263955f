"""Simulated cryo-EM micrographs with particles and junk, as arrays or as a RELION project.

A `Molecule` is a cloud of pseudo-atoms. `simulate_micrograph` scatters rotated copies and junk over
a field, images it as a weak phase object (projection x CTF, then noise) and returns the picks;
`extract` cuts and normalises boxes as RELION does. The same seed and numpy give the same bytes.
"""

from __future__ import annotations

from relion_cryofilter.simulate.micrograph import (
    Boxes,
    CtfParameters,
    Field,
    Picks,
    SimulatedImages,
    extract,
    simulate_images,
    simulate_micrograph,
)
from relion_cryofilter.simulate.project import simulate_project, simulate_selection
from relion_cryofilter.simulate.specimen import KINDS, PARTICLE, Molecule, random_molecule

__all__ = [
    "KINDS", "PARTICLE", "Boxes", "CtfParameters", "Field", "Molecule", "Picks", "SimulatedImages",
    "extract", "random_molecule", "simulate_images", "simulate_micrograph", "simulate_project",
    "simulate_selection",
]  # fmt: skip

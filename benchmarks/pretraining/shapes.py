"""What is imaged: molecules of many shapes, filaments, micelles and membranes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from relion_cryofilter.simulate.specimen import (
    Array,
    Molecule,
    Rng,
    directions,
    random_molecule,
    random_rotation,
)

N_ATOMS = 1500
SIDE_VIEW = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
"""Brings the z axis into the plane of the image."""

LEAFLET_ANGSTROM = 18.0
"""Half the distance of the two head group layers of a membrane."""


def random_shape(rng: Rng, diameter_angstrom: float, kind: str | None = None) -> Molecule:
    """Return a molecule of some shape, one of `SHAPES` or ``domains``; None draws one.

    What has an axis (z) is often seen only from the side and the top.
    """
    if kind is None:
        names, shares = zip(*SHAPE_SHARES.items())
        kind = str(rng.choice(names, p=shares))
    if kind == "domains":
        return random_molecule(rng, diameter_angstrom)
    atoms, weights = SHAPES[kind](rng)
    atoms = atoms + rng.normal(0, 0.02, atoms.shape)
    atoms -= np.average(atoms, axis=0, weights=weights)
    atoms *= diameter_angstrom / 2 / np.linalg.norm(atoms, axis=1).max()
    views = None
    if kind in AXIAL and rng.random() < 0.6:
        views = np.stack([np.eye(3), SIDE_VIEW, SIDE_VIEW])
    return Molecule(atoms, weights, views=views)


def _ball(rng: Rng, n: int = N_ATOMS) -> Array:
    return np.asarray(directions(rng, n) * rng.random((n, 1)) ** (1 / 3))


def _clumped(rng: Rng, atoms: Array) -> Array:
    """Return weights (n,) that differ from place to place."""
    centres = atoms[rng.integers(0, len(atoms), 12)]
    near = np.linalg.norm(atoms[:, None] - centres, axis=2).argmin(1)
    return np.asarray(rng.uniform(0.5, 1.5, 12)[near])


def _shell(rng: Rng) -> tuple[Array, Array]:
    inner = rng.uniform(0.6, 0.9)
    atoms = directions(rng, N_ATOMS) * rng.uniform(inner, 1, (N_ATOMS, 1))
    return atoms, _clumped(rng, atoms)


def _striped_shell(rng: Rng) -> tuple[Array, Array]:
    """Return a shell that holds parallel layers."""
    wall = directions(rng, N_ATOMS // 2) * rng.uniform(0.85, 1, (N_ATOMS // 2, 1))
    inside = _ball(rng, N_ATOMS // 2) * 0.85
    layers = int(rng.integers(2, 7))
    pitch = 1.7 / layers
    inside[:, 2] = (np.round(inside[:, 2] / pitch) + rng.normal(0, 0.08, len(inside))) * pitch
    weights = np.repeat([1.0, rng.uniform(0.4, 1.2)], N_ATOMS // 2)
    return np.concatenate([wall, inside]), weights


def _barrel(rng: Rng) -> tuple[Array, Array]:
    """Return a hollow cylinder of stacked rings of subunits, such as a proteasome or KLH."""
    rings, fold = int(rng.integers(2, 8)), int(rng.integers(5, 13))
    height, wall = rng.uniform(0.7, 2.4), rng.uniform(0.15, 0.5)
    ring = rng.integers(0, rings, N_ATOMS)
    spread = rng.uniform(0.1, 0.32)
    z = ((ring + 0.5 + rng.normal(0, spread, N_ATOMS)) / rings - 0.5) * height
    angle = 2 * np.pi / fold * (rng.integers(0, fold, N_ATOMS) + rng.normal(0, 0.22, N_ATOMS))
    angle += ring * rng.uniform(0, 0.5)
    radius = rng.uniform(1 - wall, 1, N_ATOMS)
    if rng.random() < 0.4:  # the outer rings are narrower
        radius *= np.where((ring == 0) | (ring == rings - 1), rng.uniform(0.6, 0.95), 1.0)
    atoms = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)
    strength = rng.uniform(0.4, 1.6, rings)
    strength = strength + strength[::-1]  # dihedral, as most barrels are
    if rng.random() < 0.3:  # something is in the cavity
        filled = rng.random(N_ATOMS) < 0.2
        atoms[filled, :2] *= rng.random((filled.sum(), 1)) * (1 - wall)
    return atoms, strength[ring]


def _rod(rng: Rng) -> tuple[Array, Array]:
    atoms = _ball(rng) * [*rng.uniform(0.15, 0.4, 2), 1]
    if rng.random() < 0.5:  # of beads
        beads = int(rng.integers(3, 9))
        atoms[:, 2] += 0.6 * (np.round(atoms[:, 2] * beads / 2) * 2 / beads - atoms[:, 2])
    return atoms, _clumped(rng, atoms)


def _disc(rng: Rng) -> tuple[Array, Array]:
    atoms = _ball(rng) * [1, rng.uniform(0.7, 1), rng.uniform(0.12, 0.45)]
    return atoms, _clumped(rng, atoms)


def _plate(rng: Rng) -> tuple[Array, Array]:
    """Return a flat sheet of blocks in a lattice."""
    cells = rng.integers(2, 5, 2)
    atoms = rng.uniform(-1, 1, (N_ATOMS, 3)) * [1, rng.uniform(0.5, 1), rng.uniform(0.08, 0.3)]
    for axis, count in enumerate(cells):
        centre = (np.floor((atoms[:, axis] + 1) * count / 2) + 0.5) * 2 / count - 1
        atoms[:, axis] += rng.uniform(0.1, 0.5) * (centre - atoms[:, axis])
    return atoms, _clumped(rng, atoms)


def _blobs(rng: Rng) -> tuple[Array, Array]:
    centres = directions(rng, int(rng.integers(3, 9))) * rng.uniform(0.2, 0.75)
    atoms = centres[rng.integers(0, len(centres), N_ATOMS)] + 0.3 * _ball(rng)
    return atoms, _clumped(rng, atoms)


def _ring(rng: Rng) -> tuple[Array, Array]:
    """Return a ring of beads, flat or high."""
    fold, thick = int(rng.integers(4, 16)), rng.uniform(0.12, 0.35)
    angle = 2 * np.pi / fold * rng.integers(0, fold, N_ATOMS)
    centres = np.stack([np.cos(angle), np.sin(angle), np.zeros(N_ATOMS)], 1)
    return centres + thick * _ball(rng) * [1, 1, rng.uniform(0.6, 2)], np.ones(N_ATOMS)


def _in_micelle(rng: Rng) -> tuple[Array, Array]:
    """Return domains above and below a belt of detergent or a nanodisc."""
    protein = random_molecule(rng, 2.0, symmetry=str(rng.choice(["C1", "C2", "C3", "C4", "C5"])))
    atoms = protein.atoms * [0.7, 0.7, 1.0]
    width, height = rng.uniform(0.6, 0.95), rng.uniform(0.2, 0.35)
    belt = _ball(rng, N_ATOMS // 2) * [width, width, height]
    belt[:, 2] += rng.uniform(-0.6, 0.1)
    weights = np.concatenate(
        [np.ones(len(atoms)), np.full(len(belt), rng.uniform(0.4, 1.4) * len(atoms) / N_ATOMS)]
    )
    return np.concatenate([atoms, belt]), weights


def micelle(rng: Rng, diameter_angstrom: float) -> Molecule:
    """Return an empty micelle or nanodisc: a smooth ellipsoid, often dense at its rim."""
    atoms = _ball(rng) * [1, rng.uniform(0.8, 1), rng.uniform(0.3, 0.9)]
    if rng.random() < 0.6:
        atoms /= np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 0.3) ** 0.6
    return Molecule(atoms * diameter_angstrom / 2, np.ones(N_ATOMS))


def filament(rng: Rng, length_angstrom: float, width_angstrom: float) -> Molecule:
    """Return a filament along x, through the origin: a bundle of strands or a helix of beads."""
    n = int(np.clip(25 * length_angstrom / width_angstrom, N_ATOMS, 8000))
    x = rng.uniform(-0.5, 0.5, n) * length_angstrom
    pitch = width_angstrom * rng.uniform(0.4, 6)
    strands = int(rng.integers(1, 4))
    angle = 2 * np.pi * (x / pitch + rng.integers(0, strands, n) / strands)
    radius = width_angstrom * rng.uniform(0, 0.35)
    blob = _ball(rng, n) * width_angstrom * rng.uniform(0.15, 0.4)
    y = radius * np.cos(angle) + 0.02 * width_angstrom * rng.normal()
    atoms = np.stack([x, y, radius * np.sin(angle)], 1) + blob * [0.3, 1, 1]
    if rng.random() < 0.5:  # beads
        rise = width_angstrom * rng.uniform(0.4, 1.2)
        atoms[:, 0] += rng.uniform(0.2, 0.8) * (np.round(x / rise) * rise - x)
    bend = rng.choice([0, 1]) * rng.uniform(-0.3, 0.3) / length_angstrom
    atoms[:, 1] += bend * atoms[:, 0] ** 2
    return Molecule(atoms, np.ones(n))


def membrane(rng: Rng, side: int, pixel_size_angstrom: float, radius_px: float) -> Array:
    """Return the projection (side, side) of a vesicle whose wall goes through the centre."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.indices((side, side)) - (side - 1) / 2
    x, y = x + radius_px * np.cos(angle), y + radius_px * np.sin(angle)
    from_wall = np.hypot(x, y * rng.uniform(0.8, 1.25)) - radius_px
    half, width = LEAFLET_ANGSTROM / pixel_size_angstrom, max(0.7, 8 / pixel_size_angstrom)
    image = sum(np.exp(-(((from_wall + shift) / width) ** 2)) for shift in (-half, half))
    inside = np.clip(-from_wall / radius_px, 0, 1)  # the wall above and below, and what is within
    image = image + rng.uniform(0, 0.5) * (from_wall < 0) / np.sqrt(0.15 + inside)
    taper = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, side)] * 2))
    return np.asarray(image * np.clip(4 - 4 * taper, 0, 1))


def random_views(rng: Rng) -> Array:
    """Return three preferred views (3, 3, 3)."""
    return np.stack([random_rotation(rng) for _ in range(3)])


SHAPES: dict[str, Callable[[Rng], tuple[Array, Array]]] = {
    "shell": _shell,
    "striped_shell": _striped_shell,
    "barrel": _barrel,
    "rod": _rod,
    "disc": _disc,
    "plate": _plate,
    "blobs": _blobs,
    "ring": _ring,
    "in_micelle": _in_micelle,
}
SHAPE_SHARES = {
    "domains": 0.35, "shell": 0.07, "striped_shell": 0.05, "barrel": 0.15, "rod": 0.08,
    "disc": 0.06, "plate": 0.06, "blobs": 0.06, "ring": 0.04, "in_micelle": 0.08,
}  # fmt: skip
AXIAL = ("striped_shell", "barrel", "rod", "disc", "plate", "ring", "in_micelle")

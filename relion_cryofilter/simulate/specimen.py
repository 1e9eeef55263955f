"""What lies in the ice: molecules, fragments and clumps of them, contaminants, carbon film.

Sites are thrown over a field of pixels, and what stands at them is deposited onto it: proteins to
be imaged as phase objects, dirt in units of the noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.errors import UsageError

Array = NDArray[Any]
Rng = np.random.Generator
Cloud: TypeAlias = tuple[Array, Array, Array]  # a site (2,) in px, points about it, weights (n,)

PARTICLE = "particle"
JUNK_SHARES = {
    "empty": 0.30,  # no particle
    "off_centre": 0.20,  # a particle, 0.35 to 0.6 diameters from the centre
    "aggregate": 0.18,  # a clump of overlapping copies
    "broken": 0.17,  # a fragment, 30 to 60 % of the pseudo-atoms
    "ice": 0.15,  # a bright or dark contaminant
    "carbon": 0.25,  # the edge of the carbon film; only in every third micrograph
    "other": 0.10,  # a smaller or larger molecule; only where one is given
}
KINDS = (PARTICLE, *JUNK_SHARES)
SITE_SPACING = 1.1  # least distance between two objects / particle diameter
FIELD_PER_SITE = 1.4  # sqrt(area per object) / particle diameter
ATOMS_PER_ROD = 12


@dataclass(frozen=True)
class Molecule:
    """A cloud of pseudo-atoms: places (n, 3) in Å, centred, and weights (n,).

    One part of it swings about the rest by up to `bend_degrees`. `views` (k, 3, 3) are what it
    prefers in the ice, up to a turn in the plane and 10 degrees; None for all orientations.
    """

    atoms: Array
    weights: Array
    bend_degrees: float = 0.0
    views: Array | None = None

    @property
    def diameter_angstrom(self) -> float:
        """Diameter of the smallest centred sphere that holds all pseudo-atoms, Å."""
        return 2 * float(np.linalg.norm(self.atoms, axis=1).max())

    def pose(self, rng: Rng) -> tuple[Array, Array]:
        """Return the pseudo-atoms (n, 3) of one copy, bent and turned, and its rotation (3, 3)."""
        atoms = self.atoms
        if self.bend_degrees:
            arm = atoms[:, 0] > np.quantile(atoms[:, 0], 0.6)
            hinge = atoms[arm][atoms[arm, 0].argmin()]
            swing = _small_rotation(rng, self.bend_degrees)
            atoms = np.where(arm[:, None], (atoms - hinge) @ swing.T + hinge, atoms)
        if self.views is None:
            rotation = random_rotation(rng)
        else:
            in_plane = _rotation_about_z(rng.uniform(0, 2 * np.pi))
            view = self.views[int(rng.integers(len(self.views)))]
            rotation = in_plane @ _small_rotation(rng, 10.0) @ view
        return np.asarray(atoms @ rotation.T), rotation


def random_molecule(
    rng: Rng, diameter_angstrom: float, *, symmetry: str | None = None, n_atoms: int = 1500
) -> Molecule:
    """Make a compact molecule: domains of helix-like rods, repeated by a point group.

    It has about `n_atoms`; its `symmetry` is ``Cn`` or ``Dn``, drawn at random if None.
    """
    # The rotations of the point group.
    symmetry = symmetry or str(rng.choice(["C1", "C1", "C2", "C3", "C4", "C6", "D2", "D3", "D7"]))
    if symmetry[:1] not in ("C", "D") or not symmetry[1:].isdigit() or int(symmetry[1:]) < 1:
        raise UsageError(f"Symmetry {symmetry!r}: expected Cn or Dn, such as C1, C4 or D7.")
    fold = int(symmetry[1:])
    operators = [_rotation_about_z(angle) for angle in 2 * np.pi * np.arange(fold) / fold]
    if symmetry[0] == "D":
        operators += [operator @ np.diag([1.0, -1.0, -1.0]) for operator in operators]
    # Centres of the domains of one subunit, about 1 wide each: a compact random walk off the axis.
    off_axis = 0.42 / np.sin(np.pi / fold) if fold > 1 else 0.0
    start = np.array([off_axis, 0.0, 0.4 if symmetry[0] == "D" else 0.0])
    centres = [start]
    for _ in range(rng.integers(1, 4) if fold > 1 else rng.integers(4, 9)):
        step = directions(rng, 1)[0] - 0.7 * (centres[-1] - start)
        centres.append(centres[rng.integers(len(centres))] + 0.65 * step / np.linalg.norm(step))
    # A domain is an ellipsoidal bundle of rods.
    n_rods = max(4, n_atoms // (len(operators) * len(centres) * ATOMS_PER_ROD))
    domains = []
    for centre in centres:
        middles = directions(rng, n_rods) * rng.random((n_rods, 1)) ** (1 / 3)
        along = np.linspace(-0.25, 0.25, ATOMS_PER_ROD)[:, None] * directions(rng, n_rods)[:, None]
        rods = (middles * rng.uniform(0.35, 0.6, 3))[:, None] + along
        domains.append(centre + (rods + rng.normal(0, 0.03, rods.shape)).reshape(-1, 3))
    subunit = np.concatenate(domains)
    atoms = np.concatenate([subunit @ operator.T for operator in operators])
    atoms -= atoms.mean(0)
    atoms *= diameter_angstrom / 2 / np.linalg.norm(atoms, axis=1).max()
    return Molecule(atoms, np.ones(len(atoms)))


def draw_kinds(
    rng: Rng, n: int, junk_fraction: float, *, carbon: bool = False, others: bool = False
) -> Array:
    """Draw the kinds of a micrograph's picks, (n,) str: round(n * junk_fraction) are junk."""
    n_junk = round(n * junk_fraction)
    left_out = {name for name, wanted in (("carbon", carbon), ("other", others)) if not wanted}
    names = [name for name in JUNK_SHARES if name not in left_out]
    shares = np.array([JUNK_SHARES[name] for name in names])
    junk = rng.choice(names, n_junk, p=shares / shares.sum())
    return rng.permutation(np.array([PARTICLE] * (n - n_junk) + list(junk), dtype="U10"))


def directions(rng: Rng, n: int, dimensions: int = 3) -> Array:
    """Return unit vectors drawn uniformly, (n, dimensions)."""
    vectors = rng.normal(size=(n, dimensions))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def place_sites(
    rng: Rng, kinds: Array, diameter_px: float, box_px: int, spacing: float
) -> tuple[Array, int, Array | None]:
    """Return sites (n, 2), x and y, kept apart, the side of their field, and the carbon film.

    The latter is how far each pixel is on the film (side, side), px; None without carbon picks.
    These are at its edge, the others off it.
    """
    # A field of fitting size.
    margin = box_px / 2 + 0.9 * diameter_px
    inner = np.sqrt(len(kinds) * (1.6 if "carbon" in kinds else 1)) * FIELD_PER_SITE * diameter_px
    inner *= spacing / SITE_SPACING
    side = 32 * int(np.ceil((2 * margin + max(inner, 2 * box_px)) / 32))
    # The film is what lies outside a hole.
    film = None
    if "carbon" in kinds:
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.5) * side
        edge = rng.uniform(0.3, 0.7) * (side / 2 - margin)  # from the middle of the micrograph
        x, y = (side / 2 + (edge - radius) * f(angle) for f in (np.cos, np.sin))
        row, column = np.ogrid[:side, :side]
        film = np.asarray(np.hypot(column - x, row - y) - radius)
    # Darts are thrown until all sites are hit.
    sites: list[Array] = []
    spacing = spacing * diameter_px
    while len(sites) < len(kinds):
        darts = rng.uniform(margin, side - margin, (256, 2))
        free = np.ones(len(darts), dtype=bool)
        if sites:
            free = np.hypot(*(darts[:, None] - np.array(sites)).T).min(0) > spacing
        if film is not None:
            onto = film[darts[:, 1].astype(int), darts[:, 0].astype(int)]
            at_edge = (onto > -0.3 * diameter_px) & (onto < diameter_px)
            free &= at_edge if kinds[len(sites)] == "carbon" else onto < -box_px / 2
        if free.any():
            sites.append(darts[free.argmax()])
        else:
            spacing *= 0.95
    return np.array(sites), side, film


def proteins(
    rng: Rng, molecule: Molecule, other: Molecule | None, kinds: Array, sites: Array
) -> tuple[list[Cloud], Array]:
    """Return what stands at the sites, in Å, and the rotation (n, 3, 3) of the molecule at each.

    `other` is at those of that kind; where no molecule stands by itself, its rotation is of none.
    """
    clouds: list[Cloud] = []
    rotations = np.empty((len(kinds), 3, 3))
    for number, (kind, site) in enumerate(zip(kinds, sites, strict=True)):
        shown = other if other and kind == "other" else molecule
        atoms, rotations[number] = shown.pose(rng)
        weights = shown.weights * rng.uniform(0.85, 1.15)
        if kind in (PARTICLE, "off_centre", "other"):
            clouds.append((site, atoms, weights))
        elif kind == "broken":
            depth = atoms @ directions(rng, 1)[0]
            kept = depth < np.quantile(depth, rng.uniform(0.3, 0.6))
            clouds.append((site, atoms[kept] - atoms[kept].mean(0), weights[kept]))
        elif kind == "aggregate":
            for shift in directions(rng, int(rng.integers(3, 7))) * shown.diameter_angstrom:
                copy = shown.pose(rng)[0] + shift * rng.uniform(0.25, 0.75)
                clouds.append((site, copy, weights))
    return clouds, rotations


def dirt(rng: Rng, ice: Array, side: int, diameter_px: float, film: Array | None) -> Array:
    """Return ice at the sites given and carbon film, (side, side), in units of the noise."""
    balls: list[Cloud] = []  # lumpy ones, bright or dark, of 6000 points in px
    for site in ice:
        lumps = rng.normal(0, 0.3, (5, 2))[rng.integers(0, 5, 6000)]
        ball = directions(rng, 6000)[:, :2] * rng.random((6000, 1)) ** (1 / 3)
        radius = diameter_px * rng.uniform(0.1, 0.35)
        depth = np.exp(rng.uniform(np.log(1.5), np.log(9))) * rng.choice([1, -1], p=[0.75, 0.25])
        weights = np.full(6000, depth * np.pi * radius**2 / 6000)
        balls.append((site, radius * (lumps + ball), weights))
    image = deposit(balls, side)
    if film is not None:
        covered = 1 / (1 + np.exp(-np.clip(film, -30, 30)))
        image += covered * (rng.uniform(2, 5) + rng.normal(0, 1.2, (side, side)))
    return image


def _small_rotation(rng: Rng, degrees: float) -> Array:
    """Return a rotation by up to so many degrees about a random axis (Rodrigues)."""
    x, y, z = directions(rng, 1)[0]
    angle = np.deg2rad(rng.uniform(0, degrees))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def random_rotation(rng: Rng) -> Array:
    """Return a rotation, uniform over SO(3), by QR (Notices of the AMS 54, 592 (2007))."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return np.asarray(q * np.linalg.det(q))


def _rotation_about_z(angle: float) -> Array:
    """Return a rotation matrix (3, 3); the angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def deposit(clouds: Iterable[Cloud], side: int, pixel_size_angstrom: float = 1.0) -> Array:
    """Project clouds of points onto a periodic grid (side, side), bilinearly."""
    grid, parts = np.zeros(side * side), list(clouds)
    if not parts:
        return grid.reshape(side, side)
    x, y = np.concatenate([site + at[:, :2] / pixel_size_angstrom for site, at, _ in parts]).T
    weights = np.concatenate([part for _, _, part in parts])
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right, below = x - column, y - row
    for i, wx in ((0, 1 - right), (1, right)):
        for j, wy in ((0, 1 - below), (1, below)):
            index = (row + j) % side * side + (column + i) % side
            grid += np.bincount(index, weights * wx * wy, minlength=side * side)
    return grid.reshape(side, side)

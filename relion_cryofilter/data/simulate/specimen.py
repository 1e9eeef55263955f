"""What lies in the ice: molecules, fragments and clumps of them, contaminants, carbon film.

A `Molecule` is a cloud of pseudo-atoms. Sites are thrown over a field of pixels, and what stands at
them is deposited onto it: proteins to be imaged as phase objects, dirt in units of the noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.errors import UsageError

Array = NDArray[Any]

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
ATOMS_PER_ROD = 12


@dataclass(frozen=True)
class Molecule:
    """A cloud of pseudo-atoms, centred: `atoms` (n, 3) in Å, `weights` (n,) in arbitrary units.

    `bend_degrees` is how far one part of it swings about the rest; `views` (k, 3, 3), if any, are
    the orientations that it prefers in the ice, up to a turn in the plane and 10 degrees.
    """

    atoms: Array
    weights: Array
    bend_degrees: float = 0.0
    views: Array | None = None

    @property
    def diameter_angstrom(self) -> float:
        """Diameter of the smallest centred sphere that holds all pseudo-atoms, Å."""
        return 2 * float(np.linalg.norm(self.atoms, axis=1).max())

    def pose(self, rng: np.random.Generator) -> Array:
        """Return the pseudo-atoms (n, 3) of one copy, bent and turned."""
        atoms = self.atoms
        if self.bend_degrees:
            arm = atoms[:, 0] > np.quantile(atoms[:, 0], 0.6)
            hinge = atoms[arm][atoms[arm, 0].argmin()]
            swing = _small_rotation(rng, self.bend_degrees)
            atoms = np.where(arm[:, None], (atoms - hinge) @ swing.T + hinge, atoms)
        if self.views is None:
            return np.asarray(atoms @ random_rotation(rng).T)
        angle = rng.uniform(0, 2 * np.pi)
        c, s = np.cos(angle), np.sin(angle)
        in_plane = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        view = self.views[int(rng.integers(len(self.views)))]
        return np.asarray(atoms @ (in_plane @ _small_rotation(rng, 10.0) @ view).T)


def random_molecule(
    rng: np.random.Generator,
    diameter_angstrom: float,
    *,
    symmetry: str | None = None,
    n_atoms: int = 1500,
) -> Molecule:
    """Make a compact molecule: domains of helix-like rods, repeated by a point group.

    Parameters
    ----------
    diameter_angstrom : diameter of the smallest centred sphere around it, Å
    symmetry : `Cn` or `Dn`; None draws one at random
    n_atoms : pseudo-atoms in all, roughly

    Raises
    ------
    UsageError : `symmetry` is something else
    """
    symmetry = symmetry or str(rng.choice(["C1", "C1", "C2", "C3", "C4", "C6", "D2", "D3", "D7"]))
    operators, fold = _symmetry_operators(symmetry), int(symmetry[1:])
    off_axis = 0.42 / np.sin(np.pi / fold) if fold > 1 else 0.0  # in units of a domain's size
    start = np.array([off_axis, 0.0, 0.4 if symmetry[0] == "D" else 0.0])
    centres = [start]
    for _ in range(rng.integers(1, 4) if fold > 1 else rng.integers(4, 9)):
        step = directions(rng, 1)[0] - 0.7 * (centres[-1] - start)
        centres.append(centres[rng.integers(len(centres))] + 0.65 * step / np.linalg.norm(step))
    n_rods = max(4, n_atoms // (len(operators) * len(centres) * ATOMS_PER_ROD))
    subunit = np.concatenate([centre + _domain(rng, n_rods) for centre in centres])
    atoms = np.concatenate([subunit @ operator.T for operator in operators])
    atoms -= atoms.mean(0)
    atoms *= diameter_angstrom / 2 / np.linalg.norm(atoms, axis=1).max()
    return Molecule(atoms, np.ones(len(atoms)))


def draw_kinds(
    rng: np.random.Generator,
    n: int,
    junk_fraction: float = 0.5,
    *,
    carbon: bool = False,
    others: bool = False,
) -> Array:
    """Draw the kinds of a micrograph's picks, (n,) str: round(n * junk_fraction) are junk."""
    n_junk = round(n * junk_fraction)
    left_out = {name for name, wanted in (("carbon", carbon), ("other", others)) if not wanted}
    names = [name for name in JUNK_SHARES if name not in left_out]
    shares = np.array([JUNK_SHARES[name] for name in names])
    junk = rng.choice(names, n_junk, p=shares / shares.sum())
    return rng.permutation(np.array([PARTICLE] * (n - n_junk) + list(junk), dtype="U10"))


def directions(rng: np.random.Generator, n: int, dimensions: int = 3) -> Array:
    """Unit vectors drawn uniformly, (n, dimensions)."""
    vectors = rng.normal(size=(n, dimensions))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def film_distance(rng: np.random.Generator, side: int, margin: float) -> Array:
    """Distance of each pixel from the edge of a carbon hole, px, positive on the film."""
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.5) * side
    edge = rng.uniform(0.3, 0.7) * (side / 2 - margin)  # from the middle of the micrograph
    x, y = (side / 2 + (edge - radius) * f(angle) for f in (np.cos, np.sin))
    row, column = np.ogrid[:side, :side]
    return np.asarray(np.hypot(column - x, row - y) - radius)


def place_sites(
    rng: np.random.Generator,
    kinds: Array,
    side: int,
    margin: float,
    diameter_px: float,
    film: Array | None,
    box_px: int,
    spacing: float = SITE_SPACING,
) -> Array:
    """Throw darts: (n, 2) x and y, kept apart; carbon picks at the film's edge, the rest off it."""
    sites: list[Array] = []
    spacing = spacing * diameter_px
    while len(sites) < len(kinds):
        darts = rng.uniform(margin, side - margin, (256, 2))
        free = np.ones(len(darts), dtype=bool)
        if sites:
            free = np.hypot(*(darts[:, None] - np.array(sites)).T).min(0) > spacing
        if film is not None:
            onto = film[darts[:, 1].astype(int), darts[:, 0].astype(int)]
            edge = (onto > -0.3 * diameter_px) & (onto < diameter_px)
            free &= edge if kinds[len(sites)] == "carbon" else onto < -box_px / 2
        if free.any():
            sites.append(darts[free.argmax()])
        else:
            spacing *= 0.95
    return np.array(sites)


def deposit_proteins(
    rng: np.random.Generator,
    molecule: Molecule,
    kinds: Array,
    sites: Array,
    side: int,
    pixel_size_angstrom: float,
    other: Molecule | None = None,
) -> Array:
    """All proteins, projected, (side, side); `other` is what stands at sites of that kind."""
    parts = [
        (site + atoms[:, :2] / pixel_size_angstrom, weights)
        for kind, site in zip(kinds, sites, strict=True)
        for atoms, weights in _protein(rng, other if other and kind == "other" else molecule, kind)
    ]
    return _deposit(parts, side)


def deposit_dirt(
    rng: np.random.Generator, ice: Array, side: int, diameter_px: float, film: Array | None
) -> Array:
    """Ice at the sites given and carbon film, (side, side), in units of the noise."""
    blobs = [_ice(rng, diameter_px) for _ in ice]
    blobs = [(site + points, weights) for site, (points, weights) in zip(ice, blobs, strict=True)]
    dirt = _deposit(blobs, side)
    if film is not None:
        covered = 1 / (1 + np.exp(-np.clip(film, -30, 30)))
        dirt += covered * (rng.uniform(2, 5) + rng.normal(0, 1.2, (side, side)))
    return dirt


def _small_rotation(rng: np.random.Generator, degrees: float) -> Array:
    """A rotation by up to so many degrees about a random axis (Rodrigues)."""
    x, y, z = directions(rng, 1)[0]
    angle = np.deg2rad(rng.uniform(0, degrees))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def random_rotation(rng: np.random.Generator) -> Array:
    """A rotation matrix (3, 3), uniform over SO(3), by QR with fixed signs.

    Notices of the AMS 54, 592 (2007).
    """
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return np.asarray(q * np.linalg.det(q))


def _symmetry_operators(symmetry: str) -> list[Array]:
    if symmetry[:1] not in ("C", "D") or not symmetry[1:].isdigit() or int(symmetry[1:]) < 1:
        raise UsageError(f"Symmetry {symmetry!r}: expected Cn or Dn, such as C1, C4 or D7.")
    operators = []
    for angle in 2 * np.pi * np.arange(int(symmetry[1:])) / int(symmetry[1:]):
        c, s = np.cos(angle), np.sin(angle)
        operators.append(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]))
    if symmetry[0] == "D":
        operators += [operator @ np.diag([1.0, -1.0, -1.0]) for operator in operators]
    return operators


def _domain(rng: np.random.Generator, n_rods: int) -> Array:
    """An ellipsoidal bundle of helix-like rods, (n_rods * ATOMS_PER_ROD, 3), about 1 wide."""
    middles = directions(rng, n_rods) * rng.random((n_rods, 1)) ** (1 / 3)
    along = np.linspace(-0.25, 0.25, ATOMS_PER_ROD)[:, None] * directions(rng, n_rods)[:, None]
    rods = (middles * rng.uniform(0.35, 0.6, 3))[:, None] + along
    return np.asarray((rods + rng.normal(0, 0.03, rods.shape)).reshape(-1, 3))


def _protein(
    rng: np.random.Generator, molecule: Molecule, kind: str
) -> Iterator[tuple[Array, Array]]:
    """Yield pseudo-atoms (n, 3) in Å about the site and weights (n,) of what stands at a site."""
    atoms, weights = molecule.pose(rng), molecule.weights * rng.uniform(0.85, 1.15)
    if kind in (PARTICLE, "off_centre", "other"):
        yield atoms, weights
    elif kind == "broken":
        depth = atoms @ directions(rng, 1)[0]
        kept = depth < np.quantile(depth, rng.uniform(0.3, 0.6))
        yield atoms[kept] - atoms[kept].mean(0), weights[kept]
    elif kind == "aggregate":
        for shift in directions(rng, int(rng.integers(3, 7))) * molecule.diameter_angstrom:
            yield molecule.pose(rng) + shift * rng.uniform(0.25, 0.75), weights


def _ice(rng: np.random.Generator, diameter_px: float) -> tuple[Array, Array]:
    """Points (n, 2) in px about the site and weights (n,) of a lumpy ball, bright or dark."""
    lumps = rng.normal(0, 0.3, (5, 2))[rng.integers(0, 5, 6000)]
    ball = directions(rng, 6000)[:, :2] * rng.random((6000, 1)) ** (1 / 3)
    radius = diameter_px * rng.uniform(0.1, 0.35)
    depth = np.exp(rng.uniform(np.log(1.5), np.log(9))) * rng.choice([1, -1], p=[0.75, 0.25])
    return radius * (lumps + ball), np.full(6000, depth * np.pi * radius**2 / 6000)


def _deposit(parts: Sequence[tuple[Array, Array]], side: int) -> Array:
    """Sum weights (n,) at points (n, 2), px, onto a periodic grid (side, side), bilinearly."""
    grid = np.zeros(side * side)
    if not parts:
        return grid.reshape(side, side)
    x, y = np.concatenate([points for points, _ in parts]).T
    weights = np.concatenate([part for _, part in parts])
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right, below = x - column, y - row
    for i, wx in ((0, 1 - right), (1, right)):
        for j, wy in ((0, 1 - below), (1, below)):
            index = (row + j) % side * side + (column + i) % side
            grid += np.bincount(index, weights * wx * wy, minlength=side * side)
    return grid.reshape(side, side)

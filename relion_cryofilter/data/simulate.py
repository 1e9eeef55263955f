"""Simulated cryo-EM micrographs with particles and junk, as arrays or as a RELION project.

A `Molecule` is a cloud of pseudo-atoms. `simulate_micrograph` scatters rotated copies and junk over
a field, images it as a weak phase object (projection x CTF, then noise) and returns the picks;
`extract` cuts and normalises boxes as RELION does. The same seed and numpy give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mrcfile
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
}
KINDS = (PARTICLE, *JUNK_SHARES)
PICKS_PER_MICROGRAPH = 84
MOLECULE_PER_BOX = 0.6  # particle diameter / box size
BACKGROUND_RADIUS = 0.75  # of half a box: the default of RELION's Extract job
SOLVENT_SHARE = 0.3  # of the noise variance: made before the CTF, the rest is shot noise
SLOW_ICE_RMS = 0.16  # uneven ice, in units of the noise's standard deviation
SHOT_NOISE_SLOPE = 0.6  # how the standard deviation of shot noise follows the ice: 10 % rms
ATOM_SIGMA_ANGSTROM = 2.0
SITE_SPACING = 1.1  # least distance between two objects / particle diameter
FIELD_PER_SITE = 1.4  # sqrt(area per object) / particle diameter
ATOMS_PER_ROD = 12


@dataclass(frozen=True)
class Molecule:
    """A cloud of pseudo-atoms, centred: `atoms` (n, 3) in Å, `weights` (n,) in arbitrary units."""

    atoms: Array
    weights: Array

    @property
    def diameter_angstrom(self) -> float:
        """Diameter of the smallest centred sphere that holds all pseudo-atoms, Å."""
        return 2 * float(np.linalg.norm(self.atoms, axis=1).max())


@dataclass(frozen=True)
class CtfParameters:
    """What the CTF depends on, in RELION's units (Å, degrees, kV, mm, Å²)."""

    defocus_u_angstrom: float = 15000.0
    defocus_v_angstrom: float = 15000.0
    defocus_angle_degrees: float = 0.0
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    b_factor: float = 100.0


@dataclass(frozen=True)
class Picks:
    """Where boxes are cut: `x`, `y` (n,) in pixels, 0-based, and `kind` (n,), each one of KINDS."""

    x: Array
    y: Array
    kind: Array

    @property
    def labels(self) -> Array:
        """1 for particles, 0 for junk, (n,) int64."""
        return np.where(self.kind == PARTICLE, 1, 0)


class SimulatedImages(NamedTuple):
    """`images` (n, box, box) float32; `labels`, `kinds` and `micrographs` (a number each) (n,)."""

    images: Array
    labels: Array
    kinds: Array
    micrographs: Array


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
        step = _directions(rng, 1)[0] - 0.7 * (centres[-1] - start)
        centres.append(centres[rng.integers(len(centres))] + 0.65 * step / np.linalg.norm(step))
    n_rods = max(4, n_atoms // (len(operators) * len(centres) * ATOMS_PER_ROD))
    subunit = np.concatenate([centre + _domain(rng, n_rods) for centre in centres])
    atoms = np.concatenate([subunit @ operator.T for operator in operators])
    atoms -= atoms.mean(0)
    atoms *= diameter_angstrom / 2 / np.linalg.norm(atoms, axis=1).max()
    return Molecule(atoms, np.ones(len(atoms)))


def ctf(shape: tuple[int, int], pixel_size_angstrom: float, parameters: CtfParameters) -> Array:
    """Contrast transfer function on the grid of `numpy.fft.rfft2`, (height, width // 2 + 1).

    sin(pi L dz u² - pi/2 Cs L³ u⁴ + asin(A)) exp(-B u²/4), L the relativistic wavelength and dz the
    defocus along the azimuth (CTFFIND4, J. Struct. Biol. 192, 216 (2015), with the sign of RELION's
    src/ctf.cpp). Positive at low resolution for underfocus: protein white, as RELION stores it.
    """
    p = parameters
    volts, cs = p.voltage_kv * 1e3, p.cs_mm * 1e7
    wavelength = 12.2643 / np.sqrt(volts + 0.978466e-6 * volts**2)
    v = np.fft.fftfreq(shape[0], pixel_size_angstrom)[:, None]
    u = np.fft.rfftfreq(shape[1], pixel_size_angstrom)[None]
    u2 = u**2 + v**2
    azimuth = np.arctan2(v, u) - np.deg2rad(p.defocus_angle_degrees)
    mean = (p.defocus_u_angstrom + p.defocus_v_angstrom) / 2
    half = (p.defocus_u_angstrom - p.defocus_v_angstrom) / 2
    defocus = mean + half * np.cos(2 * azimuth)
    phase = np.pi * wavelength * u2 * (defocus - 0.5 * cs * wavelength**2 * u2)
    curve: Array = np.sin(phase + np.arcsin(p.amplitude_contrast)) * np.exp(-p.b_factor / 4 * u2)
    return curve


def draw_kinds(
    rng: np.random.Generator, n: int, junk_fraction: float = 0.5, *, carbon: bool = False
) -> Array:
    """Draw the kinds of a micrograph's picks, (n,) str: round(n * junk_fraction) are junk."""
    n_junk = round(n * junk_fraction)
    names = [name for name in JUNK_SHARES if carbon or name != "carbon"]
    shares = np.array([JUNK_SHARES[name] for name in names])
    junk = rng.choice(names, n_junk, p=shares / shares.sum())
    return rng.permutation(np.array([PARTICLE] * (n - n_junk) + list(junk), dtype="U10"))


def simulate_micrograph(
    rng: np.random.Generator,
    molecule: Molecule,
    kinds: Array | Sequence[str],
    *,
    parameters: CtfParameters | None = None,
    box_px: int = 64,
    pixel_size_angstrom: float = 3.0,
    snr: float = 0.05,
) -> tuple[Array, Picks]:
    """Simulate one micrograph, protein dark, with one pick of each kind asked for.

    Parameters
    ----------
    kinds : (n,) one of KINDS for each pick; some particles more stay unpicked
    parameters : the CTF's; None means CtfParameters()
    box_px, pixel_size_angstrom : of the boxes to be cut, and Å/px; picks keep clear of the borders
    snr : variance of the noise-free, CTF-filtered image inside a circle of the molecule's diameter
        around a whole particle (mean over the particles) / variance of the noise. The latter is 1:
        solvent and shot noise, without the slow ice.

    Returns
    -------
    image : (side, side) float32, side chosen to hold the picks
    picks : Picks, in the order of `kinds`
    """
    kinds = np.asarray(kinds)
    diameter_px = molecule.diameter_angstrom / pixel_size_angstrom
    everything = np.append(kinds, [PARTICLE] * max(2, len(kinds) // 6))
    margin, has_film = box_px / 2 + 0.9 * diameter_px, "carbon" in kinds
    inner = np.sqrt(len(everything) * (1.6 if has_film else 1)) * FIELD_PER_SITE * diameter_px
    side = 32 * int(np.ceil((2 * margin + max(inner, 2 * box_px)) / 32))
    film = _film_distance(rng, side, margin) if has_film else None
    sites = _sites(rng, everything, side, margin, diameter_px, film, box_px)

    transfer = ctf((side, side), pixel_size_angstrom, parameters or CtfParameters())
    protein = _deposit_proteins(rng, molecule, everything, sites, side, pixel_size_angstrom)
    atom = np.exp(-2 * (np.pi * ATOM_SIGMA_ANGSTROM) ** 2 * _frequency2(side, pixel_size_angstrom))
    signal = np.fft.irfft2(np.fft.rfft2(protein) * transfer * atom, (side, side))
    signal *= np.sqrt(
        snr / _masked_variance(signal, sites[everything == PARTICLE], diameter_px / 2)
    )
    dirt = _deposit_dirt(rng, sites[everything == "ice"], side, diameter_px, film)
    image = signal + _dirt_and_noise(rng, dirt, transfer, diameter_px)

    offset = rng.normal(0, 0.03, (len(kinds), 2))
    away = _directions(rng, len(kinds), 2) * rng.uniform(0.35, 0.6, (len(kinds), 1))
    offset[kinds == "off_centre"] = away[kinds == "off_centre"]
    x, y = (sites[: len(kinds)] + offset * diameter_px).T
    return -image.astype(np.float32), Picks(x, y, kinds)


def extract(image: Array, picks: Picks, box_px: int, *, invert: bool = True) -> Array:
    """Cut boxes and normalise them as RELION's Extract job does by default.

    Contrast inverted (protein white), a plane fitted to the background subtracted, background mean
    0 and standard deviation 1; background is what lies outside 0.75 * box / 2 from the centre
    (relion_preprocess: --invert_contrast, --bg_radius; normalise() in src/image.cpp).

    Parameters
    ----------
    image : (height, width)
    picks : n picks; the box's pixel (box // 2, box // 2) is the one nearest to the pick

    Returns
    -------
    (n, box, box) float32

    Raises
    ------
    IndexError : a box leaves the micrograph
    """
    x, y = (np.rint(c).astype(np.int64) - box_px // 2 for c in (picks.x, picks.y))
    if not len(x):
        return np.empty((0, box_px, box_px), np.float32)
    last = np.array(image.shape) - box_px
    if min(x.min(), y.min()) < 0 or x.max() > last[1] or y.max() > last[0]:
        raise IndexError(f"A box of {box_px} px leaves the micrograph of {image.shape} px.")
    boxes = np.stack([image[j : j + box_px, i : i + box_px] for i, j in zip(x, y, strict=True)])
    flat: Array = (-boxes if invert else boxes).reshape(len(boxes), -1).astype(np.float64)
    v, u = (c.ravel() - box_px // 2 for c in np.indices((box_px, box_px)))
    background = u**2 + v**2 > int(BACKGROUND_RADIUS * box_px / 2) ** 2
    plane = np.stack([np.ones(box_px**2), u, v], 1)
    flat = flat - flat[:, background] @ np.linalg.pinv(plane[background]).T @ plane.T
    flat = flat / flat[:, background].std(1, keepdims=True)
    return flat.astype(np.float32).reshape(boxes.shape)


def simulate_images(
    seed: int | np.random.Generator,
    n: int,
    box_px: int = 64,
    snr: float = 0.05,
    *,
    junk_fraction: float = 0.5,
    pixel_size_angstrom: float = 3.0,
    molecules: int | Sequence[Molecule] = 4,
) -> SimulatedImages:
    """Simulate `n` extracted images without files, a molecule for each micrograph in turn.

    Parameters
    ----------
    n : images in all, PICKS_PER_MICROGRAPH to a micrograph
    snr : as in simulate_micrograph
    junk_fraction : part of each micrograph's images that is junk, 0 to 1
    molecules : how many to make, or the molecules themselves

    Raises
    ------
    UsageError : a setting makes no sense
    """
    _check(n, box_px, snr, junk_fraction)
    rng = np.random.default_rng(seed)
    if isinstance(molecules, int):
        diameter = MOLECULE_PER_BOX * box_px * pixel_size_angstrom
        molecules = [random_molecule(rng, diameter) for _ in range(molecules)]
    sizes = [min(PICKS_PER_MICROGRAPH, n - i) for i in range(0, n, PICKS_PER_MICROGRAPH)]
    field = {"box_px": box_px, "pixel_size_angstrom": pixel_size_angstrom, "snr": snr}
    parts = list(_micrographs(rng, molecules, sizes, junk_fraction, **field))
    return SimulatedImages(
        np.concatenate([images for images, _, _ in parts]),
        np.concatenate([picks.labels for _, picks, _ in parts]),
        np.concatenate([picks.kind for _, picks, _ in parts]),
        np.repeat(np.arange(len(sizes)), sizes),
    )


def simulate_project(
    folder: str | os.PathLike[str],
    *,
    n_micrographs: int = 12,
    particles_per_micrograph: int = PICKS_PER_MICROGRAPH,
    box_px: int = 64,
    pixel_size_angstrom: float = 3.0,
    snr: float = 0.05,
    junk_fraction: float = 0.5,
    seed: int = 0,
    relion_version: str = "3.1",
) -> Path:
    """Write a RELION project with one finished Extract job, of images of one molecule.

    The true kinds are in `truth.csv` (image, real, kind), in the order of the stacks; the rows of
    particles.star are shuffled. The micrographs themselves are not written.

    Parameters
    ----------
    particles_per_micrograph : all images of a micrograph, junk included
    snr : as in simulate_micrograph
    junk_fraction : part of each micrograph's images that is junk, 0 to 1
    relion_version : "3.1" or "5"

    Returns
    -------
    The path of particles.star

    Raises
    ------
    UsageError : `folder` holds a project already, or a setting makes no sense
    """
    _check(min(n_micrographs, particles_per_micrograph), box_px, snr, junk_fraction)
    folder, job = Path(folder), "Extract/job001"
    if relion_version not in VERSIONS:
        raise UsageError(f"RELION version {relion_version!r}: choose one of {', '.join(VERSIONS)}.")
    if (folder / "default_pipeline.star").exists() or (folder / job).exists():
        raise UsageError(f"{folder} holds a RELION project already. Name a new folder.")
    (folder / job / "Micrographs").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    molecule = random_molecule(rng, MOLECULE_PER_BOX * box_px * pixel_size_angstrom)
    sizes = [particles_per_micrograph] * n_micrographs
    rows: list[list[Any]] = []
    truth = ["image,real,kind"]
    field = {"box_px": box_px, "pixel_size_angstrom": pixel_size_angstrom, "snr": snr}
    simulated = _micrographs(rng, [molecule], sizes, junk_fraction, **field)
    for number, (images, picks, parameters) in enumerate(simulated, 1):
        stack = f"{job}/Micrographs/mic{number:03d}.mrcs"
        _write_stack(folder / stack, images, pixel_size_angstrom)
        names = [f"{i:06d}@{stack}" for i in range(1, len(images) + 1)]
        rows += _particle_rows(rng, names, f"Micrographs/mic{number:03d}.mrc", picks, parameters)
        truth += [f"{a},{b},{c}" for a, b, c in zip(names, picks.labels, picks.kind, strict=True)]
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    star = _particles_star(relion_version, shuffled, box_px, pixel_size_angstrom)
    _write_text(folder / "truth.csv", "\n".join(truth) + "\n")
    _write_text(folder / job / "particles.star", star)
    _write_text(folder / job / "RELION_JOB_EXIT_SUCCESS", "")
    _write_text(folder / "default_pipeline.star", _pipeline_star(relion_version, job))
    return folder / job / "particles.star"


# The specimen -------------------------------------------------------------------------------------


def _directions(rng: np.random.Generator, n: int, dimensions: int = 3) -> Array:
    vectors = rng.normal(size=(n, dimensions))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _rotation(rng: np.random.Generator) -> Array:
    """A rotation matrix, uniform over SO(3), by QR with fixed signs.

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
    middles = _directions(rng, n_rods) * rng.random((n_rods, 1)) ** (1 / 3)
    along = np.linspace(-0.25, 0.25, ATOMS_PER_ROD)[:, None] * _directions(rng, n_rods)[:, None]
    rods = (middles * rng.uniform(0.35, 0.6, 3))[:, None] + along
    return np.asarray((rods + rng.normal(0, 0.03, rods.shape)).reshape(-1, 3))


def _film_distance(rng: np.random.Generator, side: int, margin: float) -> Array:
    """Distance of each pixel from the edge of a carbon hole, px, positive on the film."""
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.5) * side
    edge = rng.uniform(0.3, 0.7) * (side / 2 - margin)  # from the middle of the micrograph
    x, y = (side / 2 + (edge - radius) * f(angle) for f in (np.cos, np.sin))
    row, column = np.ogrid[:side, :side]
    return np.asarray(np.hypot(column - x, row - y) - radius)


def _sites(
    rng: np.random.Generator,
    kinds: Array,
    side: int,
    margin: float,
    diameter_px: float,
    film: Array | None,
    box_px: int,
) -> Array:
    """Throw darts: (n, 2) x and y, kept apart; carbon picks at the film's edge, the rest off it."""
    sites: list[Array] = []
    spacing = SITE_SPACING * diameter_px
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


def _protein(
    rng: np.random.Generator, molecule: Molecule, kind: str
) -> Iterator[tuple[Array, Array]]:
    """Yield pseudo-atoms (n, 3) in Å about the site and weights (n,) of what stands at a site."""
    atoms, weights = molecule.atoms @ _rotation(rng).T, molecule.weights * rng.uniform(0.85, 1.15)
    if kind in (PARTICLE, "off_centre"):
        yield atoms, weights
    elif kind == "broken":
        depth = atoms @ _directions(rng, 1)[0]
        kept = depth < np.quantile(depth, rng.uniform(0.3, 0.6))
        yield atoms[kept] - atoms[kept].mean(0), weights[kept]
    elif kind == "aggregate":
        for shift in _directions(rng, int(rng.integers(3, 7))) * molecule.diameter_angstrom:
            yield molecule.atoms @ _rotation(rng).T + shift * rng.uniform(0.25, 0.75), weights


def _ice(rng: np.random.Generator, diameter_px: float) -> tuple[Array, Array]:
    """Points (n, 2) in px about the site and weights (n,) of a lumpy ball, bright or dark."""
    lumps = rng.normal(0, 0.3, (5, 2))[rng.integers(0, 5, 6000)]
    ball = _directions(rng, 6000)[:, :2] * rng.random((6000, 1)) ** (1 / 3)
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


def _deposit_proteins(
    rng: np.random.Generator,
    molecule: Molecule,
    kinds: Array,
    sites: Array,
    side: int,
    pixel_size_angstrom: float,
) -> Array:
    """Everything made of the molecule, projected, (side, side)."""
    parts = [
        (site + atoms[:, :2] / pixel_size_angstrom, weights)
        for kind, site in zip(kinds, sites, strict=True)
        for atoms, weights in _protein(rng, molecule, kind)
    ]
    return _deposit(parts, side)


def _deposit_dirt(
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


# The image ----------------------------------------------------------------------------------------


def _frequency2(side: int, pixel_size: float) -> Array:
    u, v = np.fft.rfftfreq(side, pixel_size), np.fft.fftfreq(side, pixel_size)
    return np.asarray(u[None] ** 2 + v[:, None] ** 2)


def _masked_variance(signal: Array, centres: Array, radius_px: float) -> float:
    """Mean over the centres of the variance of the signal within a radius of them."""
    reach = int(np.ceil(radius_px))
    v, u = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    inside = u**2 + v**2 <= radius_px**2
    x, y = np.rint(centres).astype(np.int64).T[:, :, None]
    return float(signal[y + v[inside], x + u[inside]].var(1).mean())


def _dirt_and_noise(
    rng: np.random.Generator, dirt: Array, transfer: Array, diameter_px: float
) -> Array:
    """Dirt through the CTF, solvent noise (white before the CTF), slow ice and shot noise."""
    side, frequencies = len(dirt), transfer.shape
    transfer = transfer / np.sqrt((transfer**2).mean())
    lowpass = np.exp(-_frequency2(side, 1.0) * (0.8 * diameter_px) ** 2)
    lowpass *= SLOW_ICE_RMS / np.sqrt((lowpass**2).mean())
    # Complex white noise on the half plane: real white noise of variance 1 after irfft2.
    white = rng.standard_normal((2, *frequencies, 2)) @ np.array([1, 1j]) * (side / np.sqrt(2))
    solvent = np.sqrt(SOLVENT_SHARE) * white[0] + np.fft.rfft2(dirt)
    ice = np.fft.irfft2(white[1] * lowpass, (side, side))
    shot = np.sqrt(1 - SOLVENT_SHARE) * rng.standard_normal((side, side))
    image: Array = np.fft.irfft2(solvent * transfer, (side, side))
    image += ice + shot * np.exp(SHOT_NOISE_SLOPE * ice)
    return image


def _micrographs(
    rng: np.random.Generator,
    molecules: Sequence[Molecule],
    sizes: Sequence[int],
    junk_fraction: float,
    **field: Any,
) -> Iterator[tuple[Array, Picks, CtfParameters]]:
    """Yield extracted images, picks and CTF of one micrograph after the other.

    `field` holds the box, pixel size and SNR of simulate_micrograph.
    """
    for index, n in enumerate(sizes):
        defocus, astigmatism, angle = rng.uniform([8000, 0, 0], [22000, 400, 180])
        p = CtfParameters(defocus + astigmatism / 2, defocus - astigmatism / 2, angle)
        kinds = draw_kinds(rng, n, junk_fraction, carbon=index % 3 == 1)
        molecule = molecules[index % len(molecules)]
        image, picks = simulate_micrograph(rng, molecule, kinds, parameters=p, **field)
        yield extract(image, picks, field["box_px"]), picks, p


def _check(n: int, box_px: int, snr: float, junk_fraction: float) -> None:
    if n < 1:
        raise UsageError(f"{n} images or micrographs: expected 1 or more.")
    if box_px < 16 or box_px % 2:
        raise UsageError(f"Box size {box_px} px: expected an even number, 16 or more.")
    if not snr > 0:
        raise UsageError(f"Signal-to-noise ratio {snr}: expected more than 0.")
    if not 0 <= junk_fraction <= 1:
        raise UsageError(f"Junk fraction {junk_fraction}: expected 0 to 1.")


# The project --------------------------------------------------------------------------------------

VERSIONS = {"3.1": 30001, "5": 50001}  # the number on RELION's "# version" lines
OPTICS_LABELS = (
    "OpticsGroupName OpticsGroup MicrographOriginalPixelSize Voltage SphericalAberration "
    "AmplitudeContrast ImagePixelSize ImageSize ImageDimensionality"
)
PARTICLE_LABELS = (
    "CoordinateX CoordinateY ImageName MicrographName OpticsGroup CtfMaxResolution "
    "CtfFigureOfMerit DefocusU DefocusV DefocusAngle CtfBfactor CtfScalefactor PhaseShift "
    "AutopickFigureOfMerit"
)


def _table(version: str, name: str, labels: str, rows: Sequence[Sequence[Any]]) -> str:
    """One loop block as RELION's MetaDataTable::write lays it out (src/metadata_table.cpp)."""
    head = [f"_rln{label} #{i} " for i, label in enumerate(labels.split(), 1)]
    body = [" ".join(_cell(value) for value in row) + " " for row in rows]
    lines = ["", f"# version {VERSIONS[version]}", "", f"data_{name}", "", "loop_ ", *head, *body]
    return "\n".join(lines) + "\n \n"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"{value:>10}"
    return f"{value:12d}" if isinstance(value, int) else f"{value:12.6f}"


def _particles_star(
    version: str, rows: list[list[Any]], box_px: int, pixel_size_angstrom: float
) -> str:
    p, pixel = CtfParameters(), float(pixel_size_angstrom)
    microscope = [p.voltage_kv, p.cs_mm, p.amplitude_contrast]
    optics = ["opticsGroup1", 1, pixel, *microscope, pixel, box_px, 2]
    head = _table(version, "optics", OPTICS_LABELS, [optics])
    return head + _table(version, "particles", PARTICLE_LABELS, rows)


def _particle_rows(
    rng: np.random.Generator, images: list[str], micrograph: str, picks: Picks, p: CtfParameters
) -> list[list[Any]]:
    fit = [rng.uniform(3.5, 6), rng.uniform(0.05, 0.2)]  # resolution and merit of the CTF fit
    defocus = [p.defocus_u_angstrom, p.defocus_v_angstrom, p.defocus_angle_degrees]
    return [
        [x, y, image, micrograph, 1, *fit, *defocus, 0.0, 1.0, 0.0, rng.uniform(0, 2)]
        for x, y, image in zip(picks.x, picks.y, images, strict=True)
    ]


def _pipeline_star(version: str, job: str) -> str:
    """default_pipeline.star with one finished Extract job (src/pipeliner.cpp, PipeLine::write)."""
    counter = f"_rlnPipeLineJobCounter {2:23d}"
    text = f"\n# version {VERSIONS[version]}\n\ndata_pipeline_general\n\n{counter}\n \n"
    star = f"{job}/particles.star"
    processes, nodes = "PipeLineProcessName PipeLineProcessAlias ", "PipeLineNodeName "
    if version == "3.1":
        processes += "PipeLineProcessType PipeLineProcessStatus"
        nodes += "PipeLineNodeType"
        process, node = [f"{job}/", "None", 5, 2], [star, 3]
    else:
        processes += "PipeLineProcessTypeLabel PipeLineProcessStatusLabel"
        nodes += "PipeLineNodeTypeLabel PipeLineNodeTypeLabelDepth"
        process = [f"{job}/", "None", "relion.extract", "Succeeded"]
        node = [star, "ParticleGroupMetadata.star.relion", 1]
    text += _table(version, "pipeline_processes", processes, [process])
    text += _table(version, "pipeline_nodes", nodes, [node])
    edges = "PipeLineEdgeProcess PipeLineEdgeToNode"
    return text + _table(version, "pipeline_output_edges", edges, [[f"{job}/", star]])


@contextmanager
def _renamed_when_done(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` if nothing went wrong."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with _renamed_when_done(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _write_stack(path: Path, images: Array, pixel_size_angstrom: float) -> None:
    with _renamed_when_done(path) as temporary, mrcfile.new(temporary, images) as stack:
        stack.set_image_stack()
        stack.voxel_size = pixel_size_angstrom
        stack.header.label[0] = "simulated by relion_cryofilter"  # mrcfile's own holds the time

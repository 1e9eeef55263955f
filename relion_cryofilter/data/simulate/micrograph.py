"""Micrographs of a specimen and the boxes cut from them, as arrays.

`simulate_micrograph` images a specimen as a weak phase object (projection x CTF, then noise) and
returns the picks; `extract` cuts and normalises boxes as RELION does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from relion_cryofilter.data.simulate.specimen import (
    PARTICLE,
    SITE_SPACING,
    Array,
    Molecule,
    deposit_dirt,
    deposit_proteins,
    directions,
    draw_kinds,
    film_distance,
    place_sites,
    random_molecule,
)
from relion_cryofilter.errors import UsageError

PICKS_PER_MICROGRAPH = 84
MOLECULE_PER_BOX = 0.6  # particle diameter / box size
BACKGROUND_RADIUS = 0.75  # of half a box: the default of RELION's Extract job
SHOT_NOISE_SLOPE = 0.6  # how the standard deviation of shot noise follows the ice: 10 % rms
ATOM_SIGMA_ANGSTROM = 2.0
FIELD_PER_SITE = 1.4  # sqrt(area per object) / particle diameter


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
class Field:
    """What a micrograph is like, apart from its CTF.

    Attributes
    ----------
    solvent_share
        Part of the noise's variance that is made before the CTF; the rest is shot noise.
    slow_ice_rms
        Uneven ice, in units of the noise's standard deviation.
    spacing
        Least distance between two objects / particle diameter.
    unpicked
        Particles that no pick is on / picks.
    jitter
        Standard deviation of the picks about the particles, in each direction / diameter.
    """

    solvent_share: float = 0.3
    slow_ice_rms: float = 0.16
    spacing: float = SITE_SPACING
    unpicked: float = 1 / 6
    jitter: float = 0.03


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


def simulate_micrograph(
    rng: np.random.Generator,
    molecule: Molecule,
    kinds: Array | Sequence[str],
    *,
    parameters: CtfParameters | None = None,
    box_px: int = 64,
    pixel_size_angstrom: float = 3.0,
    snr: float = 0.05,
    field: Field | None = None,
    other: Molecule | None = None,
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
    field : crowding and noise; None means Field()
    other : the molecule at sites of the kind "other"

    Returns
    -------
    image : (side, side) float32, side chosen to hold the picks
    picks : Picks, in the order of `kinds`
    """
    kinds, field = np.asarray(kinds), field or Field()
    diameter_px = molecule.diameter_angstrom / pixel_size_angstrom
    everything = np.append(kinds, [PARTICLE] * max(2, int(len(kinds) * field.unpicked)))
    margin, has_film = box_px / 2 + 0.9 * diameter_px, "carbon" in kinds
    inner = np.sqrt(len(everything) * (1.6 if has_film else 1)) * FIELD_PER_SITE * diameter_px
    inner *= field.spacing / SITE_SPACING
    side = 32 * int(np.ceil((2 * margin + max(inner, 2 * box_px)) / 32))
    film = film_distance(rng, side, margin) if has_film else None
    sites = place_sites(rng, everything, side, margin, diameter_px, film, box_px, field.spacing)

    transfer = ctf((side, side), pixel_size_angstrom, parameters or CtfParameters())
    protein = deposit_proteins(rng, molecule, everything, sites, side, pixel_size_angstrom, other)
    atom = np.exp(-2 * (np.pi * ATOM_SIGMA_ANGSTROM) ** 2 * _frequency2(side, pixel_size_angstrom))
    signal = np.fft.irfft2(np.fft.rfft2(protein) * transfer * atom, (side, side))
    signal *= np.sqrt(
        snr / _masked_variance(signal, sites[everything == PARTICLE], diameter_px / 2)
    )
    dirt = deposit_dirt(rng, sites[everything == "ice"], side, diameter_px, film)
    image = signal + _dirt_and_noise(rng, dirt, transfer, diameter_px, field)

    offset = rng.normal(0, field.jitter, (len(kinds), 2))
    away = directions(rng, len(kinds), 2) * rng.uniform(0.35, 0.6, (len(kinds), 1))
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
    field: Field | None = None,
) -> SimulatedImages:
    """Simulate `n` extracted images without files, a molecule for each micrograph in turn.

    Parameters
    ----------
    n : images in all, PICKS_PER_MICROGRAPH to a micrograph
    snr : as in simulate_micrograph
    junk_fraction : part of each micrograph's images that is junk, 0 to 1
    molecules : how many to make, or the molecules themselves
    field : crowding and noise; None means Field()

    Raises
    ------
    UsageError : a setting makes no sense
    """
    check_settings(n, box_px, snr, junk_fraction)
    rng = np.random.default_rng(seed)
    if isinstance(molecules, int):
        diameter = MOLECULE_PER_BOX * box_px * pixel_size_angstrom
        molecules = [random_molecule(rng, diameter) for _ in range(molecules)]
    sizes = [min(PICKS_PER_MICROGRAPH, n - i) for i in range(0, n, PICKS_PER_MICROGRAPH)]
    settings = {"box_px": box_px, "pixel_size_angstrom": pixel_size_angstrom, "snr": snr}
    parts = list(
        extracted_micrographs(rng, molecules, sizes, junk_fraction, field=field, **settings)
    )
    return SimulatedImages(
        np.concatenate([images for images, _, _ in parts]),
        np.concatenate([picks.labels for _, picks, _ in parts]),
        np.concatenate([picks.kind for _, picks, _ in parts]),
        np.repeat(np.arange(len(sizes)), sizes),
    )


def extracted_micrographs(
    rng: np.random.Generator,
    molecules: Sequence[Molecule],
    sizes: Sequence[int],
    junk_fraction: float,
    **settings: Any,
) -> Iterator[tuple[Array, Picks, CtfParameters]]:
    """Yield extracted images, picks and CTF of one micrograph after the other.

    `settings` are those of simulate_micrograph: the box, the pixel size, the SNR and so on.
    """
    for index, n in enumerate(sizes):
        defocus, astigmatism, angle = rng.uniform([8000, 0, 0], [22000, 400, 180])
        p = CtfParameters(defocus + astigmatism / 2, defocus - astigmatism / 2, angle)
        kinds = draw_kinds(rng, n, junk_fraction, carbon=index % 3 == 1)
        molecule = molecules[index % len(molecules)]
        image, picks = simulate_micrograph(rng, molecule, kinds, parameters=p, **settings)
        yield extract(image, picks, settings["box_px"]), picks, p


def check_settings(n: int, box_px: int, snr: float, junk_fraction: float) -> None:
    """Raise UsageError if a setting of simulate_images or simulate_project makes no sense."""
    if n < 1:
        raise UsageError(f"{n} images or micrographs: expected 1 or more.")
    if box_px < 16 or box_px % 2:
        raise UsageError(f"Box size {box_px} px: expected an even number, 16 or more.")
    if not snr > 0:
        raise UsageError(f"Signal-to-noise ratio {snr}: expected more than 0.")
    if not 0 <= junk_fraction <= 1:
        raise UsageError(f"Junk fraction {junk_fraction}: expected 0 to 1.")


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
    rng: np.random.Generator, dirt: Array, transfer: Array, diameter_px: float, field: Field
) -> Array:
    """Dirt through the CTF, solvent noise (white before the CTF), slow ice and shot noise."""
    side, frequencies = len(dirt), transfer.shape
    transfer = transfer / np.sqrt((transfer**2).mean())
    lowpass = np.exp(-_frequency2(side, 1.0) * (0.8 * diameter_px) ** 2)
    lowpass *= field.slow_ice_rms / np.sqrt((lowpass**2).mean())
    # Complex white noise on the half plane: real white noise of variance 1 after irfft2.
    white = rng.standard_normal((2, *frequencies, 2)) @ np.array([1, 1j]) * (side / np.sqrt(2))
    solvent = np.sqrt(field.solvent_share) * white[0] + np.fft.rfft2(dirt)
    ice = np.fft.irfft2(white[1] * lowpass, (side, side))
    shot = np.sqrt(1 - field.solvent_share) * rng.standard_normal((side, side))
    image: Array = np.fft.irfft2(solvent * transfer, (side, side))
    image += ice + shot * np.exp(SHOT_NOISE_SLOPE * ice)
    return image

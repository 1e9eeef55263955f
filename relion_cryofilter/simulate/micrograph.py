"""Micrographs of a specimen and the boxes cut from them, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from relion_cryofilter.errors import UsageError
from relion_cryofilter.simulate.specimen import (
    PARTICLE,
    SITE_SPACING,
    Array,
    Molecule,
    Rng,
    deposit,
    directions,
    dirt,
    draw_kinds,
    place_sites,
    proteins,
    random_molecule,
)

PICKS_PER_MICROGRAPH = 84
MOLECULE_PER_BOX = 0.6  # particle diameter / box size
BACKGROUND_RADIUS = 0.75  # of half a box: the default of RELION's Extract job
SHOT_NOISE_SLOPE = 0.6  # how the standard deviation of shot noise follows the ice: 10 % rms
ATOM_SIGMA_ANGSTROM = 2.0


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
    """What a micrograph is like, apart from its CTF."""

    solvent_share: float = 0.3  # of the noise's variance: made before the CTF, unlike shot noise
    slow_ice_rms: float = 0.16  # uneven ice / standard deviation of the noise
    spacing: float = SITE_SPACING
    unpicked: float = 1 / 6  # particles that no pick is on / picks
    jitter: float = 0.03  # standard deviation of the picks in each direction / particle diameter
    other: Molecule | None = None  # at sites of the kind ``other``


@dataclass(frozen=True)
class Boxes:
    """The images of a micrograph: their side, Å/px, and the part of them that is junk, 0 to 1."""

    box_px: int = 64
    pixel_size_angstrom: float = 3.0
    junk_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.box_px < 16 or self.box_px % 2:
            raise UsageError(f"Box size {self.box_px} px: expected an even number, 16 or more.")
        if not 0 <= self.junk_fraction <= 1:
            raise UsageError(f"Junk fraction {self.junk_fraction}: expected 0 to 1.")


@dataclass(frozen=True)
class Picks:
    """Where boxes are cut: `x`, `y` (n,) in pixels, 0-based, and `kind` (n,), each one of KINDS.

    `rotation` (n, 3, 3) takes the molecule to its pose; it means something where `kind` has a pose.
    """

    x: Array
    y: Array
    kind: Array
    rotation: Array | None = None


class SimulatedImages(NamedTuple):
    """`images` (n, box, box) float32; `labels` (1: particle), `kinds` and `micrographs` (n,)."""

    images: Array
    labels: Array
    kinds: Array
    micrographs: Array


def ctf(shape: tuple[int, int], pixel_size_angstrom: float, parameters: CtfParameters) -> Array:
    """Return the CTF on the grid of `numpy.fft.rfft2`, (height, width // 2 + 1).

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
    decay = np.exp(-p.b_factor / 4 * u2)
    return np.asarray(np.sin(phase + np.arcsin(p.amplitude_contrast)) * decay)


def simulate_micrograph(
    rng: Rng,
    molecule: Molecule,
    kinds: Array | Sequence[str],
    parameters: CtfParameters | None = None,
    box_px: int = 64,
    pixel_size_angstrom: float = 3.0,
    snr: float = 0.05,
    field: Field | None = None,
) -> tuple[Array, Picks]:
    """Return an image (side, side) float32, protein dark, and picks of `kinds` (n,) in that order.

    Parameters
    ----------
    box_px
        Side of the boxes to be cut; picks keep clear of the borders.
    snr
        Variance of the noise-free, CTF-filtered image inside a circle of the molecule's diameter
        around a whole particle (mean over the particles) / variance of the noise. The latter is 1:
        solvent and shot noise, without the slow ice.
    """
    if not snr > 0:
        raise UsageError(f"Signal-to-noise ratio {snr}: expected more than 0.")
    kinds, field = np.asarray(kinds), field or Field()
    diameter_px = molecule.diameter_angstrom / pixel_size_angstrom
    # What stands where.
    standing = np.append(kinds, [PARTICLE] * max(2, int(len(kinds) * field.unpicked)))
    sites, side, film = place_sites(rng, standing, diameter_px, box_px, field.spacing)
    # Proteins as a weak phase object, scaled to the signal-to-noise ratio.
    transfer = ctf((side, side), pixel_size_angstrom, parameters or CtfParameters())
    copies, rotations = proteins(rng, molecule, field.other, standing, sites)
    protein = deposit(copies, side, pixel_size_angstrom)
    atom = np.exp(-2 * (np.pi * ATOM_SIGMA_ANGSTROM) ** 2 * _frequency2(side, pixel_size_angstrom))
    signal = np.fft.irfft2(np.fft.rfft2(protein) * transfer * atom, (side, side))
    reach = int(np.ceil(diameter_px / 2))
    v, u = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    inside = u**2 + v**2 <= (diameter_px / 2) ** 2
    x, y = np.rint(sites[standing == PARTICLE]).astype(np.int64).T[:, :, None]
    signal *= np.sqrt(snr / float(signal[y + v[inside], x + u[inside]].var(1).mean()))
    # Dirt and solvent noise, white before the CTF. Complex white noise on the half plane is real
    # white noise of variance 1 after irfft2.
    specks = dirt(rng, sites[standing == "ice"], side, diameter_px, film)
    white = rng.standard_normal((2, *transfer.shape, 2)) @ np.array([1, 1j]) * (side / np.sqrt(2))
    solvent = np.sqrt(field.solvent_share) * white[0] + np.fft.rfft2(specks)
    image = np.fft.irfft2(solvent * (transfer / np.sqrt((transfer**2).mean())), (side, side))
    # Slowly varying ice, and the shot noise that follows it.
    lowpass = np.exp(-_frequency2(side, 1.0) * (0.8 * diameter_px) ** 2)
    lowpass *= field.slow_ice_rms / np.sqrt((lowpass**2).mean())
    ice = np.fft.irfft2(white[1] * lowpass, (side, side))
    shot = np.sqrt(1 - field.solvent_share) * rng.standard_normal((side, side))
    image = signal + (image + (ice + shot * np.exp(SHOT_NOISE_SLOPE * ice)))
    # Picks, some beside their particle.
    offset = rng.normal(0, field.jitter, (len(kinds), 2))
    away = directions(rng, len(kinds), 2) * rng.uniform(0.35, 0.6, (len(kinds), 1))
    offset[kinds == "off_centre"] = away[kinds == "off_centre"]
    x, y = (sites[: len(kinds)] + offset * diameter_px).T
    return -image.astype(np.float32), Picks(x, y, kinds, rotations[: len(kinds)])


def extract(image: Array, picks: Picks, box_px: int, *, invert: bool = True) -> Array:
    """Cut boxes and normalise them as RELION's Extract job does by default.

    Contrast inverted (protein white), a plane fitted to the background subtracted, background mean
    0 and standard deviation 1; background is what lies outside 0.75 * box / 2 from the centre
    (relion_preprocess: --invert_contrast, --bg_radius; normalise() in src/image.cpp). Returned are
    (n, box, box) float32, whose pixel (box // 2, box // 2) is the one nearest to the pick; a box
    that leaves the micrograph is an IndexError.
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
    seed: int | Rng,
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
    n
        Images in all, `PICKS_PER_MICROGRAPH` to a micrograph.
    snr, junk_fraction
        As in `simulate_micrograph` and `Boxes`.
    molecules
        How many to make, or the molecules themselves.

    Raises
    ------
    UsageError
        A setting makes no sense.
    """
    boxes = Boxes(box_px, pixel_size_angstrom, junk_fraction)
    rng = np.random.default_rng(seed)
    if isinstance(molecules, int):
        diameter = MOLECULE_PER_BOX * box_px * pixel_size_angstrom
        molecules = [random_molecule(rng, diameter) for _ in range(molecules)]
    sizes = [min(PICKS_PER_MICROGRAPH, n - i) for i in range(0, n, PICKS_PER_MICROGRAPH)]
    images, picks, _ = zip(*extracted_micrographs(rng, molecules, sizes, boxes, snr, field))
    kinds = np.concatenate([part.kind for part in picks])
    labels, micrographs = np.where(kinds == PARTICLE, 1, 0), np.repeat(np.arange(len(sizes)), sizes)
    return SimulatedImages(np.concatenate(images), labels, kinds, micrographs)


def extracted_micrographs(
    rng: Rng,
    molecules: Sequence[Molecule],
    sizes: Sequence[int],
    boxes: Boxes,
    snr: float,
    field: Field | None = None,
) -> Iterator[tuple[Array, Picks, CtfParameters]]:
    """Yield extracted images, picks and CTF of one micrograph after the other."""
    if min(sizes, default=0) < 1:
        raise UsageError("There are no images or micrographs: expected 1 or more.")
    for index, n in enumerate(sizes):
        defocus, astigmatism, angle = rng.uniform([8000, 0, 0], [22000, 400, 180])
        p = CtfParameters(defocus + astigmatism / 2, defocus - astigmatism / 2, angle)
        kinds = draw_kinds(rng, n, boxes.junk_fraction, carbon=index % 3 == 1)
        molecule = molecules[index % len(molecules)]
        image, picks = simulate_micrograph(
            rng, molecule, kinds, p, boxes.box_px, boxes.pixel_size_angstrom, snr, field
        )
        yield extract(image, picks, boxes.box_px), picks, p


def _frequency2(side: int, pixel_size: float) -> Array:
    u, v = np.fft.rfftfreq(side, pixel_size), np.fft.fftfreq(side, pixel_size)
    return np.asarray(u[None] ** 2 + v[:, None] ** 2)

"""Simulated images of great variety, from which a network learns what particles have in common.

Every micrograph has its own molecule, size, pixel size, defocus, signal, kinds of junk, detector,
noise spectrum and processing. What is learnt from them carries over to images of other makes only
as far as they are varied (domain randomization: J. Tobin et al., IROS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from shapes import filament, membrane, micelle, random_shape, random_views
from textures import ARTEFACTS, artefact, detector, filtered, frequencies, process, random_ctf

from relion_cryofilter.simulate.micrograph import Picks, ctf, extract
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
)

ARTEFACT_SHARE = 0.35
"""Of the empty picks, those that show something that is not biology."""

CONTAMINANTS = ("filament", "membrane", "micelle")
CONTAMINANT_SHARE = 0.3
"""Of the junk of a micrograph that has them."""

CENTRED, BESIDE = 0.12, 0.25
"""Up to the one a whole particle is good, from the other it is not; in units of its diameter."""

EXTRA_PICKS = 0.4
"""Of all picks, those that are second ones of a site, further from its centre."""

SHOT_NOISE_SLOPE = 0.6  # as in `simulate_micrograph`


@dataclass(frozen=True)
class Ranges:
    """From what the settings of a micrograph are drawn, uniformly unless said otherwise.

    Attributes
    ----------
    size
        Diameter of the molecule / box; half as often at the ends.
    pixel_size_angstrom
        Å/px; drawn by its logarithm.
    snr
        As in `simulate_micrograph`; its logarithm, with twice the mean density at the high end.
    defocus_angstrom
        Mean defocus.
    junk_fraction
        Part of the sites that is junk.
    """

    size: tuple[float, float] = (0.2, 0.75)
    pixel_size_angstrom: tuple[float, float] = (1.8, 7.0)
    snr: tuple[float, float] = (0.003, 0.3)
    defocus_angstrom: tuple[float, float] = (5000.0, 35000.0)
    junk_fraction: tuple[float, float] = (0.3, 0.7)


class VariedImages(NamedTuple):
    """`images` (n, box, box) float32; `labels` (1: particle), `kinds`, `micrographs`, (n,) each.

    `targets` (n,) are softer than the labels: between 0 and 1 for particles beside the centre.
    """

    images: Array
    labels: Array
    kinds: Array
    micrographs: Array
    targets: Array


@dataclass(frozen=True, eq=False)
class Scene:
    """A micrograph before noise: what is where, and its picks.

    Attributes
    ----------
    signal
        (side, side), protein white, CTF-filtered; of unit variance about a whole particle.
    dirt
        (side, side), ice and carbon, in units of the noise.
    transfer
        The CTF on the grid of rfft2.
    picks, targets
        Where boxes are cut, (n,), and how good they are.
    """

    signal: Array
    dirt: Array
    transfer: Array
    picks: Picks
    targets: Array
    diameter_px: float


def simulate_varied(
    seed: int,
    micrographs: Sequence[int],
    *,
    picks: int = 40,
    box_px: int = 64,
    molecules: Sequence[Molecule] = (),
    ranges: Ranges | None = None,
    degraded: bool = True,
    backgrounds: Array | None = None,
) -> VariedImages:
    """Simulate the micrographs of the numbers given; the same number gives the same images.

    Parameters
    ----------
    seed
        With a micrograph's number, it decides everything.
    micrographs
        Numbers; they come back as `VariedImages.micrographs`.
    picks
        Boxes a micrograph.
    box_px
        Side of the boxes.
    molecules
        Real ones; nearly half of the micrographs show one of them, the others random shapes.
    ranges
        From what settings are drawn; None means Ranges().
    degraded
        Also filter and re-process images as other programs do.
    backgrounds
        (m, box, box) real images without particles: the simulated particles are put on them,
        and their spectra are matched. None makes the noise too.
    """
    parts = []
    for number in micrographs:
        rng = np.random.default_rng([seed, number])
        scene = draw_scene(rng, picks, box_px, molecules, ranges or Ranges())
        snr = _mostly_high(rng, (ranges or Ranges()).snr)
        if backgrounds is None:
            images, kinds = _noisy_boxes(rng, scene, snr, box_px, degraded)
        else:
            images, kinds = _composites(rng, scene, snr, backgrounds), scene.picks.kind
        targets = np.where(np.isin(kinds, ARTEFACTS), 0, scene.targets)
        parts.append((images, kinds, targets))
    kinds = np.concatenate([kinds for _, kinds, _ in parts])
    return VariedImages(
        np.concatenate([images for images, _, _ in parts]),
        (kinds == PARTICLE).astype(np.int64),
        kinds,
        np.repeat(np.asarray(micrographs), picks),
        np.concatenate([targets for *_, targets in parts]).astype(np.float32),
    )


def molecule_of_map(density: Array, voxel_angstrom: float, n_atoms: int = 2000) -> Molecule:
    """Return pseudo-atoms drawn from a density (z, y, x) of `voxel_angstrom` Å, centred."""
    rng = np.random.default_rng(0)
    positive = np.clip(density - 0.1 * density.max(), 0, None).astype(np.float64).ravel()
    voxels = rng.choice(len(positive), n_atoms, p=positive / positive.sum())
    places = np.stack(np.unravel_index(voxels, density.shape), 1) + rng.uniform(0, 1, (n_atoms, 3))
    atoms = (places - places.mean(0)) * voxel_angstrom
    return Molecule(atoms, np.ones(n_atoms))


def draw_scene(
    rng: Rng, picks: int, box_px: int, molecules: Sequence[Molecule], ranges: Ranges
) -> Scene:
    """Draw a specimen, where its objects stand, what they look like, and picks on them."""
    pixel_size = _log_uniform(rng, ranges.pixel_size_angstrom)
    low, high = ranges.size
    diameter_px = (low + (high - low) * rng.beta(1.6, 1.6)) * box_px
    diameter = diameter_px * pixel_size
    filamentous = rng.random() < 0.05
    molecule = random_shape(rng, diameter)
    if len(molecules) and rng.random() < 0.45:
        real = molecules[int(rng.integers(len(molecules)))]
        molecule = Molecule(real.atoms * diameter / real.diameter_angstrom, real.weights)
    if molecule.views is None:
        molecule = replace(
            molecule,
            bend_degrees=float(rng.choice([0.0, rng.uniform(5, 40)])),
            views=random_views(rng) if rng.random() < 0.3 else None,
        )

    # What stands at the sites: one pick on each, and some particles that nobody picked.
    n_sites = max(1, round(picks * (1 - EXTRA_PICKS)))
    film, others = rng.random(2) < [0.3, 0.25]
    fraction = rng.uniform(*ranges.junk_fraction)
    kinds = draw_kinds(rng, n_sites, fraction, carbon=bool(film), others=bool(others))
    kinds = np.asarray(kinds, "U12")
    for name in CONTAMINANTS:
        if rng.random() < 0.2 and not filamentous:
            turned = (kinds == "empty") | (kinds == "ice") | (kinds == "aggregate")
            kinds[turned & (rng.random(n_sites) < CONTAMINANT_SHARE)] = name
    unpicked = max(2, int(n_sites * rng.uniform(0.1, 0.8)))
    standing = np.append(kinds, [PARTICLE] * unpicked)
    spacing = float(rng.choice([rng.uniform(0.8, 1.2), rng.uniform(1.1, 2.2)]))
    reach_px = 1.2 * box_px / 2 if filamentous else diameter_px
    sites, side, carbon = place_sites(rng, standing, reach_px, box_px, spacing * SITE_SPACING)

    # Proteins and other phase objects.
    angles = rng.uniform(0, 2 * np.pi, len(sites))
    if filamentous:
        thread = filament(rng, 2.5 * box_px * pixel_size, diameter * rng.uniform(0.3, 0.8))
        standing[standing == "other"] = "empty"
        kinds = standing[:n_sites]
        clouds = list(_threads(rng, thread, standing, sites, angles))
    else:
        ratio = rng.uniform(0.3, 0.55) if rng.random() < 0.7 else rng.uniform(1.5, 2)
        other = random_shape(rng, ratio * diameter)
        clouds, _ = proteins(rng, molecule, other, standing, sites)
    density = float(molecule.weights.sum()) / diameter_px**2
    for name, place in zip(standing, sites):
        if name == "micelle":
            empty = micelle(rng, diameter * rng.uniform(0.4, 1))
            weight = molecule.weights.sum() / len(empty.atoms) * rng.uniform(0.2, 1)
            clouds.append((place, empty.pose(rng)[0], empty.weights * weight))
        elif name == "filament":
            thread = filament(rng, 2.5 * box_px * pixel_size, diameter * rng.uniform(0.1, 0.5))
            turned = _turned(thread.atoms, rng.uniform(0, 2 * np.pi))
            weight = density * rng.uniform(0.2, 1) * 2.5 * box_px * diameter_px / 3
            clouds.append((place, turned, thread.weights * weight / len(turned)))
    protein = deposit(clouds, side, pixel_size)
    for place in sites[standing == "membrane"]:
        radius_px = box_px * _log_uniform(rng, (0.6, 4))
        wall = membrane(rng, 3 * box_px // 2, pixel_size, radius_px)
        rows, columns = ((np.arange(len(wall)) + int(at) - len(wall) // 2) % side for at in
                         (place[1], place[0]))  # fmt: skip
        protein[np.ix_(rows, columns)] += density * rng.uniform(0.3, 2) * wall
    transfer = ctf((side, side), pixel_size, random_ctf(rng, ranges.defocus_angstrom))
    f2 = (frequencies((side, side)) / (2 * pixel_size)) ** 2
    signal = filtered(protein, transfer * np.exp(-2 * (np.pi * 2.0) ** 2 * f2))
    around = _around(signal, sites[standing == PARTICLE], diameter_px)
    signal /= np.sqrt(around.var(1).mean()) or 1.0

    # Picks: one on every site, and further ones beside some.
    extra = rng.choice(n_sites, picks - n_sites)
    of = np.append(np.arange(n_sites), extra)
    away = directions(rng, picks, 2)
    if filamentous:
        away = np.stack([-np.sin(angles[of]), np.cos(angles[of])], 1)
    jitter = rng.uniform(0.02, 0.08)
    offset = np.abs(rng.normal(0, jitter, picks)) * 1.25
    beside = kinds[of] == "off_centre"
    offset[beside] = rng.uniform(0.3, 0.6, beside.sum())
    second = np.arange(picks) >= n_sites
    offset[second] = rng.uniform(0, np.where(kinds[of[second]] == PARTICLE, 0.6, 0.2))
    at = sites[of] + away * offset[:, None] * diameter_px
    # The pick of an off-centre site was of a whole particle; how far is the nearest one?
    targets, named = np.zeros(picks), kinds[of].copy()
    whole = np.isin(named, [PARTICLE, "off_centre"])
    targets[whole] = np.clip((BESIDE - offset[whole]) / (BESIDE - CENTRED), 0, 1)
    named[whole] = np.where(targets[whole] >= 0.5, PARTICLE, "off_centre")
    return Scene(
        signal, dirt(rng, sites[standing == "ice"], side, diameter_px, carbon), transfer,
        Picks(*at.T, named), targets, diameter_px,
    )  # fmt: skip


def _threads(rng: Rng, thread: Molecule, kinds: Array, sites: Array, angles: Array):
    """Yield filaments through the sites: whole, their ends, crossing ones, in Å."""
    for kind, site, angle in zip(kinds, sites, angles, strict=True):
        atoms = thread.atoms.copy()
        atoms[:, 0] += rng.uniform(-0.1, 0.1) * np.ptp(atoms[:, 0])
        if kind == "broken":
            atoms = atoms[atoms[:, 0] > 0]
        if kind in (PARTICLE, "off_centre", "broken", "aggregate"):
            yield site, _turned(atoms, angle), thread.weights[: len(atoms)]
        if kind == "aggregate":
            yield site, _turned(atoms, angle + rng.uniform(0.5, 2.6)), thread.weights


def _turned(atoms: Array, angle: float) -> Array:
    """Return atoms (n, 3) turned in the plane; the angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(atoms @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]))


def _around(image: Array, sites: Array, diameter_px: float) -> Array:
    """Return the pixels (n, pixels) in circles about the sites."""
    reach = int(np.ceil(diameter_px / 2))
    v, u = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    inside = u**2 + v**2 <= (diameter_px / 2) ** 2
    x, y = np.rint(sites).astype(np.int64).T[:, :, None]
    return np.asarray(image[y + v[inside], x + u[inside]])


def _noisy_boxes(
    rng: Rng, scene: Scene, snr: float, box_px: int, degraded: bool
) -> tuple[Array, Array]:
    """Return boxes (n, box, box) with noise, and their kinds (n,), some now artefacts."""
    side = len(scene.signal)
    f = frequencies((side, side))
    mtf, nps = detector(rng, f) if degraded else (np.ones_like(f), np.ones_like(f))
    # Solvent noise and dirt pass the CTF, shot noise does not. Complex white noise on the half
    # plane is real white noise of variance 1 after irfft2.
    white = rng.standard_normal((3, *f.shape, 2)) @ np.array([1, 1j]) * (side / np.sqrt(2))
    solvent_share = rng.uniform(0.1, 0.6)
    passed = scene.transfer / np.sqrt((scene.transfer**2).mean())
    specimen = np.fft.rfft2(np.sqrt(snr) * scene.signal)
    specimen += (np.sqrt(solvent_share) * white[0] + np.fft.rfft2(scene.dirt)) * passed
    # Slowly varying ice, a slope of it, and the shot noise that follows.
    cut = 2 * (0.8 * scene.diameter_px / 2) ** 2
    lowpass = np.exp(-(f**2) * cut)
    lowpass *= _log_uniform(rng, (0.05, 0.4)) / np.sqrt((lowpass**2).mean())
    ice = np.fft.irfft2(white[1] * lowpass, (side, side))
    if rng.random() < 0.3:
        angle, steep = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1.5)
        y, x = np.indices((side, side)) / side - 0.5
        ice += steep * (x * np.cos(angle) + y * np.sin(angle) + rng.normal() * (x**2 + y**2))
    shot = np.fft.irfft2(white[2], (side, side)) * np.exp(SHOT_NOISE_SLOPE * np.clip(ice, -1, 1))
    shot = np.fft.rfft2(np.sqrt(1 - solvent_share) * shot) * nps
    image = np.fft.irfft2(specimen * mtf + shot, (side, side)) + ice
    if degraded and rng.random() < 0.05:  # crystalline ice everywhere
        ring = np.exp(-(((f - rng.uniform(0.3, 0.95)) / 0.05) ** 2)) * (rng.random(f.shape) < 0.3)
        waves = np.fft.irfft2(white[1] * ring, (side, side))
        image += rng.uniform(0.1, 0.6) * waves / max(waves.std(), 1e-9)
    if degraded:
        image = process(rng, image - image.mean())
    boxes, kinds = extract(image, scene.picks, box_px, invert=False), scene.picks.kind.copy()
    for place in np.flatnonzero((kinds == "empty") & (rng.random(len(kinds)) < ARTEFACT_SHARE)):
        kinds[place] = rng.choice(ARTEFACTS)
        boxes[place] = artefact(rng, boxes[place], kinds[place])
    return boxes, kinds


def _composites(rng: Rng, scene: Scene, snr: float, backgrounds: Array) -> Array:
    """Return boxes (n, box, box): the scene's signal on real backgrounds of the same spectrum."""
    box_px = backgrounds.shape[1]
    n = len(scene.picks.x)
    chosen = backgrounds[rng.integers(0, len(backgrounds), n)].astype(np.float64)
    chosen = np.rot90(chosen, int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        chosen = chosen[:, :, ::-1]
    chosen = chosen - chosen.mean((1, 2), keepdims=True)
    x, y = (np.rint(at).astype(np.int64) - box_px // 2 for at in (scene.picks.x, scene.picks.y))
    signal = np.stack([scene.signal[j : j + box_px, i : i + box_px] for i, j in zip(x, y)])
    # What a detector or denoising did to the noise, it did to the particles: no signal where the
    # background has no power.
    power = (np.abs(np.fft.rfft2(chosen)) ** 2).mean(0)
    f = frequencies((box_px, box_px))
    ring = np.minimum((f * 16).astype(int), 16)
    profile = np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())
    gain = np.sqrt(np.minimum(profile / np.median(profile[2:9]), 1)) ** rng.uniform(0.5, 1)
    # Of typical noise, not of what may be left of a slope or a film in a background.
    sigma = np.sqrt(np.median(chosen.var((1, 2))))
    return np.asarray(chosen + sigma * np.sqrt(snr) * filtered(signal, gain[ring]), np.float32)


def _log_uniform(rng: Rng, ends: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(ends))))


def _mostly_high(rng: Rng, ends: tuple[float, float]) -> float:
    low, high = np.log(ends)
    return float(np.exp(low + (high - low) * np.sqrt(rng.random())))

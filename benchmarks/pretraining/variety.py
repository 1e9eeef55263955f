"""Simulated images of great variety, from which a network learns what particles have in common.

Every micrograph has its own molecule, size, pixel size, defocus, signal, kinds of junk, noise
spectrum and processing. What is learnt from them carries over to images of other makes only as
far as they are varied (domain randomization: J. Tobin et al., IROS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from relion_cryofilter.simulate.micrograph import (
    CtfParameters,
    Field,
    SimulatedImages,
    extract,
    simulate_micrograph,
)
from relion_cryofilter.simulate.specimen import (
    Array,
    Molecule,
    directions,
    draw_kinds,
    random_molecule,
    random_rotation,
)

ARTEFACTS = ("blank", "stripes", "border", "gold", "lattice", "texture")

ARTEFACT_SHARE = 0.25
"""Of the empty picks, those that show something that is not biology."""


@dataclass(frozen=True)
class Ranges:
    """From what the settings of a micrograph are drawn, uniformly unless said otherwise.

    Attributes
    ----------
    size
        Diameter of the molecule / box.
    pixel_size_angstrom
        Å/px; drawn by its logarithm.
    snr
        As in `simulate_micrograph`; its logarithm, with twice the mean density at the high end.
    defocus_angstrom
        Mean defocus.
    junk_fraction
        Part of the picks that is junk.
    """

    size: tuple[float, float] = (0.3, 0.7)
    pixel_size_angstrom: tuple[float, float] = (1.8, 7.0)
    snr: tuple[float, float] = (0.003, 0.3)
    defocus_angstrom: tuple[float, float] = (5000.0, 35000.0)
    junk_fraction: tuple[float, float] = (0.3, 0.7)


def simulate_varied(
    seed: int,
    micrographs: Sequence[int],
    *,
    picks: int = 40,
    box_px: int = 64,
    molecules: Sequence[Molecule] = (),
    ranges: Ranges | None = None,
    degraded: bool = True,
) -> SimulatedImages:
    """Simulate the micrographs of the numbers given; the same number gives the same images.

    Parameters
    ----------
    seed
        With a micrograph's number, it decides everything.
    micrographs
        Numbers; they come back as `SimulatedImages.micrographs`.
    picks
        Boxes a micrograph.
    box_px
        Side of the boxes.
    molecules
        Real ones; half of the micrographs show one of them, the others show random shapes.
    ranges
        From what settings are drawn; None means Ranges().
    degraded
        Also filter and re-process images as other programs do.
    """
    parts = []
    for number in micrographs:
        rng = np.random.default_rng([seed, number])
        images, kinds = _one_micrograph(rng, picks, box_px, molecules, ranges or Ranges())
        parts.append((degrade(rng, images) if degraded else images, kinds))
    kinds = np.concatenate([kinds for _, kinds in parts])
    return SimulatedImages(
        np.concatenate([images for images, _ in parts]),
        (kinds == "particle").astype(np.int64),
        kinds,
        np.repeat(np.asarray(micrographs), picks),
    )


def random_shape(rng: np.random.Generator, diameter_angstrom: float) -> Molecule:
    """Return a molecule of some shape: domains, a shell, a rod, a disc or a blob of blobs."""
    kind = rng.choice(["domains", "shell", "rod", "disc", "blobs"], p=[0.6, 0.1, 0.1, 0.1, 0.1])
    if kind == "domains":
        return random_molecule(rng, diameter_angstrom)
    unit = directions(rng, 1500) * rng.random((1500, 1)) ** (1 / 3)
    if kind == "shell":
        unit = directions(rng, 1500) * rng.uniform(0.7, 1, (1500, 1))
    elif kind == "rod":
        unit = unit * [1, *rng.uniform(0.15, 0.4, 2)]
    elif kind == "disc":
        unit = unit * [1, 1, rng.uniform(0.15, 0.45)]
    else:
        centres = directions(rng, int(rng.integers(3, 9))) * rng.uniform(0.2, 0.75)
        unit = centres[rng.integers(0, len(centres), 1500)] + 0.3 * unit
    unit = unit + rng.normal(0, 0.03, unit.shape)
    unit -= unit.mean(0)
    scale = diameter_angstrom / 2 / np.linalg.norm(unit, axis=1).max()
    return Molecule(unit * scale, rng.uniform(0.5, 1.5, len(unit)))


def molecule_of_map(density: Array, voxel_angstrom: float, n_atoms: int = 2000) -> Molecule:
    """Return pseudo-atoms drawn from a density (z, y, x) of `voxel_angstrom` Å, centred."""
    rng = np.random.default_rng(0)
    positive = np.clip(density - 0.1 * density.max(), 0, None).astype(np.float64).ravel()
    voxels = rng.choice(len(positive), n_atoms, p=positive / positive.sum())
    places = np.stack(np.unravel_index(voxels, density.shape), 1) + rng.uniform(0, 1, (n_atoms, 3))
    atoms = (places - places.mean(0)) * voxel_angstrom
    return Molecule(atoms, np.ones(n_atoms))


def _one_micrograph(
    rng: np.random.Generator,
    picks: int,
    box_px: int,
    molecules: Sequence[Molecule],
    ranges: Ranges,
) -> tuple[Array, Array]:
    """Return boxes (picks, box, box) and kinds (picks,)."""
    pixel_size = _log_uniform(rng, ranges.pixel_size_angstrom)
    diameter = rng.uniform(*ranges.size) * box_px * pixel_size
    molecule = random_shape(rng, diameter)
    if len(molecules) and rng.random() < 0.5:
        real = molecules[int(rng.integers(len(molecules)))]
        molecule = Molecule(real.atoms * diameter / real.diameter_angstrom, real.weights)
    molecule = replace(
        molecule,
        bend_degrees=float(rng.choice([0.0, rng.uniform(5, 40)])),
        views=np.stack([random_rotation(rng) for _ in range(3)]) if rng.random() < 0.3 else None,
    )
    ratio = rng.uniform(0.3, 0.55) if rng.random() < 0.7 else rng.uniform(1.5, 2)
    film, others = rng.random(2) < [0.3, 0.5]
    fraction = rng.uniform(*ranges.junk_fraction)
    kinds = draw_kinds(rng, picks, fraction, carbon=bool(film), others=bool(others))
    image, places = simulate_micrograph(
        rng,
        molecule,
        kinds,
        parameters=_random_ctf(rng, ranges),
        box_px=box_px,
        pixel_size_angstrom=pixel_size,
        snr=_mostly_high(rng, ranges.snr),
        field=Field(
            solvent_share=rng.uniform(0.1, 0.6),
            slow_ice_rms=_log_uniform(rng, (0.05, 0.4)),
            spacing=rng.uniform(0.85, 1.4),
            unpicked=rng.uniform(0.1, 0.8),
            jitter=rng.uniform(0.02, 0.08),
            other=random_shape(rng, ratio * diameter),
        ),
    )
    images = extract(image, places, box_px)
    for place in np.flatnonzero((kinds == "empty") & (rng.random(picks) < ARTEFACT_SHARE)):
        kinds[place] = rng.choice(ARTEFACTS)
        images[place] = _artefact(rng, images[place], kinds[place])
    return images, kinds


def _log_uniform(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(ends))))


def _mostly_high(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    low, high = np.log(ends)
    return float(np.exp(low + (high - low) * np.sqrt(rng.random())))


def _random_ctf(rng: np.random.Generator, ranges: Ranges) -> CtfParameters:
    defocus, astigmatism = rng.uniform(*ranges.defocus_angstrom), rng.uniform(0, 1000)
    phase_plate = rng.random() < 0.05
    return CtfParameters(
        defocus + astigmatism / 2,
        defocus - astigmatism / 2,
        rng.uniform(0, 180),
        voltage_kv=float(rng.choice([80, 120, 200, 300, 300])),
        cs_mm=float(rng.choice([0.01, 1.4, 2.0, 2.7, 2.7])),
        amplitude_contrast=0.95 if phase_plate else rng.uniform(0.07, 0.2),
        b_factor=rng.uniform(30, 300),
    )


def _artefact(rng: np.random.Generator, noise: Array, kind: str) -> Array:
    """Return an empty box (box, box) with something on it that no particle looks like."""
    box = len(noise)
    y, x = np.mgrid[:box, :box] - (box - 1) / 2
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    strength = np.exp(rng.uniform(np.log(0.5), np.log(6)))
    if kind == "blank":
        return np.asarray(0.05 * noise + strength * along / box, np.float32)
    if kind == "stripes":
        period = rng.uniform(2, 16)
        lines = np.sign(np.sin(2 * np.pi * (x if rng.random() < 0.5 else y) / period))
        return np.asarray(noise + 0.3 * strength * lines, np.float32)
    if kind == "border":
        inside = along < rng.uniform(-0.3, 0.45) * box
        outside = np.asarray(rng.uniform(-3, 3))
        if rng.random() < 0.5:  # rows of the last good pixels, as some programs pad
            outside = np.roll(noise, int(rng.integers(box)), 0)[:, :1] * rng.uniform(0.5, 2)
            inside = x < rng.uniform(0, 0.45) * box
        image = np.asarray(np.where(inside, noise, outside), np.float32)
        return np.asarray(np.rot90(image, int(rng.integers(4))))
    if kind == "gold":
        radius, cx, cy = rng.uniform(0.04, 0.3) * box, *rng.uniform(-0.3, 0.3, 2) * box
        return np.asarray(noise + 3 * strength * (np.hypot(x - cx, y - cy) < radius), np.float32)
    if kind == "lattice":
        period = rng.uniform(2.5, 10)
        waves = sum(
            np.cos(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / period)
            for a in angle + np.arange(3) * np.pi / 3
        )
        return np.asarray(noise + 0.3 * strength * waves, np.float32)
    spectrum = np.fft.rfft2(rng.normal(size=(box, box)))
    f = np.hypot(np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None])
    blotches = np.fft.irfft2(spectrum * np.exp(-((f * rng.uniform(4, 16)) ** 2)), (box, box))
    return np.asarray(noise + strength * blotches / blotches.std(), np.float32)


def degrade(rng: np.random.Generator, images: Array) -> Array:
    """Process all boxes (n, box, box) of a micrograph alike, as some programs and archives do."""
    box = images.shape[1]
    f = 2 * np.hypot(np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None])  # Nyquist is 1
    gain = np.ones_like(f)
    choice = rng.random()
    if choice < 0.35:  # another noise spectrum: detector MTF, dose weighting, binning
        gain *= np.exp(-rng.uniform(0, 2.5) * f ** rng.uniform(0.7, 2))
    elif choice < 0.5:  # denoised
        gain *= 1 / (1 + (f / rng.uniform(0.12, 0.5)) ** 6)
    elif choice < 0.6:  # flattened or high-passed
        gain *= 1 - 0.9 * np.exp(-((f * rng.uniform(8, 30)) ** 2))
    images = np.fft.irfft2(np.fft.rfft2(images) * gain, (box, box))
    if rng.random() < 0.2:  # down-sampled from a coarser image, or drifted
        shift = directions(rng, 1, 2)[0] * rng.uniform(0, 3)
        phase = np.exp(2j * np.pi * np.add.outer(
            np.fft.fftfreq(box) * shift[1], np.fft.rfftfreq(box) * shift[0]))  # fmt: skip
        images = (images + np.fft.irfft2(np.fft.rfft2(images) * phase, (box, box))) / 2
    if rng.random() < 0.3:  # 8-bit
        sigma = images.std()
        step = sigma / rng.uniform(4, 24)
        images = np.round(np.clip(images, -5 * sigma, 5 * sigma) / step) * step
    return np.asarray(images, np.float32)

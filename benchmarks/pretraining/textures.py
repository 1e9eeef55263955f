"""What is not biology: noise of all spectra, detectors, later processing, artefacts of boxes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy.ndimage import median_filter

from relion_cryofilter.simulate.micrograph import CtfParameters, ctf
from relion_cryofilter.simulate.specimen import Array, Rng, directions

ARTEFACTS = (
    "blank", "stripes", "border", "gold", "lattice", "texture", "grating", "edge", "ethane",
    "crystalline", "gradient",
)  # fmt: skip
DETECTORS = ("K3", "K2", "Falcon", "CCD", "film")


def frequencies(shape: tuple[int, ...]) -> Array:
    """Return spatial frequencies on the grid of rfft2 of (..., h, w), in units of Nyquist."""
    return np.asarray(
        2 * np.hypot(np.fft.fftfreq(shape[-2])[:, None], np.fft.rfftfreq(shape[-1])[None])
    )


def detector(rng: Rng, f: Array, name: str | None = None) -> tuple[Array, Array]:
    """Return what a detector does to amplitudes of the signal and of shot noise at `f`.

    `f` is in units of the images' Nyquist frequency; that of the detector is one to six times as
    far out, as boxes are binned. Rough fits to published curves: R. Ruskin et al., J. Struct.
    Biol. 184, 385 (2013); G. McMullan et al., Ultramicroscopy 147, 156 (2014).
    """
    name = name or str(rng.choice(DETECTORS))
    f = f / rng.choice([1.0, rng.uniform(1, 6)])
    if name in ("K2", "K3"):
        mtf = 1 - rng.uniform(0.1, 0.5) * np.minimum(f, 1) ** 1.5
        nps = 1 - rng.uniform(0, 0.3) * np.exp(-((f / 0.3) ** 2))  # coincidence loss
    elif name == "Falcon":
        mtf = np.exp(-rng.uniform(0.6, 1.6) * f)
        nps = mtf ** rng.uniform(0.5, 1)
    elif name == "CCD":
        mtf = 0.6 * np.exp(-rng.uniform(2, 5) * f) + 0.4 * np.exp(-rng.uniform(0.5, 1.5) * f)
        nps = np.hypot(mtf, rng.uniform(0.02, 0.3))
    else:
        mtf = np.exp(-rng.uniform(0.3, 1.2) * f)
        nps = np.sqrt(1 + rng.uniform(0, 0.3) / np.maximum(f, 0.03))
    return mtf, nps


def process(rng: Rng, images: Array) -> Array:
    """Process images (..., h, w) of zero mean alike, as some programs and archives do."""
    f = frequencies(images.shape)
    gain = np.ones_like(f)
    choice = rng.random()
    if choice < 0.2:  # another noise spectrum: dose weighting, interpolation
        gain *= np.exp(-rng.uniform(0, 2.5) * f ** rng.uniform(0.7, 2))
    elif choice < 0.32:  # denoised
        gain *= 1 / (1 + (f / rng.uniform(0.12, 0.5)) ** 6)
    elif choice < 0.42:  # flattened or high-passed
        gain *= 1 - 0.9 * np.exp(-((f * rng.uniform(8, 30)) ** 2))
    elif choice < 0.5:  # enlarged: nothing is left beyond some frequency
        gain *= f < rng.uniform(0.35, 0.95)
    elif choice < 0.56:  # binned by averaging
        sides = images.shape[-2:]
        gain *= np.sinc(np.fft.fftfreq(sides[0]))[:, None] * np.sinc(np.fft.rfftfreq(sides[1]))
    images = filtered(images, gain)
    if rng.random() < 0.15:  # drifted, or shifted by interpolation
        shift = directions(rng, 1, 2)[0] * rng.uniform(0, 3)
        phase = np.exp(2j * np.pi * np.add.outer(
            np.fft.fftfreq(images.shape[-2]) * shift[1],
            np.fft.rfftfreq(images.shape[-1]) * shift[0]))  # fmt: skip
        images = (images + filtered(images, phase)) / 2
    if rng.random() < 0.06:  # denoised by something that is not linear
        size = (1,) * (images.ndim - 2) + (3, 3)
        images = images + rng.uniform(0.5, 1) * (median_filter(images, size) - images)
    choice = rng.random()
    if choice < 0.2:  # 8-bit
        sigma = images.std()
        step = sigma / rng.uniform(4, 24)
        images = np.round(np.clip(images, -5 * sigma, 5 * sigma) / step) * step
    elif choice < 0.3:
        images = _as_jpeg(images, quality=int(rng.integers(30, 96)), reach=rng.uniform(2.5, 6))
    return np.asarray(images, np.float32)


def filtered(images: Array, gain: Array) -> Array:
    """Return images (..., h, w) with their rfft2 times `gain`."""
    return np.asarray(np.fft.irfft2(np.fft.rfft2(images) * gain, images.shape[-2:]))


def _as_jpeg(images: Array, quality: int, reach: float) -> Array:
    """Return images (..., h, w) as they come back from JPEG; `reach` σ are 0 and 255."""
    sigma = images.std() or 1.0
    flat = images.reshape(-1, images.shape[-1])  # one below the other
    grey = np.clip(np.round(128 + 127 / reach * flat / sigma), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "jpeg", quality=quality)
    back = np.asarray(Image.open(file), np.float64)
    return np.asarray(((back - 128) * reach / 127 * sigma).reshape(images.shape))


def pure_noise(rng: Rng, n: int, box_px: int) -> Array:
    """Return boxes (n, box, box) of noise of one spectrum: white, 1/f, CTF or a detector's."""
    f = frequencies((box_px, box_px))
    kind = rng.choice(["white", "power", "ctf", "detector", "slow"])
    gain = np.ones_like(f)
    if kind == "power":
        gain = np.maximum(f, 2 / box_px) ** -rng.uniform(0.2, 1.5)
    elif kind == "ctf":
        pixel_size = np.exp(rng.uniform(*np.log([1.8, 7.0])))
        gain = np.abs(ctf((box_px, box_px), pixel_size, random_ctf(rng)))
        gain = np.hypot(gain / np.sqrt((gain**2).mean()), rng.uniform(0.1, 2))
    elif kind == "detector":
        gain = detector(rng, f)[1]
    elif kind == "slow":
        gain = 1 + rng.uniform(1, 20) * np.exp(-((f * rng.uniform(4, 20)) ** 2))
    boxes = filtered(rng.normal(size=(n, box_px, box_px)), gain)
    boxes -= boxes.mean((1, 2), keepdims=True)
    return process(rng, boxes) if rng.random() < 0.6 else boxes.astype(np.float32)


def random_ctf(
    rng: Rng, defocus_angstrom: tuple[float, float] = (5000.0, 35000.0)
) -> CtfParameters:
    """Draw a CTF of the usual microscopes."""
    defocus, astigmatism = rng.uniform(*defocus_angstrom), rng.uniform(0, 1000)
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


def artefact(rng: Rng, noise: Array, kind: str) -> Array:
    """Return an empty box (box, box) with one of `ARTEFACTS` on it."""
    box = len(noise)
    y, x = np.mgrid[:box, :box] - (box - 1) / 2
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    strength = np.exp(rng.uniform(np.log(0.5), np.log(6)))
    if kind == "blank":
        image = 0.05 * noise + strength * along / box
    elif kind == "gradient":  # thick ice with few waves, or a slope
        bend = along + rng.uniform(-0.5, 0.5) / box * (x**2 + y**2)
        image = rng.uniform(0.2, 1) * noise + 4 * strength * bend / box
    elif kind == "stripes":
        period = rng.uniform(2, 16)
        lines = np.sign(np.sin(2 * np.pi * (x if rng.random() < 0.5 else y) / period))
        image = noise + 0.3 * strength * lines
    elif kind == "border":
        inside = along < rng.uniform(-0.3, 0.45) * box
        outside = np.asarray(rng.uniform(-3, 3))
        if rng.random() < 0.5:  # rows of the last good pixels, as some programs pad
            outside = np.roll(noise, int(rng.integers(box)), 0)[:, :1] * rng.uniform(0.5, 2)
            inside = x < rng.uniform(0, 0.45) * box
        image = np.rot90(np.where(inside, noise, outside), int(rng.integers(4)))
    elif kind == "edge":  # of a hole, ice or a contaminant, with a fringe
        radius = box * np.exp(rng.uniform(np.log(0.4), np.log(4)))
        across = y * np.cos(angle) - x * np.sin(angle)
        onto = (np.hypot(along - radius, across) - radius) * rng.choice([-1, 1])
        onto = onto + rng.uniform(-0.3, 0.3) * box
        covered = 1 / (1 + np.exp(-np.clip(onto / rng.uniform(0.3, 2), -30, 30)))
        fringe = np.exp(-((onto / rng.uniform(1, 4)) ** 2)) * rng.uniform(-1, 1)
        level = strength * rng.choice([-1, 1])
        image = noise * (1 + rng.uniform(-0.5, 1) * covered) + level * (covered + fringe)
    elif kind == "gold":
        image = noise.astype(np.float64)
        for _ in range(int(rng.integers(1, 5))):
            radius, cx, cy = rng.uniform(0.03, 0.3) * box, *rng.uniform(-0.4, 0.4, 2) * box
            far = np.hypot(x - cx, y - cy) - radius
            image += 3 * strength / (1 + np.exp(np.clip(far / rng.uniform(0.2, 1), -30, 30)))
            image -= strength * rng.uniform(0, 1) * np.exp(-(((far - 2) / 1.5) ** 2))
    elif kind == "lattice":
        period = rng.uniform(2.5, 10)
        waves = sum(
            np.cos(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / period)
            for a in angle + np.arange(3) * np.pi / 3
        )
        image = noise + 0.3 * strength * waves
    elif kind == "crystalline":  # spots on a ring
        gain = np.exp(-(((frequencies(noise.shape) - rng.uniform(0.25, 0.95)) / 0.06) ** 2))
        spots = gain * (rng.random(gain.shape) < 0.15)
        waves = filtered(rng.normal(size=noise.shape), spots)
        image = noise + strength * waves / max(waves.std(), 1e-6)
    else:  # lumps: of anything, of gold on carbon with its cracks, of ethane
        f = frequencies(noise.shape)
        lumps = filtered(rng.normal(size=noise.shape), np.exp(-((f * rng.uniform(2, 10)) ** 2)))
        lumps /= lumps.std()
        if kind == "grating":
            cracks = np.exp(-((lumps / rng.uniform(0.1, 0.4)) ** 2))
            grain = filtered(rng.normal(size=noise.shape), np.exp(-((2 * f) ** 2)))
            lumps = -rng.uniform(1, 3) * cracks + 0.7 * grain / grain.std()
        elif kind == "ethane":
            lumps = np.exp(rng.uniform(0.5, 1.5) * lumps) * rng.choice([-1, 1])
        image = noise + strength * lumps * rng.choice([1, 1, -1])
    return np.asarray(image, np.float32)

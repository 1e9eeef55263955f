"""From picks to a map with RELION's auto-refinement, and how good the map is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
from arms import MASK, relion
from classes import particles_of_one_stack
from picks import BOX, PICKS_STAR, Truth
from scipy.spatial.transform import Rotation

from relion_cryofilter.particles.particles import read_particles

FINAL = "run_class001.mrc"
START_ANGSTROM = 30
"""The true map, low-passed to this, is the start of all refinements."""
USUAL = (
    f"--ref truth.mrc --ini_high {START_ANGSTROM} --firstiter_cc --dont_combine_weights_via_disc "
    "--preread_images --pool 50 --pad 1 --ctf --flatten_solvent --zero_mask --oversampling 1 "
    "--offset_step 2 --maxsig 100 --sym C1 --norm --scale"
)
ALIGN = f"{USUAL} --iter 1 --healpix_order 2 --offset_range 3 --random_seed 1"
REFINE = (
    f"{USUAL} --auto_refine --split_random_halves --healpix_order 3 --auto_local_healpix_order 3 "
    f"--offset_range 2 --low_resol_join_halves {START_ANGSTROM}"
)
MPI = "mpirun --allow-run-as-root --oversubscribe --mca btl_vader_single_copy_mechanism none -n 3"


@dataclass(frozen=True)
class Map:
    """What came of an arm.

    `halves` and `true` are Fourier shell correlations (BOX // 2 + 1,): of the half maps, and of
    their mean with the truth; `error` is the median angle between found and true orientations of
    the true particles, degrees.
    """

    halves: np.ndarray
    true: np.ndarray
    error: float


def job_of(name: str, seed: int) -> str:
    """Return the folder of an arm's refinement, in the project; it is done if it holds `FINAL`."""
    return f"Refine3D/{re.sub('[^a-z0-9]+', '_', name.lower())}_{seed}"


def aligned(truth: Truth, project: Path, threads: int) -> Path:
    """Return the STAR file of all picks with their orientations by the low-passed true map.

    All orientations are searched here, once for all arms: it takes most of the time.
    """
    folder = project / "Align"
    found = folder / "run_it001_data.star"
    if not found.exists():
        folder.mkdir(exist_ok=True)
        relion(
            ["relion_refine", "--i", PICKS_STAR, "--o", "Align/run"],
            f"{ALIGN} --particle_diameter {MASK * truth.diameter:.0f} --j {threads}",
            project,
        )
    return found


def refined(
    name: str, kept: np.ndarray, truth: Truth, project: Path, seed: int, start: Path
) -> Map:
    """Return the map of the picks `kept` (n,), which is made where it is not there yet.

    `start` is the STAR file with the orientations that are refined.
    """
    job = job_of(name, seed)
    folder = project / job
    if not (folder / FINAL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        table = read_particles(start).table
        assert table is not None
        rows, _ = particles_of_one_stack(start)
        (folder / "particles.star").unlink(missing_ok=True)
        table.write({folder / "particles.star": kept[rows]})
        relion(
            [
                *MPI.split(),
                "relion_refine_mpi",
                "--i",
                f"{job}/particles.star",
                "--o",
                f"{job}/run",
            ],
            f"{REFINE} --particle_diameter {MASK * truth.diameter:.0f} --random_seed {seed} --j 1",
            project,
        )
    halves = [_read(folder / f"run_half{half}_class001_unfil.mrc") for half in (1, 2)]
    mask = _soft_sphere(MASK * truth.diameter / truth.pixel_size / 2)
    rows, table = particles_of_one_stack(folder / "run_data.star")
    found = rotations_of(table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy())
    turn = found * Rotation.from_matrix(truth.rotations[rows]).inv()
    angles = np.rad2deg(turn.magnitude())
    return Map(
        fsc(halves[0] * mask, halves[1] * mask),
        fsc((halves[0] + halves[1]) * mask, _read(project / "truth.mrc") * mask),
        float(np.median(angles[truth.good[rows]])),
    )


def rotations_of(angles_degrees: np.ndarray) -> Rotation:
    """Return the n rotations of RELION's rot, tilt and psi (n, 3): its ``Euler_angles2matrix``."""
    return Rotation.from_euler("ZYZ", angles_degrees, degrees=True).inv()


def _read(path: Path) -> np.ndarray:
    with mrcfile.open(path, permissive=True) as file:
        return np.asarray(file.data, np.float64)


def _soft_sphere(radius_px: float, edge_px: float = 4.0) -> np.ndarray:
    """Return (BOX, BOX, BOX): 1 inside, falling to 0 over the edge."""
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    outside = np.clip((np.sqrt(x**2 + y**2 + z**2) - radius_px) / edge_px, 0, 1)
    return np.asarray(0.5 + 0.5 * np.cos(np.pi * outside))


def fsc(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the Fourier shell correlation (side // 2 + 1,) of two maps (side, side, side)."""
    side = len(first)
    a, b = np.fft.fftn(first), np.fft.fftn(second)
    u = np.fft.fftfreq(side) * side
    shell = np.rint(np.sqrt(u[:, None, None] ** 2 + u[:, None] ** 2 + u**2)).astype(int).ravel()
    sums = [
        np.bincount(shell, part.ravel())[: side // 2 + 1]
        for part in ((a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2)
    ]
    return np.asarray(sums[0] / np.sqrt(sums[1] * sums[2] + 1e-30))


def resolution(curve: np.ndarray, limit: float, pixel_size: float) -> float:
    """Return where a curve first falls below a limit, Å; twice the pixel size if it never does."""
    below = np.flatnonzero(curve < limit)
    if not below.size:
        return 2 * pixel_size
    end = int(below[0])
    if not end:
        return float("inf")
    shell = end - (limit - curve[end]) / (curve[end - 1] - curve[end])
    return float(BOX * pixel_size / shell)

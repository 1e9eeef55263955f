"""Simulated picks of one molecule with known poses, as RELION reads them, and the true map."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import mrcfile
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quality"))

from sets import map_molecule

from relion_cryofilter.files import replacing, write_text
from relion_cryofilter.simulate import PARTICLE, Molecule
from relion_cryofilter.simulate.micrograph import (
    ATOM_SIGMA_ANGSTROM,
    Boxes,
    extracted_micrographs,
)
from relion_cryofilter.simulate.specimen import random_rotation

MOLECULE, BOX, SIZE, SNR, JUNK = "4v4r_30S", 64, 0.58, 0.03, 0.5
MICROGRAPHS, PICKS, SEED = 100, 84, 401
VIEWS, PREFERRED = 500, 0.3
"""Directions that particles are seen from; two of them have this share each."""
STACK = "Extract/job001/picks.mrcs"
OPTICS = ("OpticsGroupName", "OpticsGroup", "Voltage", "SphericalAberration", "AmplitudeContrast",
          "ImagePixelSize", "ImageSize", "ImageDimensionality")  # fmt: skip
LABELS = ("ImageName", "MicrographName", "CoordinateX", "CoordinateY", "DefocusU", "DefocusV",
          "DefocusAngle", "OpticsGroup")  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What is known of n picks: `kinds`, `micrographs` (n,), `rotations` (n, 3, 3), Å/px."""

    kinds: np.ndarray
    micrographs: np.ndarray
    rotations: np.ndarray
    pixel_size: float
    diameter: float

    @property
    def good(self) -> np.ndarray:
        """(n,) True for whole, centred particles."""
        return np.asarray(self.kinds == PARTICLE)


def molecule_with_views(maps: Path) -> Molecule:
    """Return the molecule, in views of which two are preferred."""
    rng = np.random.default_rng(SEED)
    few = round(PREFERRED * VIEWS)
    views = [random_rotation(rng) for _ in range(VIEWS - 2 * few + 2)]
    return replace(
        map_molecule(maps / f"{MOLECULE}.mrc"),
        views=np.array([views[0]] * few + [views[1]] * few + views[2:]),
    )


def picks(maps: Path, project: Path) -> Truth:
    """Return the truth of the picks in `project`, which are made where they are not yet there."""
    table, molecule = project / "truth.npz", molecule_with_views(maps)
    pixel_size = molecule.diameter_angstrom / (SIZE * BOX)
    if not table.exists():
        (project / STACK).parent.mkdir(parents=True, exist_ok=True)
        images, kinds, rotations, rows = [], [], [], []
        made = extracted_micrographs(
            np.random.default_rng(SEED), [molecule], [PICKS] * MICROGRAPHS,
            Boxes(BOX, pixel_size, JUNK), SNR,
        )  # fmt: skip
        for number, (boxes, found, optics) in enumerate(made):
            assert found.rotation is not None
            for x, y in zip(found.x, found.y):
                rows.append(
                    f"{len(rows) + 1:06d}@{STACK} mic{number:03d}.mrc {x:.2f} {y:.2f} "
                    f"{optics.defocus_u_angstrom:.1f} {optics.defocus_v_angstrom:.1f} "
                    f"{optics.defocus_angle_degrees:.2f} 1\n"
                )
            images.append(boxes)
            kinds.append(found.kind)
            rotations.append(found.rotation)
        mrcfile.write(
            project / STACK, np.concatenate(images), overwrite=True, voxel_size=pixel_size
        )
        head = _loop("optics", OPTICS) + f"opticsGroup1 1 300 2.7 0.1 {pixel_size:.5f} {BOX} 2\n\n"
        write_text(
            project / "Extract/job001/particles.star",
            head + _loop("particles", LABELS) + "".join(rows) + "\n",
        )
        write_map(project / "truth.mrc", molecule, pixel_size)
        with replacing(table) as file:
            np.savez(
                file, kinds=np.concatenate(kinds), rotations=np.concatenate(rotations),
                micrographs=np.repeat(np.arange(MICROGRAPHS), PICKS),
            )  # fmt: skip
    facts = np.load(table)
    return Truth(
        facts["kinds"], facts["micrographs"], facts["rotations"], pixel_size,
        molecule.diameter_angstrom,
    )  # fmt: skip


def _loop(block: str, labels: tuple[str, ...]) -> str:
    return f"data_{block}\n\nloop_\n" + "".join(f"_rln{label}\n" for label in labels)


def write_map(path: Path, molecule: Molecule, pixel_size: float) -> None:
    """Write the density (BOX, BOX, BOX), z, y, x, of the molecule as it stands: trilinear, blurred.

    The point (0, 0, 0) is voxel BOX // 2, as in RELION.
    """
    grid = np.zeros((BOX,) * 3)
    places = molecule.atoms[:, ::-1] / pixel_size + BOX // 2
    low = np.floor(places).astype(np.int64)
    part = places - low
    for corner in np.ndindex(2, 2, 2):
        weights = np.prod(np.where(corner, part, 1 - part), axis=1) * molecule.weights
        np.add.at(grid, tuple((low + corner).T), weights)
    u = np.fft.fftfreq(BOX, pixel_size)
    squared = u[:, None, None] ** 2 + u[:, None] ** 2 + u**2
    blur = np.exp(-2 * (np.pi * ATOM_SIGMA_ANGSTROM) ** 2 * squared)
    blurred = np.fft.ifftn(np.fft.fftn(grid) * blur).real
    mrcfile.write(path, blurred.astype(np.float32), overwrite=True, voxel_size=pixel_size)


def euler_angles(rotations: np.ndarray) -> np.ndarray:
    """Return RELION's rot, tilt and psi (n, 3), degrees, of rotations (n, 3, 3).

    The inverse of ``Euler_angles2matrix`` of src/euler.cpp: a point p of the map is seen at the
    first two coordinates of R p.
    """
    tilt = np.arccos(np.clip(rotations[:, 2, 2], -1, 1))
    rot = np.arctan2(rotations[:, 2, 1], rotations[:, 2, 0])
    psi = np.arctan2(rotations[:, 1, 2], -rotations[:, 0, 2])
    return np.rad2deg(np.stack([rot, tilt, psi], axis=1))


def rotation_matrices(angles_degrees: np.ndarray) -> np.ndarray:
    """Return rotations (n, 3, 3) of RELION's rot, tilt and psi (n, 3)."""
    (ca, cb, cg), (sa, sb, sg) = (f(np.deg2rad(angles_degrees)).T for f in (np.cos, np.sin))
    rows = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    return np.moveaxis(np.array(rows), -1, 0)

"""Simulated picks of one molecule with known poses, as RELION reads them, and the true map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mrcfile
import numpy as np
from classes import particles_star
from sets import map_molecule

from relion_cryofilter.files import replacing, write_text
from relion_cryofilter.simulate import PARTICLE, Molecule
from relion_cryofilter.simulate.micrograph import (
    ATOM_SIGMA_ANGSTROM,
    Boxes,
    extracted_micrographs,
)
from relion_cryofilter.simulate.specimen import random_rotation

MOLECULE, BOX, SIZE, SNR, JUNK = "4v4r_30S", 64, 0.58, 0.1, 0.5
MICROGRAPHS, PICKS, SEED = 100, 84, 401
VIEWS, PREFERRED = 500, 0.3
"""Directions that particles are seen from; two of them have this share each."""
STACK, PICKS_STAR = "Extract/job001/picks.mrcs", "Extract/job001/particles.star"


@dataclass(frozen=True)
class Truth:
    """What is known of n picks: `kinds`, `micrographs` (n,), `rotations` (n, 3, 3), Å/px, Å.

    A point p of the map is seen at the first two coordinates of R p, as RELION has it.
    """

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
        made = extracted_micrographs(
            np.random.default_rng(SEED), [molecule], [PICKS] * MICROGRAPHS,
            Boxes(BOX, pixel_size, JUNK), SNR,
        )  # fmt: skip
        images, found, optics = zip(*made)
        mrcfile.write(
            project / STACK, np.concatenate(images), overwrite=True, voxel_size=pixel_size
        )
        micrographs = np.repeat(np.arange(MICROGRAPHS), PICKS)
        names = [f"mic{number:03d}.mrc" for number in micrographs.tolist()]
        defoci = [[p.defocus_u_angstrom, p.defocus_v_angstrom, p.defocus_angle_degrees]
                  for p in optics]  # fmt: skip
        write_text(
            project / PICKS_STAR,
            particles_star(STACK, names, np.repeat(defoci, PICKS, axis=0), pixel_size, BOX),
        )
        write_map(project / "truth.mrc", molecule, pixel_size)
        with replacing(table) as file:
            np.savez(
                file, kinds=np.concatenate([part.kind for part in found]),
                rotations=np.concatenate([part.rotation for part in found]),
                micrographs=micrographs,
            )  # fmt: skip
    facts = np.load(table)
    return Truth(
        facts["kinds"], facts["micrographs"], facts["rotations"], pixel_size,
        molecule.diameter_angstrom,
    )  # fmt: skip


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

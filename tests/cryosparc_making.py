"""CryoSPARC files that tests make for themselves, from STAR projects."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np

from relion_cryofilter.data.particles import ParticleSet, read_particles


def particles_of(star: Path, sign: float = 1.0, seed: int = 0) -> dict[str, list]:
    """Return the fields of a .cs file that names the same images as a STAR file, row by row."""
    particles = read_particles(star)
    n, group = len(particles), particles.optics[0]
    names = [f">{particles.stack_names[stack]}" for stack in particles.stack_of]
    mics = [particles.micrographs[number] for number in particles.micrograph_of]
    rng = np.random.default_rng(seed)
    return {
        "uid": rng.integers(1, 2**64, n, np.uint64),
        "blob/path": names,
        "blob/idx": particles.index.astype(np.uint32),
        "blob/shape": np.full((n, 2), group.box_px, np.uint32),
        "blob/psize_A": np.full(n, group.pixel_size_angstrom, np.float32),
        "blob/sign": np.full(n, sign, np.float32),
        "ctf/df1_A": rng.normal(15000, 100, n).astype(np.float32),
        "alignments2D/shift": rng.normal(size=(n, 2)).astype(np.float32),
        "alignments2D/class": rng.integers(0, 4, n).astype(np.uint32),
        "location/micrograph_path": mics,
    }


def write_cs(path: Path, fields: dict, *, compressed: bool = False) -> Path:
    """Write fields as a .cs file."""
    from cryosparc.dataset import CSDAT_FORMAT, NUMPY_FORMAT, Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = CSDAT_FORMAT if compressed else NUMPY_FORMAT
    Dataset(dict(fields)).save(path, format=kind)
    return path


def part(fields: dict, *slots: str) -> dict:
    """Return the uid and the fields of some slots."""
    return {k: v for k, v in fields.items() if k == "uid" or k.partition("/")[0] in slots}


def turn_over(particles: ParticleSet) -> None:
    """Make protein dark in all stacks, as in micrographs."""
    for path in particles.stacks:
        with mrcfile.open(path, "r+") as stack:
            stack.data[:] = -stack.data


GROUP = """created: 2024-02-13 17:39:07.660886
group:
  description: All particles that were processed
  name: particles
  title: All particles
  type: particle
results:
  alignments2D:
    metafile: '>particles_selected.cs'
    num_items: {n}
    type: particle.alignments2D
  blob:
    metafile: '>particles_selected.cs'
    num_items: {n}
    type: particle.blob
  location:
    metafile: '>P3_J12_passthrough_particles_selected.cs'
    num_items: {n}
    type: particle.location
version: v4.4.1
"""

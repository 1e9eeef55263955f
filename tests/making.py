"""Small inputs that tests make for themselves: MRC stacks, STAR files, models, projects."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.preprocess import FourierCrop

MODE_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


def write_stack(
    path: Path,
    images: np.ndarray,
    *,
    mode: int = 2,
    order: str = "<",
    extended: int = 0,
    volume: bool = False,
    stamp: bool = True,
    pixel_size: float = 0.0,
) -> None:
    """Write (n, ny, nx) images as an MRC file, header byte by byte (MRC2014)."""
    n, ny, nx = images.shape
    header = bytearray(1024)
    struct.pack_into(order + "10i", header, 0, nx, ny, n, mode, 0, 0, 0, nx, ny, n if volume else 1)
    struct.pack_into(order + "3f", header, 40, nx * pixel_size, ny * pixel_size, pixel_size)
    struct.pack_into(order + "3i", header, 64, 1, 2, 3)
    struct.pack_into(order + "2i", header, 88, 1 if volume else 0, extended)
    if stamp:
        header[208:212] = b"MAP "
        header[212:214] = b"\x44\x44" if order == "<" else b"\x11\x11"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = images.astype(order + MODE_TYPES[mode]).tobytes()
    path.write_bytes(bytes(header) + b"\xee" * extended + body)


def blobs(n: int, box: int, seed: int = 0) -> np.ndarray:
    """Return (n, box, box) float32 images: noise and a blob of varying strength."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:box, :box] - (box - 1) / 2
    blob = np.exp(-(x**2 + y**2) / (0.1 * box**2))
    strength = np.linspace(0, 3, n)[:, None, None]
    return (rng.normal(size=(n, box, box)) + strength * blob).astype(np.float32)


def tiny_model(seed: int = 0, dim: int = 28, **options: object) -> Model:
    """Return an untrained small network whose scores lie on both sides of 0.5."""
    torch.manual_seed(seed)
    network = build_network("straight", f=4, dim=dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        small = FourierCrop(dim)(torch.from_numpy(blobs(64, 32)))
        network.head.bias -= network(small).median()
    return Model(network, FourierCrop(dim), threshold=0.5, **options)  # type: ignore[arg-type]


STAR_HEAD = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnImagePixelSize #3
_rlnImageSize #4
_rlnImageDimensionality #5
_rlnVoltage #6
_rlnSphericalAberration #7
_rlnAmplitudeContrast #8
_rlnMicrographOriginalPixelSize #9
{optics}

# version 30001

data_particles

loop_
_rlnCoordinateX #1
_rlnImageName #2
_rlnMicrographName #3
_rlnOpticsGroup #4
_rlnDefocusU #5
_rlnDefocusV #6
_rlnDefocusAngle #7
"""


def write_project(
    root: Path,
    *,
    boxes: Sequence[int] = (32,),
    n_micrographs: int = 4,
    per_micrograph: int = 12,
    mode: int = 2,
    seed: int = 0,
) -> Path:
    """Make a RELION project of stacks in optics groups of different boxes, rows interleaved."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n_micrographs):
        group = number % len(boxes)
        stack = f"Extract/job001/Mics/mic{number}.mrcs"
        images = blobs(per_micrograph, boxes[group], seed + number)
        write_stack(root / stack, images, mode=mode)
        rows += [
            f"{rng.uniform(0, 4000):12.6f} {image + 1:06d}@{stack} Mics/mic{number}.mrc "
            f"{group + 1:12d} 15000.000000 15000.000000     0.000000 \n"
            for image in range(per_micrograph)
        ]
    optics = "\n".join(
        f"opticsGroup{i + 1} {i + 1} {3.0 * 32 / box:.6f} {box} 2 300 2.7 0.1 1.5"
        for i, box in enumerate(boxes)
    )
    text = STAR_HEAD.format(optics=optics) + "".join(rng.permutation(rows)) + " \n"
    star = root / "Extract/job001/particles.star"
    star.write_text(text)
    (root / "default_pipeline.star").write_text(
        "\n# version 30001\n\ndata_pipeline_general\n\n_rlnPipeLineJobCounter 2\n \n"
    )
    return star


def command_line(folder: Path) -> dict[str, str]:
    """Return an environment whose `python` and `relion_cryofilter` are those of this checkout."""
    folder.mkdir(parents=True)
    root = Path(__file__).resolve().parents[1]
    for name, words in {"python": "", "relion_cryofilter": "-m relion_cryofilter "}.items():
        script = folder / name
        command = f'PYTHONPATH="{root}" exec "{sys.executable}" {words}"$@"'
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path}

"""Simulated picks with the classes that RELION's own 2D classification gives them.

    python benchmarks/quality/classes.py --maps FOLDER --work FOLDER [--j 1]

Simulates each set (particles, junk of all kinds and, for 8 % of the picks, a second molecule),
shrinks it to 48 px, classifies it with RELION 3.1.3's `relion_refine` (about 15 minutes of one
core) and keeps the last `_data.star`, gzipped, in benchmarks/quality/classes. The images are made
again from the seed wherever they are wanted.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import mrcfile
import numpy as np
import pandas as pd
import starfile
from sets import LabelledImages, map_molecule, read_set, write_set

from relion_cryofilter.simulate.micrograph import (
    CtfParameters,
    Field,
    extract,
    simulate_micrograph,
)
from relion_cryofilter.simulate.specimen import draw_kinds

CLASSIFIED = {
    # name: SNR, seed
    "classified 1u6g, SNR 0.05": (0.05, 201),
    "classified 1u6g, SNR 0.02": (0.02, 202),
    "classified 1u6g, SNR 0.008": (0.008, 203),
}
MOLECULE, SECOND, SIZE, BOX, SMALL = "1u6g", "5gjv", 0.44, 192, 48
MICROGRAPHS, PICKS, SECOND_SHARE = 48, 84, 0.08
MASK = 1.35  # mask diameter / particle diameter
KEPT = Path(__file__).resolve().parent / "classes"
CLASSES, ITERATIONS = 16, 14
CLASSIFY = (
    "--oversampling 0 --psi_step 15 --offset_range 2 --offset_step 1 --ctf --preread_images "
    "--pool 100 --dont_combine_weights_via_disc --norm --scale --zero_mask --flatten_solvent "
    "--tau2_fudge 2 --random_seed 1"
)


def classified_sets(maps: Path, work: Path) -> list[LabelledImages]:
    """Return the simulated sets that have been classified, made where they are not yet there."""
    return [
        replace(_simulated(name, maps, work), further=_simulated(name, maps, work, further=True))
        for name in CLASSIFIED
        if _kept(name).exists()
    ]


def class_numbers(data: LabelledImages) -> np.ndarray:
    """Return (n,) the class of each image of a set, 1 to 16."""
    with gzip.open(_kept(data.name)) as file, NamedTemporaryFile(suffix=".star") as star:
        shutil.copyfileobj(file, star)
        star.flush()
        rows, table = particles_of_one_stack(Path(star.name))
    classes = np.zeros(len(data.good), np.int64)
    classes[rows] = table["rlnClassNumber"]
    return classes


def particles_of_one_stack(star: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Return a RELION file's particles, and which image of their stack each is, 0-based."""
    table = starfile.read(star)["particles"]
    return table["rlnImageName"].str.partition("@")[0].astype(int).to_numpy() - 1, table


def particles_star(
    stack: str, micrographs: Sequence[str], defoci: np.ndarray, pixel_size: float, box: int
) -> str:
    """Return a RELION 3.1 file of the n images of one stack; `defoci` (n, 3) are u, v and angle."""
    optics = "data_optics\n\nloop_\n" + "".join(
        f"_rln{label}\n"
        for label in ("OpticsGroupName", "OpticsGroup", "Voltage", "SphericalAberration",
                      "AmplitudeContrast", "ImagePixelSize", "ImageSize", "ImageDimensionality")
    ) + f"opticsGroup1 1 300 2.7 0.1 {pixel_size:.5f} {box} 2\n"  # fmt: skip
    labels = ("ImageName", "MicrographName", "DefocusU", "DefocusV", "DefocusAngle", "OpticsGroup")
    head = "\n\ndata_particles\n\nloop_\n" + "".join(f"_rln{label}\n" for label in labels)
    rows = "".join(
        f"{row + 1:06d}@{stack} {name} {du:.1f} {dv:.1f} {angle:.2f} 1\n"
        for row, (name, (du, dv, angle)) in enumerate(zip(micrographs, defoci))
    )
    return optics + head + rows + "\n"


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Return images (n, side, side) shrunk in Fourier space, background of mean 0 and sigma 1."""
    v, u = np.indices((side, side)) - side // 2
    outside, shift = np.hypot(u, v) > 0.75 * side / 2, (images.shape[1] - side) // 2
    small = np.empty((len(images), side, side), np.float32)
    for row, image in enumerate(images):
        whole = np.fft.fftshift(np.fft.fft2(image))[shift : shift + side, shift : shift + side]
        part = np.fft.ifft2(np.fft.ifftshift(whole)).real
        small[row] = (part - part[outside].mean()) / part[outside].std()
    return small


def mostly_good(classes: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Return (k + 1,) True for classes, 0 to k, that hold more particles than junk."""
    return np.asarray(np.bincount(classes, good) > np.bincount(classes) / 2)


def class_labels(data: LabelledImages, mistake: bool = False) -> np.ndarray:
    """Return (n,) True in classes that hold more particles than junk.

    With a `mistake`, also in the class that has most of the second molecule.
    """
    classes = class_numbers(data)
    kept = mostly_good(classes, data.good)
    if mistake:
        kept[np.where(kept, 0, np.bincount(classes, data.kinds == "other")).argmax()] = True
    return np.asarray(kept[classes])


def _kept(name: str) -> Path:
    return KEPT / f"{name.replace(' ', '_').replace(',', '')}_data.star.gz"


def _simulated(name: str, maps: Path, work: Path, further: bool = False) -> LabelledImages:
    """Return the set, or more images like it, made once."""
    snr, seed = CLASSIFIED[name]
    seed += 1000 * further
    stem = work / "sets" / (name.replace(" ", "_").replace(",", "") + "_further" * further)
    stack, table = stem.with_name(stem.name + ".mrcs"), stem.with_name(stem.name + ".npz")
    if not table.exists():
        molecule, second = (map_molecule(maps / f"{each}.mrc") for each in (MOLECULE, SECOND))
        pixel_size = molecule.diameter_angstrom / (SIZE * BOX)
        field = Field(slow_ice_rms=Field.slow_ice_rms * 64 / BOX, other=second)
        rng, images, kinds, defoci = np.random.default_rng(seed), [], [], []
        for number in range(MICROGRAPHS):
            defocus, astigmatism, angle = rng.uniform([8000, 0, 0], [22000, 400, 180])
            optics = CtfParameters(defocus + astigmatism / 2, defocus - astigmatism / 2, angle)
            kind = draw_kinds(rng, PICKS, 0.5, carbon=number % 3 == 1)
            kind[rng.permutation(PICKS)[: round(SECOND_SHARE * PICKS)]] = "other"
            image, picks = simulate_micrograph(
                rng, molecule, kind, optics, BOX, pixel_size, snr, field
            )
            images.append(extract(image, picks, BOX))
            kinds.append(picks.kind)
            defoci += [(optics.defocus_u_angstrom, optics.defocus_v_angstrom, angle)] * PICKS
        micrographs = np.repeat(np.arange(MICROGRAPHS), PICKS)
        write_set(
            stack, table, np.concatenate(images), kinds=np.concatenate(kinds),
            micrographs=micrographs, defoci=np.array(defoci), pixel_size=pixel_size,
        )  # fmt: skip
    return read_set(name, stack)


def classify(name: str, maps: Path, work: Path, threads: int) -> None:
    """Classify a set with RELION in ``work/classification``, unless that has been done."""
    if _kept(name).exists():
        return
    data = _simulated(name, maps, work)
    facts = np.load(data.stack.with_suffix(".npz"))
    pixel_size = float(facts["pixel_size"]) * BOX / SMALL
    folder = work / "classification" / data.stack.stem
    folder.mkdir(parents=True, exist_ok=True)

    small = shrunk(data.images(np.arange(len(data.good))), SMALL)
    mrcfile.write(folder / "small.mrcs", small, overwrite=True, voxel_size=pixel_size)
    (folder / "particles.star").write_text(
        particles_star("small.mrcs", data.micrographs, facts["defoci"], pixel_size, SMALL)
    )
    mask = MASK * SIZE * BOX * float(facts["pixel_size"])
    command = ["relion_refine", "--i", "particles.star", "--o", "./run", *CLASSIFY.split()]
    command += ["--K", str(CLASSES), "--iter", str(ITERATIONS)]
    command += ["--particle_diameter", f"{mask:.0f}", "--j", str(threads)]
    with (folder / "run.out").open("w") as out:
        subprocess.run(command, cwd=folder, check=True, stdout=out, stderr=subprocess.STDOUT)
    KEPT.mkdir(exist_ok=True)
    kept = _kept(name)
    last = max(folder.glob("run_it*_data.star"))
    with last.open("rb") as source, gzip.GzipFile(kept.with_suffix(".part"), "wb", 9) as file:
        shutil.copyfileobj(source, file)
    kept.with_suffix(".part").rename(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--j", type=int, default=1)
    asked = parser.parse_args()
    for each in CLASSIFIED:
        classify(each, asked.maps, asked.work, asked.j)
        print(f"{each}: {_kept(each)}", flush=True)

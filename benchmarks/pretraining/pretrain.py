"""Pre-train the bundled network on simulated images of great variety.

    python benchmarks/pretraining/pretrain.py --maps FOLDER --work FOLDER

--maps holds densities (.mrc) of real molecules; half of the micrographs show one of them, the
others random shapes. --work keeps the simulated images (made by several processes, 1.4 GB) and
the checkpoint, so a stopped run goes on. It takes about an hour on two cores; --gpu 0 trains on a
GPU. The result is relion_cryofilter/models/default.safetensors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from variety import degrade, molecule_of_map, simulate_varied

from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.images.small_images import InMemory
from relion_cryofilter.kinds import ThresholdRequest, gpu_numbers
from relion_cryofilter.nn.model import BUNDLED_MODEL, CURVE, Model
from relion_cryofilter.nn.networks import build_network, choose_devices
from relion_cryofilter.nn.three_parts import calibrated, fit_temperature
from relion_cryofilter.nn.trainer import Settings, Trainer, TrainingData, predict
from relion_cryofilter.particles.splits import Split
from relion_cryofilter.processes import versions
from relion_cryofilter.progress import Progress
from relion_cryofilter.thresholds import OperatingCurve

DIM = 48
BATCHES = ((1, 4000, 40, 20), (2, 4000, 30, 50))
"""Seed, micrographs, picks on each, micrographs a file."""

NOISE_MICROGRAPHS, NOISE_PICKS = 400, 40
"""Boxes of noise alone, which are bad, whatever their spectrum."""

HELD_OUT = ("1u6g", "4v4r_30S", "5gjv")
"""Maps that stay unseen, so that the benchmarks can test on them."""


def make_chunk(job: tuple[int, range, int, list, Path]) -> None:
    """Simulate micrographs of some numbers and keep their small images."""
    seed, numbers, picks, molecules, path = job
    if path.exists():
        return
    torch.set_num_threads(1)
    made = simulate_varied(seed, numbers, picks=picks, molecules=molecules)
    small = FourierCrop(DIM)(torch.from_numpy(made.images)).half().numpy()
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez(file, small=small, labels=made.labels, kinds=made.kinds, mics=made.micrographs)
    temporary.replace(path)


def simulate(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Simulate (or find) all micrographs."""
    molecules = []
    for path in sorted(options.maps.glob("*.mrc")):
        if path.stem not in HELD_OUT:
            with mrcfile.open(path, permissive=True) as file:
                molecules.append(molecule_of_map(file.data, float(file.voxel_size.x) or 3.0))
    options.work.mkdir(parents=True, exist_ok=True)
    jobs = [
        (seed, range(first, first + step), picks, molecules,
         options.work / f"{seed}_{first:06d}.npz")
        for seed, count, picks, step in BATCHES
        for first in range(0, count, step)
    ]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(options.j) as pool:
        for done, _ in enumerate(pool.imap_unordered(make_chunk, jobs), 1):
            if done % 20 == 0:
                print(f"simulated {done} of {len(jobs)} files", flush=True)
    parts = [np.load(path) for *_, path in jobs]
    data = [{**part, "mics": part["mics"] + 1_000_000 * job[0]} for part, job in zip(parts, jobs)]
    data.append(make_noise())
    names = ("small", "labels", "kinds", "mics")
    return {name: np.concatenate([part[name] for part in data]) for name in names}


def make_noise() -> dict[str, np.ndarray]:
    """Make boxes of noise, a spectrum for each micrograph."""
    small = []
    for number in range(NOISE_MICROGRAPHS):
        rng = np.random.default_rng([0, number])
        boxes = rng.normal(size=(NOISE_PICKS, 64, 64)).astype(np.float32)
        boxes = degrade(rng, boxes) if number % 2 else boxes
        small.append(FourierCrop(DIM)(torch.from_numpy(boxes)).half().numpy())
    n = NOISE_MICROGRAPHS * NOISE_PICKS
    return {
        "small": np.concatenate(small), "labels": np.zeros(n, int), "kinds": np.full(n, "noise"),
        "mics": np.repeat(np.arange(NOISE_MICROGRAPHS), NOISE_PICKS),
    }  # fmt: skip


def main() -> None:
    """Simulate, train, calibrate, write the model file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--widths", type=int, nargs=3, default=(4, 8, 16))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--j", type=int, default=os.cpu_count())
    parser.add_argument("--gpu", help="0 trains on the first GPU.")
    parser.add_argument("--out", type=Path, default=BUNDLED_MODEL)
    options = parser.parse_args()
    start = time.monotonic()
    data = simulate(options)
    labels, groups = data["labels"].astype(bool), data["mics"]
    validation = np.flatnonzero(groups % 10 == 0)
    training = np.flatnonzero(groups % 10 != 0)
    split = Split(training, validation, validation, "micrograph", groups, "micrograph")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.j)
    network = build_network("d4", widths=list(options.widths), dim=DIM)
    settings = Settings(
        epochs=options.epochs, patience=options.epochs, learning_rate=options.learning_rate,
        augmentation=False, seed=options.seed,
    )  # fmt: skip
    trainer = Trainer(
        network, TrainingData(InMemory(torch.from_numpy(data["small"])), labels, split), settings,
        options.work / "checkpoint.pt", {"widths": list(options.widths), "n": len(labels)},
        choose_devices(gpu_numbers(options.gpu))[0],
    )  # fmt: skip
    for epoch in trainer.run(Progress(options.epochs * len(training), "image steps")):
        print(epoch, flush=True)
    logits = predict(network, trainer.images, validation).numpy().astype(np.float64)
    truth, kinds = labels[validation], data["kinds"][validation]
    temperature = fit_temperature(logits, truth)
    scores = calibrated(logits, temperature)
    curve = OperatingCurve.from_scores(truth, scores, groups[validation])
    by_kind = {
        str(kind): round(float(roc_auc_score(truth[rows], scores[rows])), 3)
        for kind in sorted(set(kinds) - {"particle"})
        for rows in [(kinds == kind) | truth]
    }
    provenance = {
        "made_by": "benchmarks/pretraining/pretrain.py",
        "data": f"{len(labels)} simulated images of {len(set(groups))} micrographs",
        "settings": {"seed": options.seed, "epochs": options.epochs,
                     "learning_rate": options.learning_rate},
        "validation": {"auc": round(float(roc_auc_score(truth, scores)), 4), "by_kind": by_kind,
                       "n": len(truth), "micrographs": len(set(groups[validation]))},
        "seconds": round(time.monotonic() - start),
        CURVE: curve.to_dict(),
        "versions": versions(),
    }  # fmt: skip
    threshold = curve.threshold(ThresholdRequest("recall", 0.95))
    model = Model(network, FourierCrop(DIM), threshold, temperature, provenance)
    model.save(options.out)
    print(f"wrote {options.out}: threshold {threshold}, {provenance['validation']}")


if __name__ == "__main__":
    main()

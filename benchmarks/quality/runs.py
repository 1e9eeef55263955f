"""One run: train on part of a set with one recipe, score the micrographs kept for the test."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from linear import LINEAR, fit_linear
from sets import LabelledImages

from relion_cryofilter.commands.train import train
from relion_cryofilter.images.small_images import noise_images
from relion_cryofilter.nn.model import BUNDLED_MODEL, Model, load_model
from relion_cryofilter.options import TrainOptions

TEST_SHARE = 0.3
LABELS = (300, 1000, None)
LABEL_NOISE = 0.1
ROBERTS, STRAIGHT = "2020 roberts", "2020 straight"
SCRATCH, FINE_TUNED, NO_LABELS = "default, from scratch", "default", "default, no labels"
TRAINED = {
    ROBERTS: {"model": "roberts"},
    STRAIGHT: {"model": "straight"},
    SCRATCH: {"model": "d4"},
    FINE_TUNED: {},
}
N_NOISE = 1000


@dataclass(frozen=True)
class Run:
    """What is trained on what; `labels` is None for all, `noise` the share of wrong labels."""

    model: str
    labels: int | None
    seed: int
    noise: float

    @property
    def stem(self) -> str:
        """A file name."""
        name = self.model.replace(",", "").replace(" ", "_")
        return f"{name}-{self.labels or 'all'}-{self.seed}-{self.noise:g}"


def runs_of(data: LabelledImages, seeds: int) -> list[Run]:
    """Return all runs on a set, those that the bars need first."""
    noise = LABEL_NOISE if data.simulated else 0.0
    needed = [(NO_LABELS, 0, 0.0), (ROBERTS, None, noise)]
    needed += [(FINE_TUNED, labels, noise) for labels in LABELS]
    if data.simulated:
        needed += [(FINE_TUNED, None, 0.0), (FINE_TUNED, None, 0.3)]
    for model in (*LINEAR, SCRATCH, STRAIGHT, ROBERTS):
        needed += [(model, labels, noise) for labels in reversed(LABELS)]
    return [
        Run(model, labels, seed, share)
        for model, labels, share in dict.fromkeys(needed)
        for seed in range(seeds)
    ]


def test_part(data: LabelledImages, seed: int) -> np.ndarray:
    """Return (n,) True in whole micrographs kept for the test, with a fair share of both kinds."""
    names, of = np.unique(data.micrographs, return_inverse=True)
    rng = np.random.default_rng([seed, 5])
    count = max(2, round(TEST_SHARE * len(names)))
    best, least = np.zeros(len(of), bool), np.inf
    for _ in range(100):
        inside = np.isin(of, rng.permutation(len(names))[:count])
        shares = [inside[data.good].mean(), inside[~data.good].mean()]
        off = max(abs(share - TEST_SHARE) for share in shares)
        if off < least:
            best, least = inside, off
    return best


def do(data: LabelledImages, run: Run, work: Path) -> None:
    """Train, score and write STEM.json and STEM.npz (rows, scores), unless they are there."""
    folder = work / "runs" / data.stack.stem
    result = folder / f"{run.stem}.json"
    if result.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("relion_cryofilter").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    held = test_part(data, run.seed)
    rows, test = np.flatnonzero(~held), np.flatnonzero(held)
    labels = data.noisy_labels(run.noise, run.seed) if run.noise else data.good
    if run.labels:
        rng = np.random.default_rng([run.seed, 6])
        rows = np.sort(rng.choice(rows, min(run.labels, len(rows)), replace=False))
    start = time.process_time()
    facts: dict[str, object] = {}
    if run.model in LINEAR:
        score = fit_linear(run.model, data.images(rows), labels[rows])
        scores = score(data.images(test))
    else:
        model = _model(data, run, rows, labels, folder / run.stem)
        facts["seconds"] = time.process_time() - start
        tta = run.model in (ROBERTS, STRAIGHT)
        scores = score_images(model, data.images(test), tta)
        noise = noise_images(data.images(test[:1]).shape[-1], N_NOISE, run.seed).numpy()
        facts["threshold"] = model.threshold
        facts["noise_accepted"] = float((score_images(model, noise, tta) >= model.threshold).mean())
    facts.setdefault("seconds", time.process_time() - start)
    np.savez(result.with_suffix(".npz"), rows=test, scores=scores)
    result.write_text(json.dumps({**asdict(run), **facts}))


def _model(
    data: LabelledImages, run: Run, rows: np.ndarray, labels: np.ndarray, folder: Path
) -> Model:
    if run.model == NO_LABELS:
        return load_model(BUNDLED_MODEL)
    good, bad = data.write_labels(folder, rows, labels)
    train(TrainOptions(
        pos=(good,), neg=(bad,), o=folder, seed=run.seed, j=1, quiet=True, **TRAINED[run.model]
    ))  # fmt: skip
    return load_model(folder / "model.safetensors")


def score_images(model: Model, images: np.ndarray, tta: bool) -> np.ndarray:
    """Return scores (n,) of images (n, box, box)."""
    parts = [
        model.probabilities(model.preprocess(part), tta)
        for part in torch.from_numpy(images).split(256)
    ]
    return np.asarray(torch.cat(parts).double().numpy())

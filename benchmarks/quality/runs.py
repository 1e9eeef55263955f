"""One run: train on part of a set with one recipe, score the micrographs kept for the test."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classes import class_labels
from linear import LINEAR, fit_linear
from sets import ALIKE, FLIPS, LabelledImages

from relion_cryofilter.commands.train import train
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.images.small_images import noise_images
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.nn.model import BUNDLED_MODEL, Model, load_model
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.thresholds import CURVE

TEST_SHARE = 0.3
LABELS = (300, 1000, None)
LABEL_NOISE = 0.1
ROBERTS, STRAIGHT = "2020 roberts", "2020 straight"
SCRATCH, FINE_TUNED, NO_LABELS = "default, from scratch", "default", "default, no labels"
THREE_PARTS = "default, three parts"
CLASSES, MISTAKE = "classes", "mistake"
"""Labels of RELION's classes; and with the class of a second molecule kept by mistake."""
PARTS = {"split": 0.7}  # what `train` did before it cross-fitted; the 2020 program knew no other
TRAINED: dict[str, dict[str, Any]] = {
    ROBERTS: {"model": "roberts", **PARTS},
    STRAIGHT: {"model": "straight", **PARTS},
    SCRATCH: {"model": "d4"},
    THREE_PARTS: PARTS,
    FINE_TUNED: {},
}
N_NOISE, PRECISION = 1000, 0.9


@dataclass(frozen=True)
class Run:
    """What is trained on what; `labels` is None for all, `noise` the share of wrong labels.

    `errors` is their kind. Labels of classes are of all images, which are scored out of fold.
    """

    model: str
    labels: int | None
    seed: int
    noise: float
    errors: str = ALIKE

    @property
    def stem(self) -> str:
        """A file name."""
        name = self.model.replace(",", "").replace(" ", "_")
        errors = "" if self.errors == ALIKE else f"-{self.errors}"
        return f"{name}-{self.labels or 'all'}-{self.seed}-{self.noise:g}{errors}"


def runs_of(data: LabelledImages, seeds: int) -> list[Run]:
    """Return all runs on a set, those that the bars need first."""
    noise = LABEL_NOISE if data.simulated else 0.0
    needed = [(NO_LABELS, 0, 0.0, ALIKE)]
    if data.classified:
        needed += [(FINE_TUNED, None, noise, errors) for errors in (CLASSES, MISTAKE)]
        return [Run(*each[:2], 0, *each[2:]) for each in needed]  # one classification: one seed
    needed += [(model, None, noise, ALIKE) for model in (ROBERTS, FINE_TUNED, THREE_PARTS)]
    needed += [(model, 300, noise, ALIKE) for model in (FINE_TUNED, THREE_PARTS)]
    if data.simulated:
        needed += [(FINE_TUNED, None, 0.0, ALIKE), (FINE_TUNED, None, 0.3, ALIKE)]
        needed += [(FINE_TUNED, None, noise, FLIPS)]
    for model in (*LINEAR, FINE_TUNED, THREE_PARTS, ROBERTS, SCRATCH, STRAIGHT):
        needed += [(model, labels, noise, ALIKE) for labels in reversed(LABELS)]
    return [
        Run(*each[:2], seed, *each[2:]) for each in dict.fromkeys(needed) for seed in range(seeds)
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
    if run.errors in (CLASSES, MISTAKE):
        rows, labels = np.arange(len(held)), class_labels(data, run.errors == MISTAKE)
    else:
        labels = data.noisy_labels(run.noise, run.seed, run.errors) if run.noise else data.good
    if run.labels:
        rng = np.random.default_rng([run.seed, 6])
        rows = np.sort(rng.choice(rows, min(run.labels, len(rows)), replace=False))
    start = time.process_time()
    facts: dict[str, object] = {}
    more = np.empty(0)
    if run.model in LINEAR:
        score = fit_linear(run.model, data.images(rows), labels[rows])
        scores = score(data.images(test))
    else:
        out = folder / run.stem
        model = _model(data, run, rows, labels, out)
        facts["seconds"] = time.process_time() - start
        tta = run.model in (ROBERTS, STRAIGHT)
        if run.errors in (CLASSES, MISTAKE):
            test, scores = rows, out_of_fold(out, labels)
        else:
            scores = score_images(model, data.images(test), tta)
        facts.update(_thresholds(model, out))
        noise = noise_images(data.images(test[:1]).shape[-1], N_NOISE, run.seed).numpy()
        facts["noise_accepted"] = float((score_images(model, noise, tta) >= model.threshold).mean())
        if data.further is not None and run.model == FINE_TUNED:
            every = np.arange(len(data.further.good))
            more = np.concatenate(
                [score_images(model, data.further.images(some), tta)
                 for some in np.array_split(every, 8)]
            )  # fmt: skip
    facts.setdefault("seconds", time.process_time() - start)
    np.savez(result.with_suffix(".npz"), rows=test, scores=scores, further=more)
    result.write_text(json.dumps({**asdict(run), **facts}))


def _thresholds(model: Model, folder: Path) -> dict[str, object]:
    """Return the model's threshold, that for a precision, and what was said of the labels."""
    facts: dict[str, object] = {"threshold": model.threshold}
    if CURVE in model.provenance:
        with contextlib.suppress(CryoFilterError):  # it can't be reached
            facts["precise"] = model.curve.threshold(ThresholdRequest("precision", PRECISION))
    figures = folder / "metrics.json"
    if figures.exists():
        facts["label_noise"] = json.loads(figures.read_text()).get("label_noise")
    recipe = model.provenance.get("recipe")
    facts["recipe"] = recipe and recipe["name"]
    return facts


def out_of_fold(folder: Path, labels: np.ndarray) -> np.ndarray:
    """Return the scores (n,) that ``train`` gave the labelled particles, in the order of `labels`.

    predictions.csv has the good ones and then the bad ones, as `write_labels` wrote them.
    """
    with (folder / "predictions.csv").open() as file:
        found = {row["image"]: float(row["score"]) for row in csv.DictReader(file)}
    order = sorted(found, key=lambda name: int(name.partition("@")[0]))
    if len(order) != len(labels):
        raise ValueError(f"{folder}: {len(order)} scores of {len(labels)} particles.")
    return np.array([found[name] for name in order])


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

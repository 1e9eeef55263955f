"""Nulls: what a training must not find, and what it must refuse."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import torch
from runs import score_images, test_part
from sets import LabelledImages
from sklearn.metrics import roc_auc_score

from relion_cryofilter.commands.train import train
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.nn.model import load_model
from relion_cryofilter.options import TrainOptions

PERMUTED, MASKED, INVERTED = "permuted", "masked", "inverted"
NULLS = {PERMUTED: 3, MASKED: 1, INVERTED: 1}
"""How often each is tried, with different seeds."""

MASK_RADIUS = 0.4
"""In units of the box: the particle and what is near it."""


def do_null(data: LabelledImages, kind: str, seed: int, work: Path) -> None:
    """Train on a set with nothing in it to learn; write kind-seed.json with the test AUC.

    ``permuted``: labels drawn among all images, in training and test; ``masked``: noise of each
    image's own mean and sigma in place of the particle, so only surroundings are left;
    ``inverted``: black for white, which `train` must refuse.
    """
    result = work / "runs" / data.stack.stem / f"null_{kind}-{seed}.json"
    if result.exists():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("relion_cryofilter").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    labels = data.good
    if kind == PERMUTED:
        labels = np.random.default_rng(seed).permutation(labels)
    else:
        data = _altered(data, kind, work)
    test = test_part(data, seed)
    folder = result.with_suffix("")
    good, bad = data.write_labels(folder, np.flatnonzero(~test), labels)
    found: dict[str, float | str] = {}
    try:
        train(TrainOptions(pos=(good,), neg=(bad,), o=folder, seed=seed, j=1, quiet=True))
        model = load_model(folder / "model.safetensors")
        scores = score_images(model, data.images(np.flatnonzero(test)), tta=False)
        found["auc"] = float(roc_auc_score(labels[test], scores))
    except CryoFilterError as error:
        found["refused"] = str(error)
    result.write_text(json.dumps(found))


def _altered(data: LabelledImages, kind: str, work: Path) -> LabelledImages:
    stack = work / "sets" / f"{data.stack.stem}_{kind}.mrcs"
    if not stack.exists():
        stack.parent.mkdir(parents=True, exist_ok=True)
        images = data.images(np.arange(len(data.good)))
        if kind == INVERTED:
            images = -images
        else:
            rng = np.random.default_rng(0)
            box = images.shape[-1]
            y, x = np.indices((box, box)) - (box - 1) / 2
            inside = np.hypot(x, y) < MASK_RADIUS * box
            outside = images[:, ~inside]
            noise = rng.normal(size=(len(images), inside.sum()))
            images[:, inside] = outside.mean(1)[:, None] + outside.std(1)[:, None] * noise
        mrcfile.write(stack, images.astype(np.float32), overwrite=True)
    return replace(data, stack=stack)

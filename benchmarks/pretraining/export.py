"""From averaged weights to a model file: the threshold and the scale of its scores.

Nothing of what is kept for tests is looked at: validation images are simulated, or noise, or
composites of simulated particles and real ice; real junk is that of the training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pool import VALIDATION_SEED, Pool, random_phases
from real_images import UNIT, split_real
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score
from torch import Tensor

from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.model import CURVE, Model, load_model
from relion_cryofilter.nn.networks import Network
from relion_cryofilter.processes import versions
from relion_cryofilter.thresholds import OperatingCurve

if TYPE_CHECKING:
    from pretrain import Training

MOST_NOISE, MOST_JUNK = 0.005, 0.025
"""Shares of noise, and of the real junk of the training, that reach the threshold: half of what
is promised of images that are kept for tests."""


def export(training: Training, path: Path) -> None:
    """Write the model of a training's averaged weights, calibrated."""
    options = training.options
    network, recipe = training.averaged_network(), FourierCrop(options.dim)
    validation = Pool(options.work, None, validation=True)
    real = split_real(options.real)[0]
    logits = {kind: validation.logits(network, recipe, kind) for kind in validation.kinds_of_shard}

    # Noise, also of the images' own spectra, and real junk decide where particles begin.
    images = validation.column("simulated", "images")[::3].astype(np.float32) / UNIT
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    own = random_phases(torch.from_numpy(images), generator)
    junk = real.take(np.flatnonzero(~real.good))
    kinds = np.unique(junk.kinds)
    of_kind = {
        str(kind): logits_of(network, recipe, junk.images[junk.kinds == kind].astype(np.float32))
        for kind in kinds
    }
    beginning = max(
        np.quantile(logits["noise"], 1 - MOST_NOISE),
        np.quantile(logits_of(network, recipe, own.numpy()), 1 - MOST_NOISE),
        np.median([np.quantile(values, 1 - MOST_JUNK) for values in of_kind.values()]),
    )

    # The scale of scores, from all validation images; 0.5 is where particles begin.
    targets = np.concatenate([validation.targets(kind) for kind in logits])
    together = np.concatenate(list(logits.values()))
    signed = np.where(targets >= 0.5, together, -together)
    found = minimize_scalar(
        lambda value: np.logaddexp(0, -signed / value).mean(), bounds=(0.2, 5), method="bounded"
    )
    shifted = copy.deepcopy(network)
    with torch.no_grad():
        shifted.head.bias -= float(beginning)
    temperature = round(float(found.x), 4)

    # What it is like on simulated micrographs that it has not seen.
    good = validation.targets("simulated") >= 0.5
    values = 1 / (1 + np.exp(-(logits["simulated"] - beginning) / temperature))
    groups = validation.column("simulated", "micrographs")
    names = validation.column("simulated", "kinds")
    by_kind = {
        str(kind): round(float(roc_auc_score(good[rows], values[rows])), 3)
        for kind in sorted(set(names[~good]))
        for rows in [(names == kind) | good]
        if (~good[rows]).any()
    }
    count = f"{len(real):,} real images of {len(set(real.micrographs))} micrographs"
    provenance = {
        "made_by": "benchmarks/pretraining/pretrain.py",
        "data": f"{count_shards(options.work):,} shards of 1,200 simulated images; {count}",
        "fine_tuned_from": load_model(options.init).hash if options.init else None,
        "settings": {
            "seed": options.seed, "learning_rate": options.learning_rate,
            "blend": options.blend, "images_seen": training.images,
            "hours": round(training.seconds / 3600, 2),
        },
        "validation": {
            "auc": round(float(roc_auc_score(good, values)), 4), "by_kind": by_kind,
            "recall": round(float((values[good] >= 0.5).mean()), 3),
            "n": len(good), "micrographs": len(set(groups)),
        },
        CURVE: OperatingCurve.from_scores(good, values, groups).to_dict(),
        "versions": versions(),
    }  # fmt: skip
    model = Model(shifted, recipe, 0.5, temperature, provenance)
    model.save(path)
    print(f"wrote {path} ({model.hash}): {provenance['settings']} {provenance['validation']}")
    accepted = {kind: f"{(z >= beginning).mean():.1%}" for kind, z in of_kind.items()}
    print(f"begins at {beginning:.3f}, temperature {temperature}; junk of the training: {accepted}")


def logits_of(
    network: Network, recipe: Callable[[Tensor], Tensor], images: np.ndarray
) -> np.ndarray:
    """Return the logits (n,) of images (n, box, box), made small by a recipe."""
    with torch.inference_mode():
        parts = [network(recipe(part)) for part in torch.from_numpy(images).split(64)]
    return torch.cat(parts).double().numpy()


def count_shards(work: Path) -> int:
    """Return how many shards there are to train on."""
    return len(list((work / "shards").glob("shard_*.npz")))

"""What a training is of: the network that it starts from, the labelled images, the options."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from relion_cryofilter.errors import UsageError
from relion_cryofilter.images.preprocess import Preprocess, preprocess_from_dict
from relion_cryofilter.images.small_images import Loaded, noise_images
from relion_cryofilter.nn.model import BUNDLED_MODEL, START_MODEL, Models, load_model
from relion_cryofilter.nn.networks import Network, build_network, network_class
from relion_cryofilter.nn.trainer import Settings
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.particles.labels import LabelledSet
from relion_cryofilter.particles.splits import seen_units, short_hash
from relion_cryofilter.processes import versions

DEFAULT_NETWORK = "straight"
FROM_SCRATCH = {"epochs": 30, "batch_size": 64}
FROM_MODEL = {"epochs": 12, "batch_size": 32}
LEARNING_RATE, NOISE_SHARE, NOISE_SEED = 1e-3, 0.05, 10_000


@dataclass(frozen=True)
class Start:
    """The network before training, its images, and the model that it is of; "" for none.

    `rival` is the network, and its name, that a training has to beat, if not the start itself.
    """

    network: Network
    preprocess: Preprocess
    origin: str = ""
    rival: tuple[Network, str] | None = None

    @property
    def untrained(self) -> tuple[Network, str]:
        """What sorts these images without a training on them, and its name."""
        return self.rival or (self.network, self.origin)

    def settings(self, options: TrainOptions) -> Settings:
        """Return how to train from here; one that is of a model is fine-tuned."""
        usual = FROM_MODEL if self.origin else FROM_SCRATCH
        return Settings(
            epochs=options.epochs or usual["epochs"],
            patience=options.patience,
            batch_size=options.batch_size or usual["batch_size"],
            learning_rate=options.learning_rate or LEARNING_RATE,
            augmentation=options.augmentation,
            seed=options.seed,
            noise_share=NOISE_SHARE if self.origin else 0.0,
            fine_tuning=bool(self.origin),
        )


def start_of(options: TrainOptions, labelled: LabelledSet) -> Start:
    """Return the network to train: that of ``--init``, the bundled start, or a new one."""
    new = any((options.model, options.f, options.img_dim, options.preprocess))
    if options.init is None and new:
        name = options.model or DEFAULT_NETWORK
        kind = network_class(name)
        if options.f is not None and "f" not in kind.parameters_of():
            raise UsageError(f"--f {options.f} is not for --model {name}.")
        if options.preprocess not in (None, *kind.recipes):
            raise UsageError(f"--preprocess {options.preprocess} is not for --model {name}.")
        chosen = {"f": options.f, "dim": options.img_dim}
        network = build_network(name, **{k: v for k, v in chosen.items() if v is not None})
        return Start(network, preprocess_from_dict(network.recipe(options.preprocess)))
    path = options.init or START_MODEL
    model = load_model(path)
    asked = {"model": options.model, "f": options.f, "img_dim": options.img_dim}
    model.check_belief(path, **asked, preprocess=options.preprocess)
    if options.init is not None:
        Models((model,), (str(path),)).check(labelled.particles)
    if options.init is not None:
        return Start(model.network, model.preprocess, f"{options.init} (hash {model.hash})")
    bundled = load_model(BUNDLED_MODEL)
    rival = (bundled.network, f"the bundled model (hash {bundled.hash})")
    return Start(model.network, model.preprocess, f"the bundled start (hash {model.hash})", rival)


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled particles with their images, and how to train on them.

    Attributes
    ----------
    options, labelled, loaded, start
        n particles, every image once, and the network before training.
    folder
        Holds the checkpoints, from which a stopped training is resumed.
    """

    options: TrainOptions
    labelled: LabelledSet
    loaded: Loaded
    start: Start
    folder: Path

    def identity(self, parts: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be resumed; `parts` are rows of each part."""
        particles, start = self.labelled.particles, self.start
        rows = " ".join(particles.image_name(row) for row in range(len(particles)))
        stats = [(path, path.stat()) for path in particles.stacks if os.path.exists(path)]  # noqa: PTH110
        dark = f" inverted {particles.inverted}" if any(particles.inverted) else ""
        stacks = " ".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats) + dark
        kind = [start.network.name, start.network.kwargs, start.preprocess.to_dict()]
        return {
            "labels": self.labelled.fingerprint,
            "rows": short_hash(f"{rows} {[part.tolist() for part in parts]}"),
            "stacks": short_hash(stacks),
            "images": self.loaded.images.precision,
            "network": json.dumps(kind),
            "init": start.origin,
        }

    def provenance(self, seen: np.ndarray) -> dict[str, Any]:
        """Return what the model file says of the data and the options; `seen` are rows."""
        labelled, options = self.labelled, self.options
        particles, boxes = labelled.particles, self.loaded.boxes_px
        sizes = {group.pixel_size_angstrom for group in particles.optics}
        return {
            "seen": seen_units(particles.take(seen)),
            "source": particles.source,
            "labels": list(labelled.notes),
            "n_good": int(labelled.labels.sum()),
            "n_bad": int((~labelled.labels).sum()),
            "fine_tuned_from": self.start.origin or None,
            "pixel_sizes_angstrom": sorted(size for size in sizes if size),
            "boxes_px": np.unique(boxes[boxes > 0]).tolist(),
            "threshold_request": str(options.threshold),
            "versions": versions(),
        }

    def white_noise(self, rows: np.ndarray, n: int, seed: int) -> Tensor:
        """Return n small images of white noise, in boxes like those of `rows`."""
        box = int(np.median(self.loaded.boxes_px[rows]))
        return self.start.preprocess(noise_images(box, n, seed))

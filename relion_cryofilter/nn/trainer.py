"""The training loop: best epoch by validation AUC, resumable bit for bit, calibrated.

Everything random in an epoch comes from the seed and the epoch's number, so an epoch that was
cut off is done again exactly.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.files import replacing
from relion_cryofilter.images.preprocess import turn
from relion_cryofilter.images.small_images import SmallImages
from relion_cryofilter.nn.networks import CPU, Network
from relion_cryofilter.particles.splits import Split
from relion_cryofilter.progress import Progress

CHUNK, FINAL_RATE = 8192, 0.05

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class Settings:
    """How to train."""

    epochs: int = 30  # at most
    patience: int = 10  # stop when validation AUC has not risen for so many epochs
    batch_size: int = 64  # images a step
    learning_rate: float = 1e-3  # at the start; it falls to a twentieth along half a cosine
    augmentation: bool = True  # each image in another of its eight flips and rotations each epoch
    seed: int = 0  # of weights, order and augmentation
    noise_share: float = 0.0  # bad images of pure noise added to each step / images of the step
    fine_tuning: bool = False
    """The network has been trained before: batch norms keep their statistics, and its weights are
    kept as they are if no epoch does better."""


@dataclass(frozen=True)
class Epoch:
    """One line of history.csv."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float
    val_acc: float
    val_auc: float
    learning_rate: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"Epoch {self.epoch:3d}: training loss {self.train_loss:.4f}, accuracy "
            f"{self.train_acc:.3f}; validation loss {self.val_loss:.4f}, AUC {self.val_auc:.4f}; "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a network is trained on: small images by row, and which rows."""

    images: SmallImages
    labels: np.ndarray  # (n,) bool
    split: Split
    noise: Tensor | None = None  # (m, c, d, d) to draw `Settings.noise_share` from


class Trainer:
    """Trains one network on the training part and watches it on the validation part.

    The network is trained in place; after `run` it holds the best epoch's weights. A stopped
    training is resumed from the file `checkpoint`, which every epoch writes, unless it is of
    another `identity`, which says what is trained on what.
    """

    def __init__(
        self,
        network: Network,
        data: TrainingData,
        settings: Settings,
        checkpoint: Path,
        identity: Mapping[str, Any],
        device: torch.device = CPU,
    ) -> None:
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images, self.split, self.noise = data.images, data.split, data.noise
        self.settings, self.device = settings, device
        self.targets = torch.from_numpy(data.labels.astype(np.float32))
        share = data.labels[data.split.train].mean()
        self.bad_weight = 0.5 / (1 - share)
        self.weights = torch.where(self.targets > 0, 0.5 / share, 0.5 / (1 - share)).float()
        self.prior_logit = math.log(share / (1 - share))
        self.checkpoint = checkpoint
        self.identity = {**identity, "settings": asdict(settings)}
        self.optimiser = self._new_optimiser()
        self.history: list[Epoch] = []
        self.start_auc = -1.0
        self.best_state: dict[str, Any] = copy.deepcopy(network.state_dict())

    def _new_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), self.settings.learning_rate)

    def run(
        self,
        progress: Progress,
        after_epoch: Callable[[list[Epoch]], None] = lambda history: None,
    ) -> list[Epoch]:
        """Train to the end, put the best epoch's weights into the network, return the history.

        The two kinds of particles weigh the same in training, whatever their numbers; the
        numbers come back as a shift of the last bias, so that scores are probabilities for the
        mixture that was trained on. `progress` may raise Aborted after any step; `checkpoint` has
        the epochs that were finished.
        """
        if self.settings.fine_tuning:
            self.network.eval()
            self.start_auc = self._validate()[2]
            log.info("Before any training: validation AUC %.4f.", self.start_auc)
        self._resume()
        progress.skip(len(self.history) * len(self.split.train))
        after_epoch(self.history)
        while not self._finished():
            self._epoch(len(self.history) + 1, progress)
            state = {
                "identity": self.identity,
                "network": self.network.state_dict(),
                "best": self.best_state,
                "optimiser": self.optimiser.state_dict(),
                "history": [asdict(epoch) for epoch in self.history],
            }
            with replacing(self.checkpoint) as file:
                torch.save(state, file)
            after_epoch(self.history)
            last = self.history[-1]
            log.info("%s%s", last, "  (best)" if self.best_number == last.epoch else "")
        self.network.load_state_dict(self.best_state)
        self.network.to(CPU)
        with torch.no_grad():
            self.network.head.bias += self.prior_logit
        return self.history

    @property
    def best(self) -> Epoch:
        """The epoch of the highest validation AUC; of equals, that of the lowest loss."""
        return max(self.history, key=lambda epoch: (epoch.val_auc, -epoch.val_loss))

    @property
    def best_number(self) -> int:
        """The epoch whose weights are kept; 0 if those before any training are better."""
        return self.best.epoch if self.best.val_auc > self.start_auc else 0

    def _finished(self) -> bool:
        done, most, patience = len(self.history), self.settings.epochs, self.settings.patience
        return done >= most or (done > 0 and done - self.best.epoch >= patience)

    def _epoch(self, number: int, progress: Progress) -> None:
        # All that is random, and the rate, from the epoch's number.
        start, settings = time.monotonic(), self.settings
        fallen = 0.5 * (1 + math.cos(math.pi * ((number - 1) / max(1, settings.epochs))))
        rate = settings.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * fallen)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        order = torch.randperm(len(self.split.train), generator=generator).numpy()
        turned = settings.augmentation and not self.network.equivariant
        views = torch.randint(8, (len(order),), generator=generator)

        # One look at every image of the training part, then at the validation part.
        self.network.train(not settings.fine_tuning)
        total, correct = 0.0, 0
        for chunk in range(0, len(order), CHUNK):
            rows = self.split.train[order[chunk : chunk + CHUNK]]
            small = self.images.get(rows)
            for begin in range(0, len(rows), settings.batch_size):
                part = slice(begin, begin + settings.batch_size)
                batch = turn(small[part], views[chunk:][part]) if turned else small[part]
                loss, right = self._step(batch, torch.from_numpy(rows[part]), generator)
                total += loss * len(batch)
                correct += right
                progress.step(len(batch))
        self.network.eval()
        val_loss, val_acc, val_auc = self._validate()
        self.history.append(Epoch(
            number, total / len(order), correct / len(order), val_loss, val_acc, val_auc,
            rate, time.monotonic() - start,
        ))  # fmt: skip
        if self.best.epoch == number and val_auc > self.start_auc:
            self.best_state = copy.deepcopy(self.network.state_dict())

    def _step(self, batch: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[float, int]:
        targets, weights = self.targets[rows], self.weights[rows]
        if self.noise is not None:
            count = math.ceil(self.settings.noise_share * len(rows))
            drawn = torch.randint(len(self.noise), (count,), generator=generator)
            batch = torch.cat([batch, self.noise[drawn]])
            targets = torch.cat([targets, torch.zeros(count)])
            weights = torch.cat([weights, torch.full((count,), self.bad_weight)])
        targets, weights, batch = (part.to(self.device) for part in (targets, weights, batch))
        logits = self.network(batch)
        total = binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")
        loss = total / len(batch)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        right = ((logits > 0) == (targets > 0))[: len(rows)].sum()
        return float(loss.detach()), int(right)

    def _validate(self) -> tuple[float, float, float]:
        """Return loss, accuracy and AUC on the validation part."""
        logits = predict(self.network, self.images, self.split.validation)
        refuse_diverged(logits, self.settings.learning_rate)
        rows = torch.from_numpy(self.split.validation)
        targets, weights = self.targets[rows], self.weights[rows]
        loss = binary_cross_entropy_with_logits(logits, targets, weights)
        right = ((logits > 0) == (targets > 0)).float().mean()
        auc = roc_auc_score(targets.numpy(), logits.numpy())
        return float(loss), float(right), float(auc)

    def _resume(self) -> None:
        def take(state: dict[str, Any]) -> None:
            history = [Epoch(**epoch) for epoch in state["history"]]
            self.network.load_state_dict(state["best"])
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.best_state, self.history = state["best"], history

        def undo() -> None:
            self.network.load_state_dict(self.best_state)
            self.optimiser = self._new_optimiser()

        if not take_over(self.checkpoint, self.identity, take, undo):
            return
        done = "; training is finished" if self._finished() else ""
        log.info("Resuming from %s after epoch %d%s.", self.checkpoint, len(self.history), done)


def refuse_diverged(logits: Tensor, learning_rate: float) -> None:
    """Raise a CryoFilterError if what a trained network says is no number."""
    if not torch.isfinite(logits).all():
        raise CryoFilterError(
            "The training diverged: the network's outputs are no numbers any more. Train with a "
            f"smaller --learning_rate (it is {learning_rate:g})."
        )


def take_over(
    path: Path,
    identity: Mapping[str, Any],
    take: Callable[[dict[str, Any]], None],
    undo: Callable[[], None],
) -> bool:
    """Give `take` what a checkpoint holds, if there is one of this training; tell if it was.

    `undo` puts back what `take` had changed before it met something damaged.
    """
    if not path.is_file():
        return False
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as parts:  # torch itself checks no checksum
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(damaged)
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        if state["identity"] != dict(identity):
            other = [k for k, v in identity.items() if state["identity"].get(k) != v]
            said = "%s is of another training; starting anew (other: %s)."
            log.warning(said, path, ", ".join(other))
            return False
        take(state)
    except Exception as error:  # torch raises many kinds for a damaged file
        undo()
        log.warning("%s can't be read (%s); starting anew.", path, type(error).__name__)
        return False
    return True


def predict(network: Network, images: SmallImages, rows: np.ndarray) -> Tensor:
    """Return the logits (len(rows),) of small images, on the processor."""
    logits = []
    with torch.no_grad():
        for chunk in range(0, len(rows), CHUNK):
            small = images.get(rows[chunk : chunk + CHUNK])
            for batch in torch.split(small, 64):
                logits.append(network(batch.to(network.device)).cpu())
    return torch.cat(logits)

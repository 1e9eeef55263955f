"""The training loop: best epoch by validation AUC, resumable bit for bit, calibrated.

Everything random in an epoch comes from the seed and the epoch's number, so an epoch that was
cut off is done again exactly.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from relion_cryofilter.data.labelled import Split
from relion_cryofilter.files import replacing
from relion_cryofilter.nn.devices import CPU
from relion_cryofilter.nn.network import Network
from relion_cryofilter.nn.preprocess import turn
from relion_cryofilter.nn.ranks import ALONE, Ranks
from relion_cryofilter.nn.small_images import SmallImages
from relion_cryofilter.progress import Progress

CHUNK = 8192
FINAL_RATE = 0.05

log = logging.getLogger("relion_cryofilter")

State = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    epochs
        Most epochs.
    patience
        Stop when validation AUC has not risen for so many epochs.
    batch_size
        Images a step.
    learning_rate
        At the start; it falls to a twentieth along half a cosine.
    augmentation
        Show each image in one of its eight flips and rotations, another each epoch.
    seed
        Of weights, order and augmentation.
    noise_share
        Images of pure noise, as bad ones, that are added to each step / images of the step.
    fine_tuning
        The network has been trained before: batch norms keep their statistics, and its weights
        are kept as they are if no epoch does better.
    """

    epochs: int = 30
    patience: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    augmentation: bool = True
    seed: int = 0
    noise_share: float = 0.0
    fine_tuning: bool = False


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


class Trainer:
    """Trains one network on the training part and watches it on the validation part.

    Parameters
    ----------
    network
        Trained in place; after `run` it holds the best epoch's weights.
    images, labels, split
        Small images, (n,) bool and the rows of each part.
    settings
        How to train.
    checkpoint
        File to go on from after a stop, written after every epoch.
    identity
        Says what is trained on what; a checkpoint of another identity is not used.
    device
        Where to train.
    noise
        (m, c, d, d) small images of pure noise to draw `Settings.noise_share` from; None for none.
    ranks
        The processes that share out each step's images and add up their gradients. Networks with
        batch norms that are not frozen normalise in each process by itself.
    """

    def __init__(
        self,
        network: Network,
        images: SmallImages,
        labels: np.ndarray,
        split: Split,
        settings: Settings,
        checkpoint: Path,
        identity: Mapping[str, Any],
        device: torch.device = CPU,
        noise: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.noise, self.ranks = noise, ranks
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images, self.split, self.settings = images, split, settings
        self.device = device
        self.targets = torch.from_numpy(labels.astype(np.float32))
        share = labels[split.train].mean()
        self.bad_weight = 0.5 / (1 - share)
        self.weights = torch.where(self.targets > 0, 0.5 / share, 0.5 / (1 - share)).float()
        self.prior_logit = math.log(share / (1 - share))
        self.checkpoint = checkpoint
        self.identity = {**identity, "settings": asdict(settings)}
        self.optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate)
        self.history: list[Epoch] = []
        self.start_auc = -1.0
        self.best_state: State = copy.deepcopy(network.state_dict())

    def run(
        self,
        progress: Progress,
        after_epoch: Callable[[list[Epoch]], None] = lambda history: None,
    ) -> list[Epoch]:
        """Train to the end and put the best epoch's weights into the network.

        The two kinds of particles weigh the same in training, whatever their numbers; the
        numbers come back as a shift of the last bias, so that scores are probabilities for the
        mixture that was trained on.

        Returns
        -------
        list of Epoch
            The history, with the epochs before a stop.

        Raises
        ------
        Aborted
            On request, within one step; `checkpoint` has the epochs that were finished.
        """
        if self.settings.fine_tuning:
            self.network.eval()
            self.start_auc = self._validate(self._predict())[2]
            log.info("Before any training: validation AUC %.4f.", self.start_auc)
        self._resume()
        progress.skip(len(self.history) * len(self.split.train))
        after_epoch(self.history)
        while not self._finished():
            self._epoch(len(self.history) + 1, progress)
            self._save()
            after_epoch(self.history)
            log.info(_line(self.history[-1], self.best_number))
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
        done = len(self.history)
        patience = self.settings.patience
        return done >= self.settings.epochs or (done > 0 and done - self.best.epoch >= patience)

    def _epoch(self, number: int, progress: Progress) -> None:
        start, settings = time.monotonic(), self.settings
        rate = _rate(settings, number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        order = torch.randperm(len(self.split.train), generator=generator).numpy()
        turned = settings.augmentation and not self.network.equivariant
        views = torch.randint(8, (len(order),), generator=generator)
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
        val_loss, val_acc, val_auc = self._validate(self._predict())
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
        counted, size = torch.arange(len(batch)) < len(rows), len(batch)
        own = slice(self.ranks.number, None, self.ranks.count)
        targets, weights, batch, counted = (
            part[own].to(self.device) for part in (targets, weights, batch, counted)
        )
        logits = self.network(batch)
        loss = binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum") / size
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        right = (((logits > 0) == (targets > 0)) & counted).sum()
        totals = torch.stack([loss.detach(), right.to(loss.dtype)])
        self.ranks.add_up([totals, *self._gradients()])
        self.optimiser.step()
        return float(totals[0]), int(totals[1])

    def _gradients(self) -> list[Tensor]:
        return [part.grad for part in self.network.parameters() if part.grad is not None]

    def _predict(self) -> Tensor:
        return predict(self.network, self.images, self.split.validation)

    def _validate(self, logits: Tensor) -> tuple[float, float, float]:
        rows = torch.from_numpy(self.split.validation)
        targets, weights = self.targets[rows], self.weights[rows]
        loss = binary_cross_entropy_with_logits(logits, targets, weights)
        right = ((logits > 0) == (targets > 0)).float().mean()
        auc = roc_auc_score(targets.numpy(), logits.numpy())
        return float(loss), float(right), float(auc)

    def _save(self) -> None:
        if not self.ranks.first:
            return
        state = {
            "identity": self.identity,
            "network": self.network.state_dict(),
            "best": self.best_state,
            "optimiser": self.optimiser.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        with replacing(self.checkpoint) as file:
            torch.save(state, file)

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if state["identity"] != self.identity:
                other = [k for k, v in self.identity.items() if state["identity"].get(k) != v]
                log.warning(
                    "%s is of another training; starting anew (other: %s).",
                    self.checkpoint, ", ".join(other),
                )  # fmt: skip
                return
            history = [Epoch(**epoch) for epoch in state["history"]]
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.best_state, self.history = state["best"], history
        except Exception as error:  # torch raises many kinds for a damaged file
            self.network.load_state_dict(self.best_state)
            log.warning(
                "%s can't be read (%s); starting anew.", self.checkpoint, type(error).__name__
            )
            return
        done = "; training is finished" if self._finished() else ""
        log.info("Going on from %s after epoch %d%s.", self.checkpoint, len(self.history), done)


def predict(network: Network, images: SmallImages, rows: np.ndarray) -> Tensor:
    """Return the logits (len(rows),) of small images, on the processor."""
    logits = []
    with torch.no_grad():
        for chunk in range(0, len(rows), CHUNK):
            small = images.get(rows[chunk : chunk + CHUNK])
            for batch in torch.split(small, 64):
                logits.append(network(batch.to(network.device)).cpu())
    return torch.cat(logits)


def _rate(settings: Settings, number: int) -> float:
    done = (number - 1) / max(1, settings.epochs)
    share = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * share


def _line(epoch: Epoch, best_number: int) -> str:
    mark = "  (best)" if best_number == epoch.epoch else ""
    return (
        f"Epoch {epoch.epoch:3d}: training loss {epoch.train_loss:.4f}, accuracy "
        f"{epoch.train_acc:.3f}; validation loss {epoch.val_loss:.4f}, AUC {epoch.val_auc:.4f}; "
        f"{epoch.seconds:.1f} s{mark}"
    )

"""One training to its last step, resumable bit for bit.

Everything random in a round of steps comes from the seed and the round's number, so a round that
was cut off is done again exactly.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from relion_cryofilter.files import replacing
from relion_cryofilter.images.preprocess import turn
from relion_cryofilter.images.small_images import SmallImages
from relion_cryofilter.nn.networks import CPU, Network
from relion_cryofilter.nn.recipes import Recipe
from relion_cryofilter.nn.trainer import CHUNK, FINAL_RATE, Epoch, take_over

NOISE_POOL, MOST_SPECTRA = 256, 512
UNKNOWN = float("nan")

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class FitData:
    """What networks are fitted to."""

    images: SmallImages
    labels: np.ndarray  # (n,) bool
    white: Tensor | None  # (m, c, d, d) of white noise; None: train without noise
    device: torch.device = CPU


@dataclass(frozen=True, eq=False)
class Fit:
    """One training.

    Attributes
    ----------
    start
        The network before it; left as it is.
    data, rows
        The images, and the rows to train on, ascending.
    recipe, seed
        How, and of order, views and noise.
    checkpoint, identity
        The file that every round writes, and what it must agree on to be gone on from.
    """

    start: Network
    data: FitData
    rows: np.ndarray
    recipe: Recipe
    seed: int
    checkpoint: Path
    identity: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self.recipe.steps(len(self.rows))

    @property
    def round_steps(self) -> int:
        """Steps between checkpoints: a look at each image, or at `CHUNK` of them."""
        size = self.recipe.batch_size
        return max(1, min(math.ceil(len(self.rows) / size), CHUNK // size))

    def run(
        self,
        step: Callable[[int], None],
        after_round: Callable[[list[Epoch]], None] = lambda history: None,
        resumed: Callable[[int], None] = lambda count: None,
    ) -> tuple[Network, list[Epoch]]:
        """Train to the last step; return the network and a line a round.

        The two kinds of particles weigh the same, whatever their numbers. `step` is told of every
        step's images, and may raise Aborted, `resumed` of those of an earlier run; the checkpoint
        has the rounds that were finished.
        """
        network = copy.deepcopy(self.start)
        network = network.to(self.data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser = torch.optim.AdamW(network.parameters(), self.recipe.learning_rate)
        history = self._resume(network, optimiser)
        resumed(len(history) * self.round_steps * self.recipe.batch_size)
        rounds = math.ceil(self.steps / self.round_steps)
        pools = self._noise() if len(history) < rounds else []
        if history:
            after_round(history)
        while len(history) < rounds:
            history.append(self._round(len(history), network, optimiser, pools, step))
            state = {
                "identity": dict(self.identity),
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict() if len(history) < rounds else None,
                "history": [asdict(line) for line in history],
            }
            with replacing(self.checkpoint) as file:
                torch.save(state, file)
            after_round(history)
        network.to(CPU).eval()
        return interpolated(self.start, network, self.recipe.way), history

    def _round(
        self,
        number: int,
        network: Network,
        optimiser: torch.optim.Optimizer,
        pools: list[Tensor],
        step: Callable[[int], None],
    ) -> Epoch:
        """Take the steps of round `number`, from 0; return its line."""
        began, recipe, n = time.monotonic(), self.recipe, len(self.rows)
        steps = range(number * self.round_steps, min((number + 1) * self.round_steps, self.steps))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        # Images in the order of one permutation after the other, of which this round has a part.
        first, last = steps.start * recipe.batch_size, steps.stop * recipe.batch_size
        looks = [self._order(look) for look in range(first // n, (last - 1) // n + 1)]
        order = np.concatenate(looks)[first - first // n * n :][: last - first]
        rows = self.rows[order]
        small, turned = self.data.images.get(rows), recipe.augmentation and not network.equivariant
        if turned:
            small = turn(small, torch.randint(8, (len(rows),), generator=generator))
        targets = torch.from_numpy(self.data.labels[rows].astype(np.float32))
        share = float(self.data.labels[self.rows].mean())
        weights = torch.where(targets > 0, 0.5 / share, 0.5 / (1 - share))

        network.train(not recipe.frozen)
        total, right, rate = 0.0, 0, recipe.learning_rate
        for place, at in enumerate(steps):
            fallen = 0.5 * (1 + math.cos(math.pi * at / self.steps))
            rate = recipe.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * fallen)
            for group in optimiser.param_groups:
                group["lr"] = rate
            part = slice(place * recipe.batch_size, (place + 1) * recipe.batch_size)
            batch, target, weight = [small[part]], [targets[part]], [weights[part]]
            for pool in pools:
                # Rounded up or down by chance, so that small shares come out right on average.
                chance = float(torch.rand((), generator=generator))
                count = int(recipe.noise_share * len(target[0]) + chance)
                batch.append(pool[torch.randint(len(pool), (count,), generator=generator)])
                target.append(torch.zeros(count))
                weight.append(torch.full((count,), 0.5 / (1 - share)))
            x, y, w = (torch.cat(each).to(self.data.device) for each in (batch, target, weight))
            with torch.autocast("cpu", torch.bfloat16, enabled=_reduced(network)):
                logits = network(x).float()
            n_labelled = len(target[0])
            losses = torch.cat([
                forgiving_losses(logits[:n_labelled], y[:n_labelled], recipe.forgiveness),
                forgiving_losses(logits[n_labelled:], y[n_labelled:], 0.0),  # surely bad
            ])  # fmt: skip
            loss = (w * losses).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(loss.detach())
            right += int(((logits > 0) == (y > 0))[: len(target[0])].sum())
            step(len(target[0]))
        seconds = time.monotonic() - began
        loss_mean, accuracy = total / len(steps), right / len(rows)
        return Epoch(
            number + 1, loss_mean, accuracy, UNKNOWN, UNKNOWN, UNKNOWN, rate, seconds
        )  # no part is held back to be validated on

    def _order(self, look: int) -> np.ndarray:
        """Return the places of all rows in the order of look number `look` at them."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_000 + look)
        return torch.randperm(len(self.rows), generator=generator).numpy()

    def _noise(self) -> list[Tensor]:
        """Return images of white noise, and of bad ones of the training with phases at random."""
        if self.data.white is None or not self.recipe.noise_share:
            return []
        if self.data.white.shape[1] > 1:
            return [self.data.white]  # the second channel is made of the first: no phases to mix
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 999_999)
        bad = self.rows[~self.data.labels[self.rows]]
        drawn = torch.randint(len(bad), (NOISE_POOL,), generator=generator).numpy()
        return [self.data.white, phase_randomised(self.data.images.get(bad[drawn]), generator)]

    def _resume(self, network: Network, optimiser: torch.optim.Optimizer) -> list[Epoch]:
        """Take over what the checkpoint holds; return its history."""
        name, fresh = self.checkpoint, copy.deepcopy(optimiser.state_dict())
        history: list[Epoch] = []

        def take(state: dict[str, Any]) -> None:
            lines = [Epoch(**line) for line in state["history"]]
            network.load_state_dict(state["network"])
            if state["optimiser"] is not None:
                optimiser.load_state_dict(state["optimiser"])
            history.extend(lines)

        def undo() -> None:
            network.load_state_dict(self.start.state_dict())
            optimiser.load_state_dict(fresh)

        if not take_over(name, self.identity, take, undo):
            return []
        done = len(history) * self.round_steps >= self.steps
        finished = "; it is finished" if done else ""
        log.info("Resuming from %s after round %d%s.", name, len(history), finished)
        return history


def forgiving_losses(logits: Tensor, labels: Tensor, power: float) -> Tensor:
    """Return (1 - p^power) / power, (n,), p the probability of the label given, 0 or 1.

    It is cross entropy as the power goes to 0, and the absolute error at 1: what the network is
    sure is labelled wrongly pulls it less (Z. Zhang & M. Sabuncu, NeurIPS 2018).
    """
    log_p = logsigmoid(torch.where(labels > 0, logits, -logits))
    return -torch.expm1(power * log_p) / power if power else -log_p


def interpolated(start: Network, end: Network, way: float) -> Network:
    """Return a network whose weights lie part of the way between two of the same kind."""
    if way == 1:
        return end
    network, first, last = copy.deepcopy(end), start.state_dict(), end.state_dict()
    mixed = {
        name: ((1 - way) * first[name].double() + way * tensor.double()).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in last.items()
    }
    network.load_state_dict(mixed)
    return network


def phase_randomised(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise (n, c, d, d) with the amplitudes of each image, its mean and its range."""
    spectrum = torch.fft.rfft2(images)
    other = torch.fft.rfft2(torch.randn(images.shape, generator=generator))
    turned = spectrum.abs() * other / other.abs().clamp_min(1e-9)
    turned[..., 0, 0] = spectrum[..., 0, 0]
    noise: Tensor = torch.fft.irfft2(turned, s=images.shape[-2:])
    return noise.clamp(float(images.min()), float(images.max()))


def noise_of_spectrum(images: Tensor, n: int, seed: int) -> Tensor:
    """Return n images of Gaussian noise, (n, c, d, d), with the mean power spectrum of images."""
    generator = torch.Generator().manual_seed(seed)
    amplitude = torch.fft.rfft2(images).abs().square().mean(dim=0).sqrt()
    white = torch.fft.rfft2(torch.randn((n, *images.shape[1:]), generator=generator))
    noise: Tensor = torch.fft.irfft2(amplitude * white, s=images.shape[-2:])
    std, mean = torch.std_mean(noise, dim=(2, 3), keepdim=True, correction=0)
    noise = (noise - mean) / std
    return noise.clamp(float(images.min()), float(images.max()))


def _reduced(network: Network) -> bool:
    """Return whether to train in bfloat16: networks made for it, where the processor has it."""
    return network.equivariant and network.device.type == "cpu" and _has_bfloat16()


@cache
def _has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16, as far as Linux says."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text

"""Pre-train the bundled network on simulated images of great variety and on some real ones.

    python benchmarks/pretraining/pretrain.py --maps FOLDER --real FOLDER --work FOLDER

--maps holds densities (.mrc) of real molecules, --real labelled real images (real_images.py says
which are used and which are kept for tests). --work gets the simulated images, which are made
while the network trains on those that are there, by processes of their own or with --j 0 in turn,
and a checkpoint every minute: a run that was stopped or killed goes on with the same command, and
with more --images or --hours it goes on after its end. The rate falls with the budget, whichever of
images and hours is used up first. At any time --export writes the model of the averaged weights,
calibrated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pool import VALIDATION_KINDS, Batches, Pool, Simulator, simulate_shards
from real_images import split_real
from torch.nn.functional import binary_cross_entropy_with_logits

from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.model import load_model
from relion_cryofilter.nn.networks import Network, build_network

CHECKPOINT_SECONDS, LOG_SECONDS, JUDGE_SECONDS = 45, 60, 420
NORM_SHARE = 0.15
"""Of the budget, in which batch norms use the statistics of batches. Then they are kept: that is
what fine-tuning does too, and takes half the time."""

FIRST_SHARDS = 12
"""Before training begins; there are all kinds among them."""

WARM_UP_IMAGES, FINAL_RATE, AVERAGED_STEPS = 20_000, 0.01, 1500


class Averaged:
    """The exponential mean of a network's weights and statistics over `AVERAGED_STEPS`."""

    def __init__(self, network: Network) -> None:
        self.state = {name: value.clone() for name, value in network.state_dict().items()}
        self.steps = 0

    def update(self, network: Network) -> None:
        """Take in the weights after one more step."""
        self.steps += 1
        share = 1 / min(AVERAGED_STEPS, 1 + self.steps / 10)
        with torch.no_grad():
            for name, value in network.state_dict().items():
                self.state[name].lerp_(value, share)


class Training:
    """A network, its optimiser and its mean, and how far they are; kept in a checkpoint."""

    def __init__(self, options: argparse.Namespace, network: Network | None = None) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.network = network or build_network("d4", widths=list(options.widths), dim=options.dim)
        if options.init:
            self.network.load_state_dict(load_model(options.init).network.state_dict())
        self.network.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), options.learning_rate, weight_decay=1e-4
        )
        self.averaged = Averaged(self.network)
        self.images, self.seconds, self.frozen = 0, 0.0, bool(options.init)
        self.path: Path = options.work / f"{options.name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.averaged.state = state["averaged"]
            self.averaged.steps = state["steps"]
            self.images, self.seconds = state["images"], state["seconds"]
            self.frozen = state["frozen"]

    def save(self) -> None:
        """Write the checkpoint, complete or not at all."""
        state = {
            "network": self.network.state_dict(), "optimiser": self.optimiser.state_dict(),
            "averaged": self.averaged.state, "steps": self.averaged.steps,
            "images": self.images, "seconds": self.seconds, "frozen": self.frozen,
        }  # fmt: skip
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    @property
    def used(self) -> float:
        """Return which part of the budget is used up, 0 to 1 and more."""
        hours = self.seconds / 3600
        return max(self.images / self.options.images, hours / self.options.hours)

    def step(self, batch: torch.Tensor, targets: torch.Tensor) -> float:
        """Train on small images (n, 1, dim, dim) and targets (n,) from 0 to 1; return the loss."""
        rate = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1, self.used)))
        rate *= self.options.learning_rate * min(1, (self.images + 1) / WARM_UP_IMAGES)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if self.used > NORM_SHARE and not self.frozen:
            statistics = {
                name: value for name, value in self.averaged.state.items()
                if name.endswith((".mean", ".variance"))
            }  # fmt: skip
            self.network.load_state_dict(statistics, strict=False)
            self.frozen = True
        self.network.train(not self.frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16):
            logits = self.network(batch)
        loss = binary_cross_entropy_with_logits(logits.float(), targets)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.averaged.update(self.network)
        self.images += len(batch)
        return float(loss.detach())

    def averaged_network(self) -> Network:
        """Return a network with the averaged weights, ready to score.

        With --init and --blend they are on the way from the start to there: what was trained
        further on other images is often best between the two (M. Wortsman et al., CVPR 2022).
        """
        options = self.options
        network = copy.deepcopy(self.network)
        state = self.averaged.state
        if options.init and options.blend < 1:
            start = load_model(options.init).network.state_dict()
            state = {
                name: torch.lerp(start[name], value, options.blend) for name, value in state.items()
            }
        network.load_state_dict(state)
        return network.eval().to(memory_format=torch.channels_last)


def train(
    training: Training,
    pool: Pool,
    validation: Pool,
    log: Path,
    simulator: Simulator | None = None,
) -> None:
    """Train until the budget is used up, on what is in the pool, which may grow.

    A simulator makes a shard after every `fresh` images of the options.
    """
    options = training.options
    batches = Batches(pool, options.batch_size, FourierCrop(options.dim), options.seed)
    saved = logged = judged = last = time.monotonic()
    losses: list[float] = []
    while training.used < 1:
        batch, targets = batches.get(training.images)
        losses.append(training.step(batch, targets))
        if simulator and training.images % options.fresh < len(batch):
            simulator.make_next(options.shards)
            pool.grow()
        now = time.monotonic()
        training.seconds += now - last
        last = now
        if now - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = now
        if now - logged > LOG_SECONDS:
            line = {
                "images": training.images, "minutes": round(training.seconds / 60, 1),
                "used": round(training.used, 4), "loss": round(float(np.mean(losses)), 4),
                "pool": len(pool),
            }  # fmt: skip
            if now - judged > JUDGE_SECONDS or training.used >= 1:
                line |= judge(training.averaged_network(), validation, FourierCrop(options.dim))
                judged = now
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            losses, logged = [], now
            pool.grow()
        last = min(last, time.monotonic())
    training.save()


def judge(network: Network, validation: Pool, recipe: FourierCrop) -> dict[str, float]:
    """Return AUC on simulated images, on composites, and the noise above most particles."""
    from sklearn.metrics import roc_auc_score

    found: dict[str, float] = {}
    logits = {kind: validation.logits(network, recipe, kind) for kind in validation.kinds_of_shard}
    for kind in ("simulated", "composite"):
        good = validation.targets(kind) >= 0.5
        if good.any():
            found[kind] = round(float(roc_auc_score(good, logits[kind])), 4)
    if "noise" in logits and "simulated" in logits:
        good = validation.targets("simulated") >= 0.5
        cut = np.quantile(logits["simulated"][good], 0.2)
        found["noise above 80 % recall"] = round(float((logits["noise"] >= cut).mean()), 4)
    return found


def main() -> None:
    """Simulate, train, calibrate, write the model file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="Start from the weights of this model file.")
    parser.add_argument("--name", default="pretrained", help="Of the checkpoint and the log.")
    parser.add_argument("--images", type=float, default=3e6, help="To see in all.")
    parser.add_argument("--hours", type=float, default=24.0, help="To train at most, in all.")
    parser.add_argument("--shards", type=int, default=500, help="Of 1,200 fresh images each.")
    parser.add_argument("--j", type=int, default=1, help="Processes that simulate; 0: --fresh.")
    parser.add_argument(
        "--fresh", type=int, default=4800, help="Images between two shards made in training."
    )
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=3, default=(4, 8, 16))
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--blend", type=float, default=1.0, help="0: the weights of --init, 1: the trained ones."
    )
    parser.add_argument("--export", type=Path, help="Write this model file and stop.")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.export:
        from export import export  # needs what only calibration needs

        export(Training(options), options.export)
        return
    simulator = Simulator(options.maps, options.real, options.work)
    for number in range(len(VALIDATION_KINDS)):
        simulator.make(number, validation=True)
    for number in range(FIRST_SHARDS):
        simulator.make(number)
    context = multiprocessing.get_context("spawn")
    for worker in range(options.j):
        job = (options.maps, options.real, options.work, range(worker, options.shards, options.j))
        context.Process(target=simulate_shards, args=(*job, os.getpid()), daemon=True).start()
    real, _ = split_real(options.real)
    pool = Pool(options.work, real, validation=False)
    validation = Pool(options.work, None, validation=True)
    log = options.work / f"{options.name}.log"
    train(Training(options), pool, validation, log, None if options.j else simulator)


if __name__ == "__main__":
    sys.exit(main())

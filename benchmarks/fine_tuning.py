"""Which ingredients of fine-tuning pay: an ablation on simulated sets of their own.

    python benchmarks/fine_tuning.py [--weights FILE] [--out FILE]

Three sets of random molecules (SNR 0.05, 0.02 and 0.1; 15 micrographs of 84 picks each), not those
of the quality benchmark. Of each, 30 % of the micrographs are the test, against the truth; the
labels of the rest are wrong for 10 or 30 % of the particles and of the junk that looks like
them (off centre, broken, aggregates). The figure is the mean test AUC over sets and seeds; in
brackets, how much pure noise is accepted at a threshold of 95 % recall.
"""

import argparse
import copy
import itertools
import math
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from quality.sets import wrong_labels
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.images.small_images import noise_images
from relion_cryofilter.nn.fitting import forgiving_losses
from relion_cryofilter.nn.model import START_MODEL, load_model
from relion_cryofilter.nn.networks import Network
from relion_cryofilter.simulate import random_molecule, simulate_images

SETS = ((0.05, 96, 0.5), (0.02, 80, 0.4), (0.1, 72, 0.35))  # SNR, box in px, diameter / box
N_IMAGES = 1260
COLUMNS = ((200, 0.1), (None, 0.1), (None, 0.3))  # labels, share of them that is wrong
PLAIN = {"epochs": 12, "rate": 2e-3, "head_rate": 2e-3, "batch": 32, "noise": 0.05}
VARIANTS: dict[str, dict[str, float | bool]] = {
    "plain: all weights, AdamW 2e-3, 12 epochs, norms frozen, best epoch, 5 % pure noise": {},
    "no images of pure noise": {"noise": 0.0},
    "rate 1e-3": {"rate": 1e-3, "head_rate": 1e-3},
    "head ten times faster than the rest": {"rate": 5e-4, "head_rate": 5e-3},
    "head alone": {"rate": 0.0, "head_rate": 1e-2},
    "batch norms not frozen": {"frozen": False},
    "last epoch instead of the best": {"last": True},
    "label smoothing 0.1": {"smoothing": 0.1},
    "forgiving loss, power 0.7": {"forgiveness": 0.7},
    "moving average of the weights": {"average": 0.98},
    "out-of-fold relabelling": {"relabel": True},
    "labels mixed with the start's scores, 0.3": {"teacher": 0.3},
    "synthetic negatives (shifts, overlaps)": {"synthetic": 0.25},
    "ensemble of three": {"ensemble": 3},
}


def logits_of(network: Network, images: Tensor) -> np.ndarray:
    """Return logits (n,)."""
    with torch.no_grad():
        parts = [network(part.contiguous(memory_format=torch.channels_last))
                 for part in images.split(64)]  # fmt: skip
    return np.asarray(torch.cat(parts).numpy())


Scorer = Callable[[Tensor], np.ndarray]


def fit(
    start: Network, images: Tensor, labels: np.ndarray, groups: np.ndarray, seed: int, **how: float
) -> tuple[Scorer, float]:
    """Fine-tune on images (n, 1, d, d); return what scores others, and the share of accepted noise.

    Noise is accepted where it scores more than 5 % of the good validation particles.
    """
    count = int(how.pop("ensemble", 1))
    if how.pop("relabel", False):
        labels = relabelled(start, images, labels, groups, seed, **how)
    networks, cuts = [], []
    for member in range(count):
        folds = StratifiedGroupKFold(6, shuffle=True, random_state=seed + 100 * member)
        train, held = next(folds.split(labels, labels, groups))
        networks.append(tune(start, images, labels, train, held, seed + member, **how))
        good = logits_of(networks[-1], images[held[labels[held]]])
        cuts.append(np.quantile(1 / (1 + np.exp(-good)), 0.05))

    def score(others: Tensor) -> np.ndarray:
        each = [1 / (1 + np.exp(-logits_of(network, others))) for network in networks]
        return np.asarray(np.mean(each, axis=0))

    return score, float((score(pure_noise(500, seed + 999)) >= np.mean(cuts)).mean())


def relabelled(
    start: Network, images: Tensor, labels: np.ndarray, groups: np.ndarray, seed: int, **how: float
) -> np.ndarray:
    """Return labels, turned where a network that did not see the micrograph is sure of it."""
    found, folds = labels.copy(), StratifiedGroupKFold(3, shuffle=True, random_state=seed)
    for train, held in folds.split(labels, labels, groups):
        network = tune(start, images, labels, train, held, seed, **how)
        score = 1 / (1 + np.exp(-logits_of(network, images[held])))
        found[held] = np.where(score > 0.9, True, np.where(score < 0.1, False, labels[held]))
    return found


def losses(logits: Tensor, targets: Tensor, forgiveness: float) -> Tensor:
    """Return the loss of each image; soft targets, as smoothing makes, are for cross entropy."""
    if forgiveness:
        return forgiving_losses(logits, targets, forgiveness)
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def made_up(images: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Return `count` negatives made of good images: shifted, or two of them added."""
    made = []
    for row, other in rng.integers(len(images), size=(count, 2)):
        shift = tuple((rng.choice([-1, 1], 2) * rng.integers(8, 16, 2)).tolist())
        image = torch.roll(images[row], shift, (-2, -1))
        if rng.random() < 0.5:
            image = (image + torch.roll(images[other], (-shift[0], -shift[1]), (-2, -1))) / 2**0.5
        made.append(image)
    return torch.stack(made)


def pure_noise(count: int, seed: int) -> Tensor:
    """Return small images of white noise (count, 1, 48, 48)."""
    return FourierCrop(48)(noise_images(96, count, seed))


def tune(
    start: Network, images: Tensor, labels: np.ndarray, train: np.ndarray, held: np.ndarray,
    seed: int, *, epochs: int, rate: float, head_rate: float, batch: int, frozen: bool = True,
    last: bool = False, smoothing: float = 0.0, average: float = 0.0,
    synthetic: float = 0.0, noise: float = 0.0, teacher: float = 0.0, forgiveness: float = 0.0,
) -> Network:  # fmt: skip
    """Return a copy of the network, fine-tuned."""
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(start)
    body = [part for name, part in network.named_parameters() if not name.startswith("head")]
    optimiser = torch.optim.AdamW(
        [{"params": body, "lr": rate}, {"params": network.head.parameters(), "lr": head_rate}]
    )
    inputs, targets = images[train], torch.from_numpy(labels[train]).float()
    if teacher:
        known = torch.from_numpy(1 / (1 + np.exp(-logits_of(start, inputs))))
        targets = (1 - teacher) * targets + teacher * known
    if synthetic:
        rng = np.random.default_rng(seed)
        extra = made_up(inputs[targets > 0.5], int(synthetic * len(inputs)), rng)
        inputs, targets = torch.cat([inputs, extra]), torch.cat([targets, torch.zeros(len(extra))])
    if noise:
        extra = pure_noise(int(noise * len(inputs)), seed)
        inputs, targets = torch.cat([inputs, extra]), torch.cat([targets, torch.zeros(len(extra))])
    share = float(targets.mean())
    weights = targets * 0.5 / share + (1 - targets) * 0.5 / (1 - share)
    steps = epochs * math.ceil(len(inputs) / batch)
    kept, best, done = copy.deepcopy(network), -1.0, 0
    mean = copy.deepcopy(network)
    for _ in range(epochs):
        network.train(not frozen)
        for rows in torch.randperm(len(inputs), generator=generator).split(batch):
            factor = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done / steps))
            for group, base in zip(optimiser.param_groups, (rate, head_rate)):
                group["lr"] = base * factor
            wanted = targets[rows] * (1 - smoothing) + smoothing / 2
            found = network(inputs[rows].contiguous(memory_format=torch.channels_last))
            loss = (weights[rows] * losses(found, wanted, forgiveness)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            done += 1
            with torch.no_grad():
                for ours, theirs in zip(mean.state_dict().values(), network.state_dict().values()):
                    ours.lerp_(theirs, 1 - average)
        network.eval()
        chosen = mean.eval() if average else network
        auc = float(roc_auc_score(labels[held], logits_of(chosen, images[held])))
        if auc > best or last:
            kept, best = copy.deepcopy(chosen), auc
    return kept.eval()


def main() -> None:
    """Run every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=START_MODEL)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="Only the variants whose names hold this.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fine_tuning.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.weights)
    start = model.network.eval()
    sets = []
    for number, (snr, box, size) in enumerate(SETS):
        molecule = random_molecule(np.random.default_rng(900 + number), size * box * 3.0)
        made = simulate_images(900 + number, N_IMAGES, box, snr, molecules=[molecule])
        small = torch.cat(
            [FourierCrop(48)(part) for part in torch.from_numpy(made.images).split(512)]
        )
        sets.append((small, made.labels > 0, made.kinds, made.micrographs))
    lines = []
    for name, changes in VARIANTS.items():
        if options.only not in name:
            continue
        cells = []
        for labels, share in COLUMNS:
            aucs, accepted = [], []
            for (small, truth, kinds, groups), seed in itertools.product(
                sets, range(options.seeds)
            ):
                splitter = GroupShuffleSplit(1, test_size=0.3, random_state=seed)
                rows, test = next(splitter.split(truth, groups=groups))
                given = wrong_labels(truth, kinds, share, seed)
                if labels:
                    rows = np.random.default_rng(seed).choice(rows, labels, replace=False)
                how = {**PLAIN, **changes}
                score, share_of_noise = fit(
                    start, small[rows], given[rows], groups[rows], seed, **how
                )  # type: ignore[arg-type]
                aucs.append(roc_auc_score(truth[test], score(small[test])))
                accepted.append(share_of_noise)
            cells.append(f"{np.mean(aucs):.4f} ({np.mean(accepted):.0%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    summary, _, about = (__doc__ or "").partition("\n\n    python")
    head = f"# {summary}\n\n{about.partition('FILE]' + chr(10) * 2)[2].partition('FILE]')[0]}\n"
    head += f"Model {model.hash}, {options.seeds} seeds, torch {torch.__version__}, Python "
    head += f"{platform.python_version()}.\n\n| variant | 200 labels, 10 % wrong | "
    head += "all (about 880), 10 % wrong | all, 30 % wrong |\n|---|---|---|---|\n"
    options.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

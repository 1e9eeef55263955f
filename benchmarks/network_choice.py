"""Which network is the default: accuracy and speed of candidates, pre-trained alike.

    python benchmarks/network_choice.py --work FOLDER [--epochs 3] [--out FILE]

FOLDER holds the simulated images of benchmarks/pretraining/pretrain.py (or they are made). Every
candidate sees the same micrographs, for the same number of epochs, with the same rate; one
micrograph of ten is kept for the figure. Those that are not D4-equivariant are trained on flips
and quarter turns. Speed is that of the network alone, float32, channels last, batch norms folded,
one thread, micro-batches of 32, the best of five; with --epochs 0 nothing but speed is measured,
for a machine that was busy in training.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from relion_cryofilter.images.preprocess import FourierCrop, d4_views
from relion_cryofilter.images.small_images import InMemory
from relion_cryofilter.nn.d4 import D4
from relion_cryofilter.nn.networks import Network, plane
from relion_cryofilter.nn.trainer import Settings, Trainer, TrainingData, predict
from relion_cryofilter.particles.splits import Split
from relion_cryofilter.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent / "pretraining"))

from variety import simulate_varied


class ConvNorm(nn.Module):
    """Convolution and batch norm; `fold` makes them one."""

    def __init__(self, cin: int, cout: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = (size - 1) // 2
        self.conv = nn.Conv2d(cin, cout, size, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(cout)

    def fold(self) -> None:
        """Fold the batch norm into the convolution."""
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        return self.norm(self.conv(x))


class Residual(Network):
    """Stem at half resolution and three residual stages; mean and max over the image."""

    name = "residual"
    channels = 1

    def __init__(self, widths: tuple[int, int, int], depthwise: bool = False) -> None:
        super().__init__()
        first, second, third = widths
        self.dim, self.feature_count = 48, 2 * third
        self.kwargs = {"widths": list(widths), "depthwise": depthwise}

        def conv(cin: int, cout: int) -> nn.Module:
            if not depthwise:
                return ConvNorm(cin, cout, 3)
            return nn.Sequential(ConvNorm(cin, cin, 3, groups=cin), ConvNorm(cin, cout, 1))

        self.stem = ConvNorm(1, first, 6, stride=2)
        self.blocks = nn.ModuleList(
            [conv(first, first), conv(first, second), conv(second, second),
             conv(second, third), conv(third, third)]
        )  # fmt: skip
        self.head = nn.Linear(self.feature_count, 1)

    def features(self, x: Tensor) -> Tensor:
        """Return (n, 2·third)."""
        x = torch.relu(self.stem(plane(x, 0)))
        a, b, c, d, e = self.blocks
        x = torch.relu(x + a(x))
        x = torch.relu(b(avg_pool2d(x, 2)))
        x = torch.relu(x + c(x))
        x = torch.relu(d(avg_pool2d(x, 2)))
        x = torch.relu(x + e(x)).flatten(2)
        return torch.cat([x.mean(2), x.amax(2)], dim=1)


CANDIDATES = {
    "residual 16-32-64": lambda: Residual((16, 32, 64)),
    "residual 24-48-64": lambda: Residual((24, 48, 64)),
    "depthwise 32-64-128": lambda: Residual((32, 64, 128), depthwise=True),
    "D4 3-6-12": lambda: D4((3, 6, 12)),
    "D4 4-8-16": lambda: D4((4, 8, 16)),
    "D4 6-12-16": lambda: D4((6, 12, 16)),
}


def speed(network: Network) -> float:
    """Return images per second of one thread."""
    x = torch.randn(32, 1, 48, 48).contiguous(memory_format=torch.channels_last)
    best = 0.0
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(30):
                network(x)
            best = max(best, 30 * len(x) / (time.perf_counter() - start))
    return best


def _folded_speed(network: Network) -> float:
    network.eval()
    for module in network.modules():
        if isinstance(module, ConvNorm):
            module.fold()
    network.to(memory_format=torch.channels_last)
    return speed(network)


def judge(network: Network, images: InMemory, labels: np.ndarray, split: Split, epochs: int) -> str:
    """Train one candidate; return the cells of its line."""
    equivariant = network.equivariant
    weights = sum(parameter.numel() for parameter in network.parameters())
    if not epochs:
        rate = _folded_speed(network)
        return f"{weights:,} | – | – | {rate:,.0f} | {rate if equivariant else rate / 8:,.0f} | –"
    settings = Settings(epochs=epochs, patience=epochs, learning_rate=3e-3, seed=1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            network,
            TrainingData(images, labels, split),
            settings,
            Path(folder) / "checkpoint.pt",
            {},
        )
        trainer.run(Progress(1, "image steps"))
    seconds = (time.monotonic() - start) / epochs
    network.eval()
    rows, truth = split.validation, labels[split.validation]
    single = roc_auc_score(truth, predict(network, images, rows))
    total = torch.zeros(len(rows))
    for view in d4_views(images.get(rows)):
        total += torch.sigmoid(predict(network, InMemory(view), np.arange(len(rows))))
    rate = _folded_speed(network)
    tta = roc_auc_score(truth, total)
    return (
        f"{weights:,} | {single:.4f} | {tta:.4f} | {rate:,.0f} | "
        f"{rate if equivariant else rate / 8:,.0f} | {seconds:.0f}"
    )


def main() -> None:
    """Train every candidate and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--micrographs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/network_choice.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    small, labels, groups = stored(options.work, options.micrographs if options.epochs else 10)
    test = np.flatnonzero(groups % 10 == 0)
    split = Split(np.flatnonzero(groups % 10 != 0), test, test, "micrograph", groups, "micrograph")
    lines = []
    for name, build in CANDIDATES.items():
        torch.manual_seed(1)
        cells = judge(build(), InMemory(torch.from_numpy(small)), labels, split, options.epochs)
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], flush=True)
    if not options.epochs:
        return
    text = (__doc__ or "").partition("\n\n    python")[0] + "\n\n"
    text = "# " + text + (__doc__ or "").partition("[--out FILE]\n\n")[2]
    text += f"\n{len(labels):,} images of {options.micrographs} micrographs, {options.epochs} "
    text += f"epochs. torch {torch.__version__}, Python {platform.python_version()}.\n\n"
    text += "| network | weights | AUC | AUC, 8-fold TTA | images/s | scores/s of the better | "
    text += "s/epoch |\n|---|---|---|---|---|---|---|\n"
    options.out.write_text(text + "\n".join(lines) + "\n")


def stored(work: Path, micrographs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return small images, labels and micrograph numbers of the first micrographs."""
    parts = [np.load(path) for path in sorted((work / "shards").glob("shard_*.npz"))]
    if not parts:
        made = simulate_varied(1, range(micrographs))
        small = FourierCrop(48)(torch.from_numpy(made.images)).half().numpy()
        return small, made.labels.astype(bool), made.micrographs
    groups = np.concatenate([part["micrographs"] for part in parts])
    first = groups < micrographs
    boxes = np.concatenate([part["images"] for part in parts])[first]
    small = FourierCrop(48)(torch.from_numpy(boxes)).half().numpy()
    return small, np.concatenate([part["targets"] for part in parts])[first] >= 0.5, groups[first]


if __name__ == "__main__":
    main()

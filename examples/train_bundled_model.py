"""Train the small model that the package brings, on images that the package simulates.

Run it from a checkout; it writes relion_cryofilter/models/default.safetensors:

    python examples/train_bundled_model.py

Every sixth micrograph is held out for validation; they choose the threshold (95 % of the
particles kept) and the figures in the model's provenance.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import relion_cryofilter
from relion_cryofilter.data.simulate import SimulatedImages, simulate_images
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.preprocess import FourierCrop, d4_views

SNRS = (0.03, 0.05, 0.1, 0.2)
OUT = Path(relion_cryofilter.__file__).parent / "models" / "default.safetensors"


def simulate(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Simulate n images, a share at each SNR, each share of its own molecules.

    Returns small images (n, 1, 48, 48), labels (n,) and micrograph numbers (n,).
    """
    recipe, parts, labels, micrographs = FourierCrop(48), [], [], []
    for number, snr in enumerate(SNRS):
        part: SimulatedImages = simulate_images(
            np.random.default_rng([seed, number]), n // len(SNRS), snr=snr, molecules=8
        )
        parts.append(recipe(torch.from_numpy(part.images)))
        labels.append(part.labels)
        micrographs.append(np.asarray(part.micrographs) + 100_000 * number)
    return torch.cat(parts), np.concatenate(labels), np.concatenate(micrographs)


def train(small: torch.Tensor, labels: np.ndarray, epochs: int, seed: int) -> torch.nn.Module:
    """Train `straight` on small images with D4 augmentation, one-cycle learning rate."""
    torch.manual_seed(seed)
    network = build_network("straight", f=16, dim=48).to(memory_format=torch.channels_last)
    target = torch.from_numpy(labels.astype(np.float32))
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-3)
    steps = epochs * (len(small) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(small))[: len(small) // 64 * 64].split(64):
            views = list(d4_views(small[rows]))
            batch = views[int(torch.randint(8, ()))]
            logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * 64
        print(f"epoch {epoch + 1} of {epochs}: loss {total / len(small):.4f}", flush=True)
    return network


def main() -> None:
    """Simulate, train, choose the threshold, write the model file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=12_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    start = time.monotonic()
    small, labels, micrographs = simulate(options.n, options.seed)
    held_out = micrographs % 6 == 0
    train_rows = torch.from_numpy(~held_out)
    network = train(small[train_rows], labels[~held_out], options.epochs, options.seed)
    model = Model(network, FourierCrop(48), threshold=0.5)
    scores = model.probabilities(small[~train_rows]).numpy()
    truth = labels[held_out].astype(bool)
    threshold = round(float(np.quantile(scores[truth], 0.05)), 3)
    provenance = {
        "made_by": "examples/train_bundled_model.py",
        "data": f"{options.n} simulated images, box 64 px, 3 Å/px, SNR {SNRS}",
        "seed": options.seed,
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
        "training_seconds": round(time.monotonic() - start),
        "validation": {
            "data": "same simulator, held-out micrographs of the same molecules",
            "n": len(truth),
            "auc": round(float(roc_auc_score(truth, scores)), 4),
            "junk_accepted": round(float((scores[~truth] >= threshold).mean()), 4),
            "recall": 0.95,
        },
    }
    Model(network, FourierCrop(48), threshold, provenance=provenance).save(options.out)
    print(f"wrote {options.out}: threshold {threshold}, {provenance['validation']}")


if __name__ == "__main__":
    main()

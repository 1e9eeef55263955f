"""AUC of the 2020 networks and of the 2020 preprocessing, on real and simulated particles.

    python benchmarks/networks_2020.py --real FOLDER [--out benchmarks/results/networks_2020.md]

For each data set: training on 70 % of the micrographs, best epoch by validation AUC on 15 %, and
the AUC of the remaining 15 % with its 95 % interval from a bootstrap over micrographs, for each
seed of split, weights and order. FOLDER holds, for each real set, NAME.mrcs and NAME.csv (image,
micrograph, label); the simulated sets are made by the package. Nothing is tuned on these figures:
all options are the defaults of `train`.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import relion_cryofilter
from relion_cryofilter.simulate import simulate_project

REAL = ("apoferritin_10146", "trpv1_10059")
SIMULATED = {"simulated, SNR 0.05": (0.05, 11), "simulated, SNR 0.02": (0.02, 12)}
MODELS = {
    "straight, 2020 preprocessing (28 px)": "--model straight --preprocess blur_resize",
    "roberts, 2020 preprocessing (28 px)": "--model roberts --preprocess blur_resize",
    "straight, Fourier crop (28 px)": "--model straight --preprocess fourier_crop",
    "roberts, Fourier crop (28 px)": "--model roberts --preprocess fourier_crop",
}


def write_labels(folder: Path, rows: list[tuple[str, str, bool]]) -> tuple[Path, Path]:
    """Write good.star and bad.star from (image, micrograph, good) rows."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "good.star", folder / "bad.star"
    for path, kind in zip(paths, (True, False)):
        text = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n"
        text += "".join(f"{image} {mic}\n" for image, mic, good in rows if good == kind)
        path.write_text(text)
    return paths


def real_set(source: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """Write the labels of a real set, paths absolute."""
    with (source / f"{name}.csv").open() as file:
        rows = [
            (row["image"].replace("@", f"@{source.resolve()}/"), row["micrograph"],
             row["label"] == "1")
            for row in csv.DictReader(file)
        ]  # fmt: skip
    return write_labels(folder, rows)


def simulated_set(snr: float, seed: int, folder: Path) -> tuple[Path, Path]:
    """Simulate a set of 2,520 images on 30 micrographs and write its labels."""
    simulate_project(folder, n_micrographs=30, particles_per_micrograph=84, snr=snr, seed=seed)
    rows = []
    with (folder / "truth.csv").open() as file:
        for row in csv.DictReader(file):
            micrograph = row["image"].rpartition("/")[2]
            image = row["image"].replace("@", f"@{folder.resolve()}/")
            rows.append((image, micrograph, row["real"] == "1"))
    return write_labels(folder, rows)


def train(pos: Path, neg: Path, words: str, seed: int, folder: Path) -> dict[str, float]:
    """Train in a process of its own; return AUC, interval and seconds."""
    command = [sys.executable, "-m", "relion_cryofilter", "train", "--pos", pos, "--neg", neg]
    command += ["--o", f"{folder}/", "--seed", seed, "--j", "1", "--quiet", *words.split()]
    start = time.monotonic()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((folder / "metrics.json").read_text())
    return {**report["auc"], "seconds": time.monotonic() - start, "n": report["n"]}


def main() -> None:
    """Run every model on every set and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/networks_2020.md"))
    options = parser.parse_args()
    pool = ThreadPoolExecutor(os.cpu_count())
    with tempfile.TemporaryDirectory() as temporary, pool:
        root = Path(temporary)
        sets = {name: real_set(options.real, name, root / name) for name in REAL}
        for number, (name, (snr, seed)) in enumerate(SIMULATED.items()):
            sets[name] = simulated_set(snr, seed, root / f"sim{number}")
        rows = []
        for name, (pos, neg) in sets.items():
            for model, words in MODELS.items():
                folders = [root / "job" / f"{len(rows)}_{seed}" for seed in range(options.seeds)]
                runs = list(
                    pool.map(partial(train, pos, neg, words), range(options.seeds), folders)
                )
                rows.append(line(name, model, runs))
                print(rows[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(rows, options.seeds))


def line(name: str, model: str, runs: list[dict[str, float]]) -> str:
    """Return one line of the table."""
    mean = np.mean([run["value"] for run in runs])
    each = ", ".join(f"{run['value']:.3f} [{run['low']:.3f}, {run['high']:.3f}]" for run in runs)
    seconds = np.mean([run["seconds"] for run in runs])
    return f"| {name} | {model} | {mean:.3f} | {each} | {seconds:.0f} |"


def report(rows: list[str], seeds: int) -> str:
    """Return the results file."""
    text = (__doc__ or "").partition("\n\n    python")[0]
    head = f"# {text}\n\nMade by `benchmarks/networks_2020.py` on {datetime.date.today()}: "
    head += f"relion_cryofilter {relion_cryofilter.__version__}, torch {torch.__version__}, "
    head += f"numpy {np.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores.\n"
    head += f"{seeds} seeds of split, weights and order; test AUC of each with its 95 % interval "
    head += "over micrographs.\n`seconds` is a whole `train` job on one core, figures included.\n"
    head += 'Label 0 of the real sets is "away from every annotated particle" and holds some '
    head += "particles.\n\n| data | network | mean AUC | AUC of each seed | seconds |\n"
    return head + "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()

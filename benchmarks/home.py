"""How well a model knows when it is far from home: the calibration of `relion_cryofilter.nn.home`.

    python benchmarks/home.py --real FOLDER --maps FOLDER --work FOLDER [--seeds 2] [--out FILE]

Each specimen is a home: a model is fine-tuned on the labels of half of its micrographs, as `train`
does it. A run is a set that it scores: three fifths of the micrographs of the other half, drawn 20
times (home), or a thousand images of another specimen (away). Counted is how many runs are warned
of. The simulated specimens differ in nothing but the molecule and the pixel size that makes it half
a box wide; the real ones are of several microscopes, some without labels, which are away only. The
limits were chosen on seeds 0 and 1; the halves of other seeds are other micrographs.
"""

import argparse
import csv
import logging
import sys
from pathlib import Path

import mrcfile
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "pretraining"))

from sets import LabelledImages
from sklearn.metrics import roc_auc_score
from variety import molecule_of_map

from relion_cryofilter.commands.train import train
from relion_cryofilter.nn.home import FAR, HOME, SAMPLE, Home, sample_groups
from relion_cryofilter.nn.model import Model, load_model
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.simulate import simulate_images

LABELLED = ("trpv1_10059", "apoferritin_10146", "klh_far")
AWAY_ONLY = (
    "betagal_tutorial_accepted", "betagal_tutorial_topaz_unfiltered", "junk_textures",
    "real_negatives",
)  # fmt: skip
N_SIMULATED, BOX_PX, SNR, SIZE = 1344, 64, 0.05, 0.5
HOME_RUNS, SHARE = 20, 0.6
LOST = 0.05  # so much less AUC than at home is a model that does not carry over


def all_sets(real: Path, maps: Path, work: Path) -> list[LabelledImages]:
    """Return all sets; `kinds` are ``?`` where a set has no labels, or an image none."""
    sets = []
    for name in (*LABELLED, *AWAY_ONLY):
        with (real / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        kinds = np.array([row["label"] if name in LABELLED else "?" for row in rows])
        kinds = np.where(kinds == "-1", "?", kinds)
        of = [row.get("micrograph") or f"{number // 60:04d}" for number, row in enumerate(rows)]
        sets.append(LabelledImages(name, real / f"{name}.mrcs", np.array(of), kinds == "1", kinds))
    for seed, path in enumerate(sorted(maps.glob("*.mrc")), 300):
        stack = work / "sets" / f"sim_{path.stem}.mrcs"
        table = stack.with_suffix(".npz")
        if not table.exists():
            with mrcfile.open(path, permissive=True) as file:
                molecule = molecule_of_map(file.data, float(file.voxel_size.x) or 3.0)
            pixel_size = molecule.diameter_angstrom / (SIZE * BOX_PX)
            made = simulate_images(
                seed, N_SIMULATED, BOX_PX, SNR, pixel_size_angstrom=pixel_size,
                molecules=[molecule],
            )  # fmt: skip
            stack.parent.mkdir(parents=True, exist_ok=True)
            mrcfile.write(stack, made.images, overwrite=True)
            np.savez(table, kinds=made.kinds, micrographs=made.micrographs)
        made = np.load(table)
        names = np.array([f"{number:03d}.mrc" for number in made["micrographs"]])
        sets.append(
            LabelledImages(stack.stem, stack, names, made["kinds"] == "particle", made["kinds"])
        )
    return sets


def model_of(data: LabelledImages, seed: int, work: Path) -> tuple[Model, np.ndarray]:
    """Return a model trained on half of the micrographs, made once, and (n,) those of the rest."""
    folder, names = work / "models" / f"{data.name}_{seed}", np.unique(data.micrographs)
    held = np.random.default_rng([seed, 9]).permutation(names)[: len(names) // 2]
    inside = np.isin(data.micrographs, held)
    if not (folder / "model.safetensors").exists():
        rows = np.flatnonzero(~inside & (data.kinds != "?"))
        good, bad = data.write_labels(folder, rows, data.good)
        train(TrainOptions(pos=(good,), neg=(bad,), o=folder, seed=seed, j=1, quiet=True))
    return load_model(folder / "model.safetensors"), np.flatnonzero(inside)


def look(model: Model, data: LabelledImages, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (m,) and features (m, k) of some images."""
    parts = [
        model.probabilities_and_features(model.preprocess(part))
        for part in torch.from_numpy(data.images(rows)).split(256)
    ]
    scores, features = (torch.cat(part).numpy() for part in zip(*parts))
    return scores, features


def share_outside(home: Home, features: np.ndarray, micrographs: np.ndarray) -> float:
    """Return what `score` would compare with its limit."""
    rows, groups = sample_groups(np.unique(micrographs, return_inverse=True)[1])
    return home.outside(features[rows], groups)


def auc(data: LabelledImages, rows: np.ndarray, scores: np.ndarray) -> float:
    """Return the AUC of those with labels; NaN without."""
    known = data.kinds[rows] != "?"
    good = data.good[rows[known]]
    return float(roc_auc_score(good, scores[known])) if len(set(good.tolist())) == 2 else np.nan


def main() -> None:
    """Make sets and models where they are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("real", "maps", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/home.md")
    options = parser.parse_args()
    logging.getLogger("relion_cryofilter").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    sets = all_sets(options.real, options.maps, options.work)
    lines, home_runs, away_runs = [], [], []
    homes = [data for data in sets if data.name not in AWAY_ONLY]
    for seed, data in ((seed, data) for seed in options.seeds for data in homes):
        model, held = model_of(data, seed, options.work)
        home = Home.from_dict(model.provenance[HOME])
        scores, features = look(model, data, held)
        here, own = auc(data, held, scores), []
        names = np.unique(data.micrographs[held])
        for _ in range(HOME_RUNS):
            drawn = rng.permutation(names)[: max(4, round(SHARE * len(names)))]
            inside = np.isin(data.micrographs[held], drawn)
            own.append(share_outside(home, features[inside], data.micrographs[held][inside]))
        others = []
        for other in sets:
            if other is not data:
                n = len(other.micrographs)
                rows = np.sort(rng.permutation(n)[:SAMPLE])
                scores, features = look(model, other, rows)
                share = share_outside(home, features, other.micrographs[rows])
                others.append((other, share, here - auc(other, rows, scores)))
        home_runs += own
        away_runs += others
        found = [
            [share > FAR for other, share, _ in others if other.name.startswith("sim") == simulated]
            for simulated in (True, False)
        ]
        lines.append(
            f"| {data.name}, {seed} | {len(names)} | {here:.3f} | {np.mean(own):.0%} | "
            f"{np.mean(np.array(own) > FAR):.0%} | {np.mean(found[0]):.0%} | "
            f"{np.mean(found[1]):.0%} |"
        )
        print(lines[-1], flush=True)
    text = summary(lines, np.array(home_runs), away_runs)
    options.out.write_text(text)
    print(text)


def summary(
    lines: list[str], home: np.ndarray, away: list[tuple[LabelledImages, float, float]]
) -> str:
    """Return the tables as Markdown."""
    shares, lost = (np.array([run[part] for run in away]) for part in (1, 2))
    simulated = np.array([run[0].name.startswith("sim") for run in away])
    kinds = {
        "other micrographs of the training's session": home,
        "other specimens, all": shares,
        "other specimens, real": shares[~simulated],
        "other specimens, simulated": shares[simulated],
        f"other specimens where the AUC is {LOST:g} lower or worse": shares[lost > LOST],
        f"other specimens where it is not (known: {np.isfinite(lost).sum()})": shares[lost <= LOST],
    }
    table = "\n".join(
        f"| {name} | {len(runs)} | {np.nanmean(runs):.0%} | {np.mean(runs > FAR):.1%} |"
        for name, runs in kinds.items()
    )
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    return (
        f"# Far from home\n\n`python benchmarks/home.py`. {about}\n"
        "| scored | runs | particles outside, mean | warned |\n|---|---|---|---|\n"
        f"{table}\n\n| home, seed | its other micrographs | AUC there | particles outside there | "
        "warned there | warned of simulated sets | warned of real sets |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()

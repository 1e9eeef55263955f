"""Models on sets that no pre-training has seen, without labels, and on junk of many kinds.

    python benchmarks/quality/zero_shot.py --maps FOLDER --real FOLDER --work FOLDER [--models A B]

The sets are those of the quality benchmark and the half of KLH that the pre-training leaves out;
the linear baseline, logistic regression on radial profile and spectrum with all labels, scores
each micrograph by a fit without it. Junk is noise of four makes, noise with the spectra of each
set, and the real junk that is kept from the pre-training by micrograph. `score --adapt` sees the
images of each set, no labels. Nothing is tuned here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import torch
from runs import score_images
from sets import all_sets
from table import _table, _weighted_auc

from relion_cryofilter.commands.score import score
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.files import ADAPTED_MODEL
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.nn.linear import out_of_fold_scores, radial_features
from relion_cryofilter.nn.model import BUNDLED_MODEL, Model, Models, load_model
from relion_cryofilter.options import ScoreOptions
from relion_cryofilter.thresholds import DECIMALS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretraining"))

from pool import random_phases
from real_images import UNIT, split_real
from textures import filtered, frequencies, random_ctf

from relion_cryofilter.simulate.micrograph import ctf

DRAWS, N_NOISE = 500, 1000
KEPT_KLH = "klh_far, half"


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images (n, box, box) with the truth (n,) and numbers of micrographs (n,)."""

    name: str
    images: np.ndarray
    good: np.ndarray
    clusters: np.ndarray

    @property
    def simulated(self) -> bool:
        """Whether it is of the simulator."""
        return self.name.startswith("sim")


def labelled_sets(real: Path, maps: Path, work: Path) -> Iterator[Labelled]:
    """Yield all sets, the real ones first."""
    kept = split_real(real)[1]
    klh = kept.take(np.flatnonzero(np.char.startswith(kept.micrographs, "klh")))
    of = np.unique(klh.micrographs, return_inverse=True)[1]
    yield Labelled(KEPT_KLH, klh.images.astype(np.float32) / UNIT, klh.good, of)
    for data in all_sets(real, maps, work):
        of = np.unique(data.micrographs, return_inverse=True)[1]
        images = data.images(np.arange(len(data.good)))
        yield Labelled(data.name, images, data.good, of)


def junk_sets(real: Path, sets: list[Labelled]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and images (n, box, box) of what nobody would keep."""
    rng, box = np.random.default_rng(0), 64
    white = rng.normal(size=(N_NOISE, box, box))
    f = frequencies((box, box))
    yield "noise, white", white
    for power in (0.5, 1.0):
        gain = np.maximum(f, 2 / box) ** -power
        gain[0, 0] = 0
        yield f"noise, 1/f^{power:g} amplitudes", filtered(white, gain)
    waves = [
        filtered(part, ctf((box, box), np.exp(rng.uniform(*np.log([2, 7]))), random_ctf(rng)))
        for part in np.array_split(white, 50)
    ]
    yield "noise, CTF-shaped", np.concatenate([part / part.std() for part in waves])
    more = np.array_split(rng.normal(size=white.shape), 50)
    mixed = [part / part.std() + rng.uniform(0.3, 2) * shot for part, shot in zip(waves, more)]
    yield "noise, CTF-shaped and white", np.concatenate(mixed)
    generator = torch.Generator().manual_seed(0)
    for data in sets:
        some = torch.from_numpy(data.images[rng.choice(len(data.images), N_NOISE)])
        yield f"noise, spectra of {data.name}", random_phases(some, generator).numpy()
    kept = split_real(real)[1]
    for kind in np.unique(kept.kinds[~kept.good]):
        rows = np.flatnonzero((kept.kinds == kind) & ~kept.good)
        yield f"real, {kind}", kept.images[rows].astype(np.float32) / UNIT


def auc_cell(data: Labelled, scores: np.ndarray) -> tuple[float, str]:
    """Return the AUC, and it with its interval over micrographs as text."""
    n = int(data.clusters.max()) + 1
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).T
    draws = np.concatenate([np.ones((n, 1), int), draws], axis=1)
    aucs = _weighted_auc(data.good, scores, draws[data.clusters])
    low, high = np.nanquantile(aucs[1:], [0.025, 0.975])
    return float(aucs[0]), f"{aucs[0]:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Score everything with every model and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", default=[BUNDLED_MODEL])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/zero_shot.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = list(labelled_sets(options.real, options.maps, options.work))
    models = [load_model(path) for path in options.models]
    names = [f"{path.stem} ({model.hash})" for path, model in zip(options.models, models)]
    scores = {
        (data.name, name): score_images(model, np.asarray(data.images, np.float32), tta=False)
        for data in sets for name, model in zip(names, models)
    }  # fmt: skip
    text = [f"# {(__doc__ or '').splitlines()[0]}", *(__doc__ or "").split("\n\n")[2:]]
    text += ["## AUC without labels", _auc_table(sets, names, scores)]
    text += ["## Accepted at the model's own threshold, at 0.5, and at the balanced one"]
    junk = {what: np.asarray(images, np.float32) for what, images in junk_sets(options.real, sets)}
    text += [_accepted_table(junk, sets, names, models, scores)]
    text += ["## Thresholds without labels", _thresholds_table(sets, names, models, scores)]
    text += ["## With --adapt", _adapted_table(junk, sets, options.work)]
    options.out.write_text("\n\n".join(part.strip() for part in text) + "\n")
    print(f"wrote {options.out}")


def _auc_table(
    sets: list[Labelled], names: list[str], scores: dict[tuple[str, str], np.ndarray]
) -> str:
    lines, found = [], {}
    for data in sets:
        small = FourierCrop(48)(torch.from_numpy(np.asarray(data.images, np.float32)))[:, 0]
        linear = out_of_fold_scores(radial_features(small.numpy()), data.good, data.clusters)
        cells = [auc_cell(data, scores[data.name, name]) for name in names]
        found[data.name] = [auc for auc, _ in cells]
        lines.append([data.name, *(cell for _, cell in cells), auc_cell(data, linear)[1]])
    for what, simulated in (("real", False), ("simulated", True)):
        aucs = [found[data.name] for data in sets if data.simulated == simulated]
        lines.append([f"mean, {what}", *(f"{auc:.3f}" for auc in np.mean(aucs, axis=0)), ""])
    return _table(["set", *names, "linear, all labels, out of fold"], lines)


def _accepted_table(
    junk: dict[str, np.ndarray],
    sets: list[Labelled],
    names: list[str],
    models: list[Model],
    scores: dict[tuple[str, str], np.ndarray],
) -> str:
    balanced = ThresholdRequest.parse("balanced")
    cuts_of = [(model.threshold, 0.5, model.curve.threshold(balanced)) for model in models]
    rows = [
        (f"good of {data.name}", [scores[data.name, name][data.good] for name in names])
        for data in sets
    ]
    for kind, images in junk.items():
        rows.append((kind, [score_images(model, images, tta=False) for model in models]))
    lines = [
        [what, f"{len(of_each[0]):,}",
         *(", ".join(f"{(values >= cut).mean():.1%}" for cut in cuts)
           for values, cuts in zip(of_each, cuts_of))]
        for what, of_each in rows
    ]  # fmt: skip
    head = [f"{name}, {' / '.join(f'{cut:.3f}' for cut in cuts)}"
            for name, cuts in zip(names, cuts_of)]  # fmt: skip
    return _table(["what", "images", *head], lines)


def _thresholds_table(
    sets: list[Labelled],
    names: list[str],
    models: list[Model],
    scores: dict[tuple[str, str], np.ndarray],
) -> str:
    """Return the share of good ones and of junk accepted by each rule, and half their difference.

    That is the balanced accuracy; of a rule that is refused, nothing.
    """
    lines = []
    for data in sets:
        for name, model in zip(names, models):
            values, cells = scores[data.name, name].round(DECIMALS), []
            alone = Models((model,), (name,))
            for request in (None, "balanced", "gmm", f"keep={data.good.mean():.2f}"):
                try:
                    asked = ThresholdRequest.parse(request) if request else None
                    cut, _ = alone.threshold(asked, values)
                except CryoFilterError:
                    cells.append("refused")
                    continue
                cells.append(_balanced_cell(values, data.good, cut))
            lines.append([data.name, name, *cells])
    head = ["set", "model", "own threshold: balanced accuracy (good, junk accepted)",
            "balanced", "gmm", "keep= the true share"]  # fmt: skip
    return _table(head, lines)


def _balanced_cell(scores: np.ndarray, truth: np.ndarray, threshold: float) -> str:
    """Return the balanced accuracy, and the shares of good ones and junk that are accepted."""
    good, bad = ((scores[truth == kind] >= threshold).mean() for kind in (True, False))
    return f"{(1 + good - bad) / 2:.3f} ({good:.0%}, {bad:.0%})"


def adapted_to(data: Labelled, work: Path) -> Model:
    """Return what ``score --adapt`` makes of the bundled model, kept in `work`."""
    name = re.sub("[^a-z0-9]+", "_", data.name.lower())
    folder = work / "adapted" / f"{name}_{load_model(BUNDLED_MODEL).hash}"
    if not (folder / ADAPTED_MODEL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        stack = folder / "images.mrcs"
        mrcfile.write(stack, np.asarray(data.images, np.float32), overwrite=True)
        score(ScoreOptions(mrc=(stack,), o=folder, adapt=True, quiet=True))
        stack.unlink()
    return load_model(folder / ADAPTED_MODEL)


def _adapted_table(junk: dict[str, np.ndarray], sets: list[Labelled], work: Path) -> str:
    """Return what adapting gives on each set, and what of noise and real junk would pass then."""
    bundled, lines, found = load_model(BUNDLED_MODEL), [], []
    for data in sets:
        images, model = np.asarray(data.images, np.float32), adapted_to(data, work)
        aucs, cells = [], []
        for one in (bundled, model):
            values = score_images(one, images, tta=False)
            auc, cell = auc_cell(data, values)
            aucs.append(auc)
            cells += [cell, _balanced_cell(values, data.good, one.threshold)]
        passed = {
            name: (score_images(model, part, tta=False) >= model.threshold).mean()
            for name, part in junk.items()
            if name == "noise, white" or name.endswith(data.name) or name.startswith("real, ")
        }
        noise = (
            f"{passed.pop('noise, white'):.1%}, {passed.pop(f'noise, spectra of {data.name}'):.1%}"
        )
        ice = ", ".join(
            f"{passed[f'real, {kind}']:.1%}"
            for kind in ("clean_ice_field", "carbon_gold_grating", "liposome")
        )
        found.append(aucs)
        lines.append([data.name, *cells, noise, ice])
    for what, simulated in (("real", False), ("simulated", True)):
        means = np.mean([a for a, data in zip(found, sets) if data.simulated == simulated], axis=0)
        lines.append([f"mean, {what}", f"{means[0]:.3f}", "", f"{means[1]:.3f}", "", "", ""])
    head = [
        "set", "bundled, AUC", "balanced accuracy at its threshold (good, junk accepted)",
        "adapted, AUC", "at its threshold", "noise accepted: white, the set's",
        "ice, grating, liposomes",
    ]  # fmt: skip
    return _table(head, lines)


if __name__ == "__main__":
    main()

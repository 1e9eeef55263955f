"""The tables, from the scores that the runs left."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from classes import class_labels
from linear import LINEAR
from nulls import NULLS
from runs import (
    CLASSES,
    FINE_TUNED,
    LABELS,
    MISTAKE,
    NO_LABELS,
    PRECISION,
    ROBERTS,
    SCRATCH,
    STRAIGHT,
    THREE_PARTS,
    Run,
)  # fmt: skip
from runs import LABEL_NOISE as USUAL_NOISE
from sets import ALIKE, FLIPS, LabelledImages

import relion_cryofilter
from relion_cryofilter.evaluation import evaluate, expanded_tail
from relion_cryofilter.nn.model import BUNDLED_MODEL, START_MODEL, load_model

MODELS = (ROBERTS, STRAIGHT, *LINEAR, SCRATCH, THREE_PARTS, FINE_TUNED)
DRAWS = 1000
RECALL = 0.95

Floats = np.ndarray


class Results:
    """The finished runs on one set."""

    def __init__(self, data: LabelledImages, work: Path, seeds: int) -> None:
        self.data, self.seeds = data, seeds
        self.folder = work / "runs" / data.stack.stem
        self.noise = USUAL_NOISE if data.simulated else 0.0
        names, self.of = np.unique(data.micrographs, return_inverse=True)
        rng = np.random.default_rng(0)
        n = len(names)
        draws = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).T
        self.draws = np.concatenate([np.ones((n, 1), int), draws], axis=1)
        self.tail = expanded_tail(n)

    def runs(
        self, model: str, labels: int | None, noise: float | None = None, errors: str = ALIKE
    ) -> list[Path]:
        """Return the result files of all seeds, [] unless all are there."""
        usual = 0.0 if model == NO_LABELS else self.noise
        share = usual if noise is None else noise
        paths = [
            self.folder / f"{Run(model, labels, seed, share, errors).stem}.json"
            for seed in range(self.seeds)
        ]
        return paths if all(path.exists() for path in paths) else []

    def auc_draws(self, paths: Sequence[Path], kind: str | None = None) -> Floats:
        """Return (1 + DRAWS,) mean AUC over seeds, first of the images as they are."""
        total = np.zeros(self.draws.shape[1])
        for path in paths:
            rows, scores = self.scores(path)
            good = self.data.good[rows]
            if kind:
                kept = good | (self.data.kinds[rows] == kind)
                rows, scores, good = rows[kept], scores[kept], good[kept]
            total += _weighted_auc(good, scores, self.draws[self.of[rows]])
        return np.asarray(total / len(paths))

    def interval(self, values: Floats) -> tuple[float, float, float]:
        """Return value, low and high of what `auc_draws` gave, or of a difference of two."""
        drawn = values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(drawn, [self.tail, 1 - self.tail])
        return float(values[0]), float(low), float(high)

    def scores(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores of the test part of a run."""
        kept = np.load(path.with_suffix(".npz"))
        return kept["rows"], kept["scores"]

    def unseen(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return truth and scores of images of other micrographs: the further ones, if any."""
        kept = np.load(path.with_suffix(".npz"))
        if self.data.further is not None and len(kept["further"]):
            return self.data.further.good, kept["further"]
        return self.data.good[kept["rows"]], kept["scores"]

    def mean(self, paths: Sequence[Path], measure: Callable[[Path], float]) -> float:
        """Return the mean of a measure over runs."""
        return float(np.mean([measure(path) for path in paths])) if paths else np.nan

    def fact(self, name: str) -> Callable[[Path], float]:
        """Return what reads a number of a run's JSON."""
        return lambda path: json.loads(path.read_text()).get(name, np.nan)

    def metric(self, name: str) -> Callable[[Path], float]:
        """Return what measures a metric on a run's test part."""

        def measure(path: Path) -> float:
            rows, scores = self.scores(path)
            threshold = json.loads(path.read_text()).get("threshold", 0.5)
            evaluation = evaluate(
                self.data.good[rows], scores, self.of[rows], threshold, resamples=1
            )
            return float(getattr(evaluation, name).value)

        return measure


def _weighted_auc(good: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> Floats:
    """Return (draws,) AUC with image weights (n, draws); ties count half."""
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    positive = np.add.reduceat(weights[order] * good[order, None], firsts, axis=0)
    negative = np.add.reduceat(weights[order] * ~good[order, None], firsts, axis=0)
    below = np.cumsum(negative, axis=0) - negative / 2
    with np.errstate(invalid="ignore"):
        return np.asarray(
            (positive * below).sum(0) / (positive.sum(0) * negative.sum(0).astype(float))
        )


def report(sets: Sequence[LabelledImages], work: Path, seeds: int) -> str:
    """Return the results file."""
    results = [Results(data, work, 1 if data.classified else seeds) for data in sets]
    tried = [result for result in results if not result.data.classified]
    model, start = load_model(BUNDLED_MODEL), load_model(START_MODEL)
    parts = [
        "# Quality of the default model",
        f"Made by `benchmarks/quality` on {datetime.date.today()}: relion_cryofilter "
        f"{relion_cryofilter.__version__}, bundled model {model.hash}, bundled "
        f"start {start.hash}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}.",
        f"{seeds} seeds of the split, the labels, the weights and the order. Each keeps 30 % of "
        "the micrographs for the test; `train` shares out the labels among the others by itself. "
        f"The labels of the simulated sets are wrong as those from classes are: {USUAL_NOISE:.0%} "
        "of the aggregates, broken and off-centre particles are called good, and "
        f"{USUAL_NOISE:.0%} of the particles are called bad; the test is against the truth. "
        'Label 0 of the real sets is "away from every annotated particle" and holds some '
        "particles. Values are means over the seeds, intervals 95 % from a bootstrap over "
        "micrographs. The 2020 networks have their 2020 preprocessing and are scored with "
        "eight-fold TTA; the default is not, since its score is the same for all eight views. "
        "\"Three parts\" is `--split 0.7`, the recipe before; what is \"not run\" here is in "
        "[quality_split.md](quality_split.md), of such trainings.",
        "## AUC", _auc_table(tried),
        "## The bars", _bars(tried),
        "## What was asked and what was got",
        "The default model, on 4,200 images of other micrographs, or 4,032 for sets with classes. "
        "Recall 0.95 is what its threshold asks; the threshold for precision 0.9 is of the same "
        "model. ECE is against the truth.", _thresholds(results),
        "## Labels from RELION's classes",
        "4,032 picks, 8 % of them of a second molecule, classified at 48 px by RELION 3.1.3 (16 "
        "classes, 14 iterations). Classes with more good particles than others are kept; \"with a "
        "mistake\", also the one with most of the second molecule. Pairs are precision, recall. "
        "One seed. The filter is trained on all of these labels, and scores are out of fold.",
        _classes(results),
        "## Nulls", _nulls(tried),
        "## FPR at 95 % recall, all labels", _all_labels(tried, "fpr_at_95_recall"),
        "## Calibration error (ECE), all labels", _all_labels(tried, "ece"),
        "## AUC by kind of junk, all labels", _kinds(tried),
        "## CPU seconds of a training", _seconds(tried),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines])


def _column(labels: int | None) -> str:
    return f"{labels:,} labels" if labels else "all labels"


def _auc_table(results: Sequence[Results]) -> str:
    lines = []
    for result in results:
        n = len(result.data.good)
        name = f"{result.data.name} ({n:,} images, {len(result.draws)} micrographs)"
        for model in MODELS:
            cells = [_auc_cell(result, result.runs(model, labels)) for labels in LABELS]
            lines.append([name, model, *cells])
        cell = _auc_cell(result, result.runs(NO_LABELS, 0))
        lines.append([name, NO_LABELS, cell, "", ""])
    return _table(["set", "model", *map(_column, LABELS)], lines)


def _auc_cell(result: Results, paths: Sequence[Path]) -> str:
    if not paths:
        return "not run"
    value, low, high = result.interval(result.auc_draws(paths))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _all_labels(results: Sequence[Results], metric: str) -> str:
    lines = [
        [model, *(_number(r.mean(r.runs(model, None), r.metric(metric)), 3) for r in results)]
        for model in MODELS
    ]
    return _table(["model", *(result.data.name for result in results)], lines)


def _kinds(results: Sequence[Results]) -> str:
    simulated = [result for result in results if result.data.simulated]
    kinds = sorted({kind for r in simulated for kind in set(r.data.kinds)} - {"particle"})
    lines = []
    for result in simulated:
        for model, labels in ((ROBERTS, None), (FINE_TUNED, None), (NO_LABELS, 0)):
            paths = result.runs(model, labels)
            cells = [f"{result.auc_draws(paths, k)[0]:.3f}" if paths else "–" for k in kinds]
            lines.append([result.data.name, model, *cells])
    return _table(["set", "model", *kinds], lines)


def _seconds(results: Sequence[Results]) -> str:
    lines = []
    for model in MODELS:
        for labels in LABELS:
            cells = [_number(r.mean(r.runs(model, labels), r.fact("seconds")), 0) for r in results]
            lines.append([model, _column(labels), *cells])
    return _table(["model", "labels", *(result.data.name for result in results)], lines)


def _bars(results: Sequence[Results]) -> str:
    lines = []
    for result in results:
        old, new, parts = (result.runs(model, None) for model in (ROBERTS, FINE_TUNED, THREE_PARTS))
        few, few_parts = (result.runs(model, 300) for model in (FINE_TUNED, THREE_PARTS))
        name = result.data.name
        if old and new:
            old_auc, new_auc = result.auc_draws(old), result.auc_draws(new)
            ratio = result.interval((1 - new_auc) / np.maximum(1 - old_auc, 1e-9))
            what = f"{name}: error / error of 2020 roberts, all labels"
            lines.append([what, _spread(ratio), "0.6 on four, 0.8 or less"])
        if old and few:
            more = result.interval(result.auc_draws(few) - result.auc_draws(old))
            what = f"{name}: AUC with 300 labels - AUC of 2020 roberts with all"
            lines.append([what, _spread(more), "not below 0"])
        for paths, before, which in ((new, parts, "all"), (few, few_parts, "300")):
            if paths and before:
                more = result.interval(result.auc_draws(paths) - result.auc_draws(before))
                what = f"{name}: AUC - AUC of the recipe before, {which} labels"
                lines.append([what, _spread(more), "interval not below 0"])
        clean, worse = result.runs(FINE_TUNED, None, 0.0), result.runs(FINE_TUNED, None, 0.3)
        if result.data.simulated and clean and new and worse:
            best = result.auc_draws(clean)
            for share, paths, bar in (("10 %", new, 0.010), ("30 %", worse, 0.025)):
                cost = result.interval(best - result.auc_draws(paths))
                what = f"{name}: AUC lost to {share} wrong labels"
                lines.append([what, _spread(cost), f"{bar} or less"])
    lines += _overall(results)
    return _table(["what", "found", "wanted"], lines)


def _thresholds(results: Sequence[Results]) -> str:
    """Return what asking for a recall and for a precision gave on images of other micrographs."""
    kinds = (
        ("correct", None, 0.0, ALIKE),
        ("a tenth wrong, look-alikes", None, None, ALIKE),
        ("a tenth wrong, any", None, None, FLIPS),
        ("RELION's classes", None, None, CLASSES),
        ("the same, a class kept by mistake", None, None, MISTAKE),
        ("300, a tenth wrong, look-alikes", 300, None, ALIKE),
    )
    lines = []
    for what, labels, noise, errors in kinds:
        recalls, precisions, eces, asked = [], [], [], 0
        for result in results:
            if not result.data.simulated:
                continue
            for path in result.runs(FINE_TUNED, labels, noise, errors):
                facts, (good, scores) = json.loads(path.read_text()), result.unseen(path)
                recalls.append((scores[good] >= facts["threshold"]).mean() - RECALL)
                eces.append(_ece(good, scores))
                asked += 1
                accepted = scores >= facts.get("precise", np.inf)
                if accepted.any():
                    precisions.append(good[accepted].mean() - PRECISION)
        if asked:
            cells = [what, str(asked), *_met(recalls), f"{np.median(eces):.3f}"]
            lines.append([*cells, f"{asked - len(precisions)}", *_met(precisions)])
    head = ["labels", "runs", "recall .95: within 2 points", "within 4", "mean error, points",
            "ECE, median", "precision .9: not to be had", "within 2 points", "within 4",
            "mean error, points"]  # fmt: skip
    return _table(head, lines)


def _met(errors: Sequence[float]) -> list[str]:
    """Return how many errors are within 2 and 4 points, and their mean and spread."""
    if not errors:
        return ["–", "–", "–"]
    values = 100 * np.array(errors)
    within = [f"{(np.abs(values) <= points).sum()}" for points in (2, 4)]
    return [*within, f"{values.mean():+.1f} ± {values.std():.1f}"]


def _ece(good: np.ndarray, scores: np.ndarray) -> float:
    """Return the expected calibration error in 15 bins."""
    of = np.minimum((scores * 15).astype(int), 14)
    gaps = [abs(good[of == k].mean() - scores[of == k].mean()) * (of == k).mean()
            for k in range(15) if (of == k).any()]  # fmt: skip
    return float(np.sum(gaps))


def _classes(results: Sequence[Results]) -> str:
    """Return what RELION's classes select, what the filter that learnt from them selects, both."""
    lines = []
    for result in results:
        for errors in (CLASSES, MISTAKE) if result.data.classified else ():
            paths = result.runs(FINE_TUNED, None, errors=errors)
            if not paths:
                continue
            data, selected = result.data, class_labels(result.data, errors == MISTAKE)
            same, both, asked = [], [], []
            for path in paths:
                scores = result.scores(path)[1]
                facts = json.loads(path.read_text())
                of_good = np.sort(scores[data.good])[::-1]
                cut = of_good[max(0, round(selected[data.good].sum()) - 1)]
                same.append(_selected(data.good, scores >= cut))
                both.append(_selected(data.good, selected & (scores >= facts["threshold"])))
                good, further = result.unseen(path)
                asked.append(_selected(good, further >= facts["threshold"]))
            chosen = _selected(data.good, selected)
            wrong = (selected != data.good).mean()
            kinds = sorted(set(data.kinds) - {"particle"})
            aucs = ", ".join(f"{k} {result.auc_draws(paths, k)[0]:.3f}" for k in kinds)
            class_auc = _weighted_auc(
                data.good, selected.astype(float), np.ones((len(selected), 1))
            )[0]
            alone = result.runs(NO_LABELS, 0)
            bundled = f"{result.auc_draws(alone)[0]:.3f}" if alone else "–"
            what = "with a mistake" if errors == MISTAKE else "majority good"
            lines.append(
                [f"{data.name}, {what}", f"{wrong:.1%}", _two(chosen), _two(np.mean(same, 0)),
                 _two(np.mean(both, 0)), _two(np.mean(asked, 0)),
                 f"{class_auc:.3f} / {bundled} / {result.auc_draws(paths)[0]:.3f}", aucs]
            )  # fmt: skip
    head = ["set, classes kept", "wrong labels", "class selection", "filter at its recall",
            "both at recall=.95", "filter at recall=.95, other micrographs",
            "AUC: class / bundled / filter", "AUC of the filter by kind of junk"]  # fmt: skip
    return _table(head, lines)


def _selected(good: np.ndarray, accepted: np.ndarray) -> tuple[float, float]:
    """Return precision and recall."""
    return float(good[accepted].mean()), float(accepted[good].mean())


def _two(values: Sequence[float] | np.ndarray) -> str:
    return f"{values[0]:.3f}, {values[1]:.3f}"


def _nulls(results: Sequence[Results]) -> str:
    lines = []
    for result in results:
        cells = []
        for kind, count in NULLS.items():
            paths = [result.folder / f"null_{kind}-{seed}.json" for seed in range(count)]
            found = [json.loads(path.read_text()) for path in paths if path.exists()]
            aucs = [f"{one['auc']:.3f}" for one in found if "auc" in one]
            refused = sum("refused" in one for one in found)
            cells.append(", ".join(aucs + [f"{refused} refused"] * (refused > 0)) or "not run")
        lines.append([result.data.name, *cells])
    head = ["set", "permuted labels (wanted: 0.48 to 0.52)",
            "particles masked out (0.55 or less)", "inverted contrast (refused)"]  # fmt: skip
    return _table(head, lines)


def _overall(results: Sequence[Results]) -> list[list[str]]:
    lines = []
    for what, wanted, chosen in (
        ("simulated", 0.85, [r for r in results if r.data.simulated]),
        ("real", 0.80, [r for r in results if not r.data.simulated]),
    ):
        aucs = [r.auc_draws(r.runs(NO_LABELS, 0))[0] for r in chosen if r.runs(NO_LABELS, 0)]
        if aucs:
            lines.append(
                [f"no labels: mean AUC of the {what} sets", f"{np.mean(aucs):.3f}", f"{wanted}"]
            )
    noise = [json.loads(p.read_text())["noise_accepted"] for r in results
             for labels in LABELS for p in r.runs(FINE_TUNED, labels)]  # fmt: skip
    if not noise:
        return lines
    return [
        *lines,
        ["white noise accepted by the default: median, worst of "
         f"{len(noise)} runs", f"{np.median(noise):.1%}, {max(noise):.1%}", "1 % or less"],
    ]  # fmt: skip


def _number(value: float, decimals: int) -> str:
    return "not run" if np.isnan(value) else f"{value:.{decimals}f}"


def _spread(values: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)

"""The tables, from the scores that the runs left."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from linear import LINEAR
from nulls import NULLS
from runs import FINE_TUNED, LABELS, NO_LABELS, ROBERTS, SCRATCH, STRAIGHT, Run
from runs import LABEL_NOISE as USUAL_NOISE
from sets import LabelledImages

import relion_cryofilter
from relion_cryofilter.evaluation import evaluate, expanded_tail
from relion_cryofilter.nn.model import BUNDLED_MODEL, load_model

MODELS = (ROBERTS, STRAIGHT, *LINEAR, SCRATCH, FINE_TUNED)
DRAWS = 1000
RECALL, RECALL_TOLERANCE = 0.95, 0.02

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

    def runs(self, model: str, labels: int | None, noise: float | None = None) -> list[Path]:
        """Return the result files of all seeds, [] unless all are there."""
        usual = 0.0 if model == NO_LABELS else self.noise
        share = usual if noise is None else noise
        paths = [
            self.folder / f"{Run(model, labels, seed, share).stem}.json"
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
    results = [Results(data, work, seeds) for data in sets]
    model = load_model(BUNDLED_MODEL)
    parts = [
        "# Quality of the default model",
        f"Made by `benchmarks/quality` on {datetime.date.today()}: relion_cryofilter "
        f"{relion_cryofilter.__version__}, bundled model {model.hash}, torch "
        f"{torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}.",
        f"{seeds} seeds of the split, the labels, the weights and the order. Each keeps 30 % of "
        "the micrographs for the test; `train` shares out the labels among the others by itself. "
        f"The labels of the simulated sets are wrong as those from classes are: {USUAL_NOISE:.0%} "
        "of the aggregates, broken and off-centre particles are called good, and "
        f"{USUAL_NOISE:.0%} of the particles are called bad; the test is against the truth. "
        'Label 0 of the real sets is "away from every annotated particle" and holds some '
        "particles. Values are means over the seeds, intervals 95 % from a bootstrap over "
        "micrographs. The 2020 networks have their 2020 preprocessing and are scored with "
        "eight-fold TTA; the default is not, since its score is the same for all eight views.",
        "## AUC", _auc_table(results),
        "## The bars", _bars(results),
        "## Nulls", _nulls(results),
        "## FPR at 95 % recall, all labels", _all_labels(results, "fpr_at_95_recall"),
        "## Calibration error (ECE), all labels", _all_labels(results, "ece"),
        "## AUC by kind of junk, all labels", _kinds(results),
        "## CPU seconds of a training", _seconds(results),
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
        old, new, few = (
            result.runs(model, labels)
            for model, labels in ((ROBERTS, None), (FINE_TUNED, None), (FINE_TUNED, 300))
        )
        if not (old and new and few):
            continue
        name = result.data.name
        old_auc, new_auc, few_auc = (result.auc_draws(paths) for paths in (old, new, few))
        ratio = result.interval((1 - new_auc) / np.maximum(1 - old_auc, 1e-9))
        wanted = "0.6 or less" if result.data.simulated else "no worse"
        lines.append([f"{name}: error / error of 2020 roberts, all labels", _spread(ratio), wanted])
        more = result.interval(few_auc - old_auc)
        lines.append(
            [f"{name}: AUC with 300 labels - AUC of 2020 roberts with all", _spread(more),
             "not below 0"]
        )  # fmt: skip
        time = result.mean(few, result.fact("seconds")) / result.mean(old, result.fact("seconds"))
        lines.append([f"{name}: time of the two", f"{time:.2f}", "0.2 or less"])
        clean, worse = result.runs(FINE_TUNED, None, 0.0), result.runs(FINE_TUNED, None, 0.3)
        if result.data.simulated and clean and worse:
            best = result.auc_draws(clean)
            for share, auc, bar in (
                ("10 %", new_auc, 0.010),
                ("30 %", result.auc_draws(worse), 0.025),
            ):
                cost = result.interval(best - auc)
                lines.append(
                    [f"{name}: AUC lost to {share} wrong labels", _spread(cost), f"{bar} or less"]
                )
    lines += _overall(results)
    return _table(["what", "found", "wanted"], lines)


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
    runs = [
        (result, path)
        for result in results
        for labels, noise in ((None, 0.0), (1000, None))
        for path in result.runs(FINE_TUNED, labels, noise)
        if noise is not None or not result.data.simulated
    ]
    if not runs:
        return lines
    eces = [result.metric("ece")(path) for result, path in runs]
    recalls = np.array([result.metric("sensitivity")(path) for result, path in runs])
    met = (np.abs(recalls - RECALL) <= RECALL_TOLERANCE).sum()
    noise = [json.loads(p.read_text())["noise_accepted"] for r in results
             for labels in LABELS for p in r.runs(FINE_TUNED, labels)]  # fmt: skip
    return [
        *lines,
        ["ECE of the default, correct labels: median, worst",
         f"{np.median(eces):.3f}, {max(eces):.3f}", "0.03 or less"],
        [f"runs that keep recall {RECALL} within {RECALL_TOLERANCE:.0%} on the test micrographs",
         f"{met} of {len(runs)}", "18 of 20"],
        ["pure noise accepted by the default: worst of "
         f"{len(noise)} runs", f"{max(noise):.1%}", "1 % or less"],
    ]  # fmt: skip


def _number(value: float, decimals: int) -> str:
    return "not run" if np.isnan(value) else f"{value:.{decimals}f}"


def _spread(values: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)

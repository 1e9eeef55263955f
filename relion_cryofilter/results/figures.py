"""Figures of an evaluation and of a training history, as PNG files.

Matplotlib's objects are used without pyplot: no display, no global state, no figures left open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from relion_cryofilter.files import replacing
from relion_cryofilter.results.cuts import histogram_edges
from relion_cryofilter.results.metrics import Curves, Evaluation
from relion_cryofilter.wording import counted

SIZE_INCH = (5.0, 4.0)
DOTS_PER_INCH = 150
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
"""From the palette of Okabe and Ito (2008), which colour-blind readers can tell apart."""
GREY = "0.55"


def save_roc(path: Path, curves: Curves, evaluation: Evaluation) -> None:
    """Draw true against false positive rate, with the AUC and the threshold."""
    figure, axes = _new_figure()
    draw_roc(axes, curves, evaluation)
    _save(figure, path)


def draw_roc(axes: Axes, curves: Curves, evaluation: Evaluation) -> None:
    """Draw what `save_roc` saves."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    axes.plot(curves.fpr, curves.tpr, color=BLUE, label=f"AUC {evaluation.auc}")
    at = (1 - evaluation.specificity.value, evaluation.sensitivity.value)
    _mark_threshold(axes, at, evaluation.threshold)
    axes.set(xlabel="False positive rate", ylabel="True positive rate (recall)", title="ROC")
    axes.legend(loc="best", fontsize="small")
    _finish_square(axes, empty=not len(curves.fpr))


def save_precision_recall(path: Path, curves: Curves, evaluation: Evaluation) -> None:
    """Draw precision against recall, with the average precision and the threshold."""
    figure, axes = _new_figure()
    draw_precision_recall(axes, curves, evaluation)
    _save(figure, path)


def draw_precision_recall(axes: Axes, curves: Curves, evaluation: Evaluation) -> None:
    """Draw what `save_precision_recall` saves."""
    share = evaluation.n_positive / evaluation.n
    axes.axhline(share, color=GREY, linestyle=":", label=f"no filter: {share:.3f} good")
    axes.step(
        curves.recall, curves.precision, where="post", color=BLUE,
        label=f"Average precision {evaluation.average_precision}",
    )  # fmt: skip
    at = (evaluation.sensitivity.value, evaluation.precision.value)
    _mark_threshold(axes, at, evaluation.threshold)
    axes.set(xlabel="Recall", ylabel="Precision", title="Precision and recall")
    axes.legend(loc="best", fontsize="small")
    _finish_square(axes, empty=not len(curves.recall))


def save_reliability(path: Path, curves: Curves, evaluation: Evaluation) -> None:
    """Draw the fraction of good images against the mean score, bin by bin, with the ECE."""
    figure, axes = _new_figure()
    draw_reliability(axes, curves, evaluation)
    _save(figure, path)


def draw_reliability(axes: Axes, curves: Curves, evaluation: Evaluation) -> None:
    """Draw what `save_reliability` saves; a single bin is a point, and said to be one."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    one = len(curves.bin_count) == 1
    area = 12 + 120 * curves.bin_count / curves.bin_count.max()
    label = "the only bin that holds images" if one else "a bin; area: number of images"
    axes.scatter(
        curves.bin_score, curves.bin_fraction, s=40 if one else area, color=BLUE, zorder=3,
        label=label,
    )  # fmt: skip
    axes.plot(
        curves.bin_score, curves.bin_fraction, color=BLUE, linestyle="" if one else "-",
        label=f"ECE {evaluation.ece}",
    )  # fmt: skip
    axes.set(xlabel="Mean score", ylabel="Fraction of good images", title="Reliability")
    axes.legend(loc="best", fontsize="small")
    _finish_square(axes)


def save_confusion_matrix(path: Path, evaluation: Evaluation) -> None:
    """Draw the confusion matrix: numbers of images, and shares of each true class."""
    figure, axes = _new_figure()
    draw_confusion_matrix(axes, evaluation)
    _save(figure, path)


def draw_confusion_matrix(axes: Axes, evaluation: Evaluation) -> None:
    """Draw what `save_confusion_matrix` saves."""
    counts = np.array(evaluation.confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column, row, f"{counts[row, column]:,.0f}\n{share:.1%}", ha="center", va="center",
            color="white" if share > 0.5 else "black",
        )  # fmt: skip
    axes.set_xticks([0, 1], ["rejected", "accepted"])
    axes.set_yticks([0, 1], ["bad", "good"])
    axes.set(
        xlabel=f"At threshold {evaluation.threshold:g}", ylabel="Label",
        title=f"Accuracy {evaluation.accuracy}",
    )  # fmt: skip
    axes.figure.colorbar(picture, ax=axes, label="Share of the images with this label")


def save_score_histogram(
    path: Path, labels: ArrayLike | None, scores: ArrayLike, threshold: float
) -> None:
    """Draw how many images have which score, for each class if labels are given.

    The axis is 0 to 1, or narrower where all scores lie close together.

    Parameters
    ----------
    path
        The PNG file to make.
    labels
        (n,) True for good images, or None.
    scores
        (n,) 0 to 1.
    threshold
        Is marked, with the number of images that reach it.
    """
    figure, axes = _new_figure()
    values = np.asarray(scores)
    edges = histogram_edges(values, threshold).tolist()
    accepted = int(np.count_nonzero(values >= float(threshold)))
    if labels is None:
        axes.hist(values, edges, color=BLUE, alpha=0.8, label=counted(values.size, "image"))
    else:
        good = np.asarray(labels, dtype=bool)
        for name, chosen, colour in (("good", good, BLUE), ("bad", ~good, ORANGE)):
            label = f"{np.count_nonzero(chosen):,} {name}"
            _draw_class(axes, values[chosen], edges, colour, label)
    axes.axvline(
        threshold, color=VERMILION, linestyle="--",
        label=f"threshold {threshold:g}: {accepted:,} accepted",
    )  # fmt: skip
    axes.set(xlabel="Score", ylabel="Number of images", title="Scores", xlim=(edges[0], edges[-1]))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    _save(figure, path)


def save_history(path: Path, history: Sequence[Mapping[str, float]], kept: int) -> None:
    """Draw losses, accuracies and AUC of a training run, epoch by epoch, the kept one marked.

    Parameters
    ----------
    path
        The PNG file to make.
    history
        One row an epoch, at least one: ``epoch``, ``train_loss``, ``train_acc``, ``val_loss``,
        ``val_acc``, ``val_auc`` and others.
    kept
        The epoch whose weights are kept; 0 for those before any training.
    """
    figure = _blank_figure()
    losses, rates = figure.subplots(2, 1, sharex=True)
    draw_losses(losses, history, kept)
    losses.set(xlabel="")
    draw_rates(rates, history, kept)
    rates.set(title="")
    _save(figure, path)


def draw_losses(axes: Axes, history: Sequence[Mapping[str, float]], kept: int) -> None:
    """Draw the losses of a training run, epoch by epoch."""
    lines = (("train_loss", "training", ORANGE), ("val_loss", "validation", BLUE))
    _draw_epochs(axes, history, kept, lines, "Loss")


def draw_rates(axes: Axes, history: Sequence[Mapping[str, float]], kept: int) -> None:
    """Draw the accuracies and the AUC of a training run, epoch by epoch."""
    lines = (
        ("train_acc", "training accuracy", ORANGE),
        ("val_acc", "validation accuracy", BLUE),
        ("val_auc", "validation AUC", GREEN),
    )
    _draw_epochs(axes, history, kept, lines, "Accuracy, AUC")


def _draw_epochs(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    kept: int,
    lines: Sequence[tuple[str, str, str]],
    ylabel: str,
) -> None:
    epochs = _column(history, "epoch")
    marker = "o" if len(epochs) == 1 else ""
    for name, label, colour in lines:
        axes.plot(epochs, _column(history, name), color=colour, label=label, marker=marker)
    title = "No epoch did better than the start"
    if kept:
        axes.axvline(kept, color=GREY, linestyle="--")
        auc = _column(history, "val_auc")[epochs == kept]
        title = f"Best epoch {kept}: validation AUC {auc.item():.3f}"
    axes.set(xlabel="Epoch", ylabel=ylabel, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="best", fontsize="small")


def _column(history: Sequence[Mapping[str, float]], name: str) -> NDArray[np.float64]:
    return np.array([float(row[name]) for row in history])


def _draw_class(
    axes: Axes, values: NDArray[np.floating], edges: list[float], colour: str, label: str
) -> None:
    """Draw a see-through histogram with a firm outline, so that two can overlap."""
    axes.hist(values, edges, color=colour, alpha=0.35)
    axes.hist(values, edges, color=colour, histtype="step", linewidth=1.5, label=label)


def _mark_threshold(axes: Axes, at: tuple[float, float], threshold: float) -> None:
    if all(isfinite(coordinate) for coordinate in at):
        axes.plot(
            *at, color=VERMILION, marker="o", linestyle="", zorder=4,
            label=f"threshold {threshold:g}",
        )  # fmt: skip


def _finish_square(axes: Axes, empty: bool = False) -> None:
    """Show 0 to 1 on both axes; say why there is no curve."""
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    if empty:
        axes.text(0.5, 0.75, "undefined: one class only", ha="center", va="center")


def _blank_figure() -> Figure:
    figure = Figure(figsize=SIZE_INCH, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_figure() -> tuple[Figure, Axes]:
    figure = _blank_figure()
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)

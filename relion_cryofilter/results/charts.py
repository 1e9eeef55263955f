"""The charts of jobs: each is defined once, for PNG files, PDF, HTML and Doppio.

A new chart is a function that draws it and a `Chart` that names it, at the end of this module.
`Chart.save` makes its PNG file; `report_files` lays out a report's.

Charts are of values, see `summaries` and `evaluation`. Matplotlib is imported when something is
drawn, so that names and titles can be had without it, and is used without pyplot: no display, no
global state, no figures left open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from relion_cryofilter.files import replacing
from relion_cryofilter.progress import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from relion_cryofilter.evaluation import Curves, Evaluation
    from relion_cryofilter.results.summaries import (
        Cuts,
        FeatureMap,
        Histogram,
        Micrographs,
        PickMap,
        Trend,
    )

Epochs = Sequence[Mapping[str, float]]
"""``epoch``, ``train_loss``, ``train_acc``, ``val_loss``, ``val_acc`` and ``val_auc`` of each."""

SIZE_INCH, DOTS_PER_INCH = (5.0, 4.0), 150
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "0.55"
"""From the palette of Okabe and Ito (2008), which colour-blind readers can tell apart."""

MOST_NAMED = 5  # outliers of either side
NAMED_ON_AXIS, MARKED = 15, 60  # with so few micrographs each has its name on the axis, or a marker
LOG_DENSITY = 5000  # with more particles some bins hold hundreds


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes
    ----------
    name
        Stem of its PNG file.
    group
        Charts of one group share a page of a report.
    title, note
        What it shows, and how to read it.
    draw
        Draws it on empty axes; in the lists of this module, of the values that `of` gives.
    moves
        Whether report.html has a version of its own that follows the slider.
    """

    name: str
    group: str
    title: str
    note: str
    draw: Callable[..., None]
    moves: bool = False

    def of(self, *values: object, **said: Any) -> Chart:
        """Return the chart of the values that `draw` takes; `said` are attributes to replace."""

        def draw(axes: Axes) -> None:
            self.draw(axes, *values)

        return replace(self, draw=draw, **said)

    def save(self, folder: Path) -> None:
        """Write the PNG file into a folder that exists, complete or not at all."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE_INCH, layout="constrained")
        self.draw(figure.add_subplot())
        with replacing(folder / f"{self.name}.png") as file:
            write_png(figure, file, DOTS_PER_INCH)


def write_png(figure: Figure, file: BinaryIO, dots_per_inch: int) -> None:
    """Write a figure that is drawn once; its own `savefig` draws everything twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dots_per_inch)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(file)


def score_charts(histogram: Histogram, cuts: Cuts) -> list[Chart]:
    """Return histogram and retention of the same scores; they follow the slider in report.html."""
    return [SCORE_HISTOGRAM.of(histogram), RETENTION.of(cuts, histogram)]


def evaluation_charts(curves: Curves, evaluation: Evaluation) -> list[Chart]:
    """Return ROC, precision and recall, reliability and confusion matrix of the same scores."""
    return [chart.of(curves, evaluation) for chart in EVALUATION]


def history_charts(history: Epochs, kept: int) -> list[Chart]:
    """Return loss, accuracy and AUC; `kept` is the epoch whose weights are, 0 for the start's."""
    note = "The dashed line is the epoch whose weights are kept."
    if not kept:
        note = "No epoch did better than what was known before: those weights are kept."
    return [HISTORY.of(history, kept, note=note)]


def set_charts(micrographs: Micrographs, trends: Sequence[Trend] = ()) -> list[Chart]:
    """Return charts of what is known of the particles; a single micrograph makes none."""
    charts = [MICROGRAPHS.of(micrographs)] if len(micrographs.names) > 1 else []
    for trend in trends:
        quantity = _quantity(trend)
        name = f"acceptance_{quantity.replace(' ', '_')}"
        charts.append(TREND.of(trend, name=name, title=f"Acceptance against {quantity}"))
    return charts


def feature_charts(
    pick_maps: Sequence[PickMap] = (), features: FeatureMap | None = None
) -> list[Chart]:
    """Return charts of single micrographs, and of the network's features."""
    charts = []
    for number, picks in enumerate(pick_maps, 1):
        charts.append(PICKS.of(picks, name=f"picks_{number}", title=f"Picks on {picks.name}"))
    if features is not None:
        charts += [chart.of(features) for chart in FEATURES]
    return charts


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return names without folders and the end that all share, such as ``_fractions.mrc``."""
    short = [name.rpartition("/")[2] for name in names]
    ends = takewhile(lambda signs: len(set(signs)) == 1, zip(*(name[::-1] for name in short)))
    tail = "".join(signs[0] for signs in ends)[::-1] if len(short) > 1 else ""
    start = next((at for at, sign in enumerate(tail) if sign in "._-"), len(tail))
    return [name.removesuffix(tail[start:]) or name for name in short]


def _shortened(name: str, most: int = 34) -> str:
    """Return the end of a long path, which tells micrographs apart."""
    name = name.rpartition("/")[2]
    return printable(name if len(name) <= most else f"…{name[-most + 1 :]}")


def printable(text: str) -> str:
    """Return text, dollars or bytes that are no UTF-8 in it, as matplotlib can show it."""
    return clean(text).replace("$", r"\$")


def clean(text: str) -> str:
    """Return text without the bytes of names that are no UTF-8."""
    return text.encode(errors="replace").decode()


def _quantity(trend: Trend) -> str:
    """Return ``defocus`` for ``Defocus (µm)``, and ``CTF fit`` as it is."""
    name = trend.label.partition(" (")[0]
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def _legend_beneath(axes: Axes) -> None:
    """Put the legend where no data are."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False,
                fontsize="small")  # fmt: skip


def _draw_histogram(axes: Axes, histogram: Histogram) -> None:
    """Draw how many particles have which score: good and bad, or accepted and rejected."""
    from matplotlib.ticker import FuncFormatter

    counts, edges, threshold = histogram.counts, histogram.edges, histogram.threshold
    n, accepted = int(counts.sum()), histogram.accepted
    line = f"threshold {threshold:g}"
    if histogram.good is None:
        # A colour for each side; the bin with the threshold in it is cut in two at the line.
        for low, high, colour, name in (
            (threshold, np.inf, BLUE, f"{accepted:,} accepted"),
            (-np.inf, threshold, ORANGE, f"{n - accepted:,} rejected"),
        ):
            inside = (edges[1:] > low) & (edges[:-1] < high)
            left = np.maximum(edges[:-1], low)[inside]
            width = np.minimum(edges[1:], high)[inside] - left
            axes.bar(left, counts[inside], width, align="edge", color=colour, label=name)
    else:
        # See-through with a firm outline, so that two can overlap.
        line += f": {accepted:,} accepted"
        for part, colour, name in (
            (histogram.good, BLUE, "good"),
            (counts - histogram.good, ORANGE, "bad"),
        ):
            axes.stairs(part, edges, color=colour, alpha=0.35, fill=True)
            label = f"{int(part.sum()):,} {name}"
            axes.stairs(part, edges, color=colour, linewidth=1.5, label=label)
    axes.axvline(threshold, color=VERMILION, linestyle="--", label=line)
    scale = "Number of particles"
    if histogram.steep:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        scale += ", logarithmic"
    axes.set(xlabel="Score", ylabel=scale, title="Scores", xlim=(edges[0], edges[-1]))
    whole = FuncFormatter(lambda y, _: f"{y:,.0f}" if y == int(y) else f"{y:g}")
    axes.yaxis.set_major_formatter(whole)
    _legend_beneath(axes)


def _draw_retention(axes: Axes, cuts: Cuts, histogram: Histogram) -> None:
    """Draw the share that is kept against the threshold, on the histogram's axis."""
    lines = [(cuts.accepted, cuts.n, BLUE, "-", "all particles")]
    if cuts.good is not None:
        bad = cuts.accepted - cuts.good
        lines = [
            (cuts.good, cuts.n_good, BLUE, "-", "good particles"),
            (bad, cuts.n - cuts.n_good, ORANGE, "--", "bad particles"),
        ]
    for counts, n, colour, style, name in lines:
        if n:
            axes.step(cuts.thresholds, 100 * counts / n, where="pre", color=colour,
                      linestyle=style, label=name)  # fmt: skip
    kept = 100 * histogram.accepted / cuts.n
    axes.axvline(histogram.threshold, color=VERMILION, linestyle="--",
                 label=f"threshold {histogram.threshold:g} keeps {kept:.1f} %")  # fmt: skip
    edges = histogram.edges
    axes.set(xlabel="Threshold (score)", ylabel="Accepted (%)", title="Retention",
             xlim=(edges[0], edges[-1]), ylim=(-2, 102))  # fmt: skip
    axes.legend(loc="best", fontsize="small")


def _draw_roc(axes: Axes, curves: Curves, evaluation: Evaluation) -> None:
    """Draw true against false positive rate, with the AUC and the threshold."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    axes.plot(curves.fpr, curves.tpr, color=BLUE, label=f"AUC {evaluation.auc}")
    axes.set(xlabel="False positive rate", ylabel="True positive rate (recall)", title="ROC")
    at = (1 - evaluation.specificity.value, evaluation.sensitivity.value)
    _finish_curve(axes, at, evaluation, empty=not len(curves.fpr))


def _draw_precision_recall(axes: Axes, curves: Curves, evaluation: Evaluation) -> None:
    """Draw precision against recall, with the average precision and the threshold."""
    share = evaluation.n_positive / evaluation.n
    axes.axhline(share, color=GREY, linestyle=":", label=f"no filter: {share:.3f} good")
    axes.step(curves.recall, curves.precision, where="post", color=BLUE,
              label=f"Average precision {evaluation.average_precision}")  # fmt: skip
    axes.set(xlabel="Recall", ylabel="Precision", title="Precision and recall")
    at = (evaluation.sensitivity.value, evaluation.precision.value)
    _finish_curve(axes, at, evaluation, empty=not len(curves.recall))


def _finish_curve(axes: Axes, at: tuple[float, float], evaluation: Evaluation, empty: bool) -> None:
    """Mark the threshold, show 0 to 1 on both axes, and say why there is no curve."""
    if all(map(isfinite, at)):
        axes.plot(*at, color=VERMILION, marker="o", linestyle="", zorder=4,
                  label=f"threshold {evaluation.threshold:g}")  # fmt: skip
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    if empty:
        axes.text(0.5, 0.75, "undefined: one class only", ha="center", va="center")
    axes.legend(loc="best", fontsize="small")


def _draw_reliability(axes: Axes, curves: Curves, evaluation: Evaluation) -> None:
    """Draw the fraction of good images against the mean score, bin by bin, with the ECE."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    area, style = 12 + 120 * curves.bin_count / curves.bin_count.max(), "-"
    label = "a bin; area: number of images"
    if len(curves.bin_count) == 1:
        area, style, label = np.array([40.0]), "", "the only bin that holds images"
    points = (curves.bin_score, curves.bin_fraction)
    axes.scatter(*points, s=area, color=BLUE, zorder=3, label=label)
    axes.plot(*points, color=BLUE, linestyle=style, label=f"ECE {evaluation.ece}")
    axes.set(xlabel="Mean score", ylabel="Fraction of good images", title="Reliability",
             xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
    axes.legend(loc="best", fontsize="small")


def _draw_confusion_matrix(axes: Axes, _: Curves, evaluation: Evaluation) -> None:
    """Draw the confusion matrix: numbers of images, and shares of each true class."""
    counts = np.array(evaluation.confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{counts[row, column]:,.0f}\n{share:.1%}", ha="center",
                  va="center", color="white" if share > 0.5 else "black")  # fmt: skip
    axes.set_xticks([0, 1], ["rejected", "accepted"])
    axes.set_yticks([0, 1], ["bad", "good"])
    axes.set(xlabel=f"At threshold {evaluation.threshold:g}", ylabel="Label",
             title=f"Accuracy {evaluation.accuracy}")  # fmt: skip
    axes.figure.colorbar(picture, ax=axes, label="Share of the images with this label")


def _draw_history(axes: Axes, history: Epochs, kept: int) -> None:
    """Draw losses above accuracies and AUC, epoch by epoch, the kept one marked."""
    from matplotlib.ticker import MaxNLocator

    axes.set_axis_off()
    place = axes.get_subplotspec()
    assert place is not None  # every chart has its place in a grid
    panels: Any = place.subgridspec(2, 1).subplots(sharex=True)
    losses, rates = panels
    losses.set(ylabel="Loss")
    rates.set(ylabel="Accuracy, AUC", xlabel="Epoch")
    epochs = [int(row["epoch"]) for row in history]
    for panel, column, label, colour in (
        (losses, "train_loss", "training", ORANGE),
        (losses, "val_loss", "validation", BLUE),
        (rates, "train_acc", "training accuracy", ORANGE),
        (rates, "val_acc", "validation accuracy", BLUE),
        (rates, "val_auc", "validation AUC", GREEN),
    ):
        values = [float(row[column]) for row in history]
        if np.isnan(values).all():  # no part was held back to be validated on
            continue
        marker = "o" if len(epochs) == 1 else ""
        panel.plot(epochs, values, color=colour, label=label, marker=marker)
    title = "No epoch did better than the start"
    if kept:
        auc = float(history[epochs.index(kept)]["val_auc"])
        title = f"Best epoch {kept}: validation AUC {auc:.3f}"
        if np.isnan(auc):
            title = "The training on all labels"
    losses.set(title=title)
    for panel in (losses, rates):
        if kept:
            panel.axvline(kept, color=GREY, linestyle="--")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.legend(loc="best", fontsize="small")


def _draw_micrographs(axes: Axes, micrographs: Micrographs) -> None:
    """Draw the share accepted of each micrograph, sorted, outliers marked and named."""
    from matplotlib.ticker import MaxNLocator

    order, names = micrographs.order, distinct_names(micrographs.names)
    share, rank = 100 * micrographs.share[order], np.arange(1, len(order) + 1)
    marker = "o" if len(order) <= MARKED else ""
    axes.plot(rank, share, color=BLUE, marker=marker, markersize=4)
    mean = 100 * micrographs.accepted.sum() / micrographs.total.sum()
    axes.axhline(mean, color=GREY, linestyle=":", label=f"all: {mean:.1f} %")
    # Names stand where a rising curve leaves room: low ones top left, high ones below.
    for outliers, side, title, x, y in zip(
        micrographs.outliers(), ("lower", "upper"), ("Lowest", "Highest"), (0.04, 0.4), (0.97, 0.5)
    ):
        if not outliers:
            continue
        at = np.flatnonzero(np.isin(order, outliers))
        axes.plot(rank[at], share[at], color=VERMILION, marker="s", markersize=5, linestyle="",
                  label=f"{counted(len(at), 'outlier')}, {side}")  # fmt: skip
        lines = [
            f"{100 * micrographs.share[number]:3.0f} %  {_shortened(names[number])}"
            for number in outliers[:MOST_NAMED]
        ]
        more = len(outliers) - len(lines)
        text = "\n".join([f"{title}:", *lines, *([f"and {more:,} more"] if more else [])])
        axes.text(x, y, text, va="top", fontsize="small", transform=axes.transAxes)
    axes.set(xlabel="Micrograph, by acceptance", ylabel="Accepted (%)", ylim=(-4, 104),
             title=f"Acceptance of {counted(len(order), 'micrograph')}")  # fmt: skip
    if len(order) <= NAMED_ON_AXIS:
        shown = [_shortened(names[number], 16) for number in order.tolist()]
        axes.set_xticks(rank, shown, rotation=30, ha="right", fontsize="small")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="lower right", fontsize="small")


def _draw_trend(axes: Axes, trend: Trend) -> None:
    """Draw the share accepted against a quantity, over the numbers of particles."""
    behind = axes.twinx()
    behind.stairs(trend.density, trend.edges, color="0.88", fill=True)
    behind.set(ylim=(0, 2.5 * trend.density.max()), yticks=[])
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    errors = 100 * np.stack([trend.share - trend.low, trend.high - trend.share])
    axes.errorbar(trend.centre, 100 * trend.share, errors, color=BLUE, marker="o", markersize=4,
                  capsize=2)  # fmt: skip
    axes.set(xlabel=trend.label, ylabel="Accepted (%)", ylim=(-4, 104),
             title=f"Acceptance against {_quantity(trend)}")  # fmt: skip


def _draw_picks(axes: Axes, picks: PickMap) -> None:
    """Draw where accepted and rejected picks are; differing in shape and in colour."""
    n, kept = len(picks.accepted), int(picks.accepted.sum())
    size = float(np.clip(6000 / max(n, 1), 6, 40))
    for chosen, colour, marker, name in (
        (~picks.accepted, ORANGE, "x", f"{n - kept:,} rejected"),
        (picks.accepted, BLUE, "o", f"{kept:,} accepted"),
    ):
        x, y = picks.xy[chosen].T
        axes.scatter(x, y, s=size, c=colour, marker=marker, linewidths=1.2, label=name)
    axes.set(xlabel="x (micrograph px)", ylabel="y (micrograph px)", aspect="equal",
             title=f"{_shortened(picks.name)}: {100 * kept / n:.0f} % accepted")  # fmt: skip
    axes.margins(0.03)
    axes.invert_yaxis()  # as RELION shows micrographs
    axes.locator_params(nbins=5)
    _legend_beneath(axes)


def _draw_features(axes: Axes, features: FeatureMap, by_score: bool) -> None:
    """Draw the mean score, or the number of particles, in each bin of the map of features."""
    if by_score:
        colours: dict[str, Any] = {"C": features.scores, "vmin": 0, "vmax": 1}
        title, label = "Features by mean score", "Mean score"
    else:
        colours = {"bins": "log" if len(features.xy) > LOG_DENSITY else None}
        title, label = "Features by number", "Particles a bin"
    x, y = features.xy.T
    picture = axes.hexbin(x, y, gridsize=45, cmap="cividis", mincnt=1, linewidths=0.1, **colours)
    axes.figure.colorbar(picture, ax=axes, label=label)
    first, second = (f"{100 * part:.0f} % of variance" for part in features.variance)
    shown = f"{len(features.xy):,} of {counted(features.n, 'particle')}"
    axes.set(xlabel=f"Component 1 ({first})", ylabel=f"Component 2 ({second})",
             title=f"{title}: {shown}")  # fmt: skip


SCORE_HISTOGRAM = Chart("score_histogram", "Scores", "Scores", "", _draw_histogram, moves=True)
RETENTION = Chart("retention", "Scores", "Retention", "", _draw_retention, moves=True)
_MEASURED = "Measurement on labelled particles"
EVALUATION = (
    Chart("roc", _MEASURED, "ROC curve",
          "Intervals hold 95 % of resampled micrographs.", _draw_roc),
    Chart("precision_recall", _MEASURED, "Precision and recall",
          "Dotted: the share of good particles unfiltered.", _draw_precision_recall),
    Chart("reliability", _MEASURED, "Reliability of the scores",
          "On the dotted line a score is the share of good particles.", _draw_reliability),
    Chart("confusion_matrix", _MEASURED, "Confusion matrix",
          "Numbers, and shares of each label.", _draw_confusion_matrix),
)  # fmt: skip
HISTORY = Chart("history", "Training", "Loss, accuracy and AUC of each epoch", "", _draw_history)

# Of what happens to be known of the particles; `set_charts` numbers and names some of them.
_SORTED = "Sorted; outliers are named."
_BARS = "Bars: 95 % intervals of the share; grey: where the particles are."
_ALIKE = "Particles that the network finds alike lie close together."
_BY_SCORE, _BY_NUMBER = (partial(_draw_features, by_score=by_score) for by_score in (True, False))
MICROGRAPHS = Chart(
    "micrographs", "Micrographs", "Acceptance by micrograph", _SORTED, _draw_micrographs
)
TREND = Chart("acceptance", "Micrographs", "Acceptance", _BARS, _draw_trend)
PICKS = Chart("picks", "Picks", "Picks", "Filled: accepted; crosses: rejected.", _draw_picks)
FEATURES = (
    Chart("features_by_score", "Features", "Features: mean score", _ALIKE, _BY_SCORE),
    Chart("features_by_number", "Features", "Features: number of particles", _ALIKE, _BY_NUMBER),
)

"""The charts of a report: each is drawn once, for a page of logfile.pdf and for report.html."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from relion_cryofilter.results import figures
from relion_cryofilter.results.figures import BLUE, GREY, ORANGE, VERMILION
from relion_cryofilter.results.names import distinct_names, shortened
from relion_cryofilter.results.report_data import (
    FeatureMap,
    Micrographs,
    PickMap,
    Report,
    Trend,
)
from relion_cryofilter.wording import counted

MOST_NAMED = 5
NAMED_ON_AXIS, MARKED = 15, 60
"""With so few micrographs each has its name on the axis, or a marker."""
LOG_DENSITY = 5000
"""With more particles some bins hold hundreds."""


@dataclass(frozen=True)
class Chart:
    """One picture of a report.

    Attributes
    ----------
    group
        Charts of one group share a page.
    title, note
        What it shows, and how to read it.
    draw
        Draws it on empty axes.
    moves
        Whether report.html has a version of its own that follows the slider.
    """

    group: str
    title: str
    note: str
    draw: Callable[[Axes], None]
    moves: bool = False


def charts_of(report: Report) -> list[Chart]:
    """Return the charts that a report has data for, in order."""
    return [
        Chart("Scores", "Scores", "", partial(draw_histogram, report=report), moves=True),
        Chart("Scores", "Retention", "", partial(draw_retention, report=report), moves=True),
        *_measurement_charts(report),
        *_set_charts(report),
    ]


def _measurement_charts(report: Report) -> Iterator[Chart]:
    measured = report.measured
    if measured is None:
        return
    evaluation = measured.evaluation
    both = (measured.curves, evaluation)
    group = "Measurement on labelled particles"
    yield Chart(group, "ROC", "Intervals hold 95 % of resampled micrographs.",
                lambda axes: figures.draw_roc(axes, *both))  # fmt: skip
    yield Chart(group, "Precision and recall", "Dotted: the share of good particles unfiltered.",
                lambda axes: figures.draw_precision_recall(axes, *both))  # fmt: skip
    yield Chart(group, "Reliability", "On the dotted line a score is the share of good particles.",
                lambda axes: figures.draw_reliability(axes, *both))  # fmt: skip
    yield Chart(group, "Confusion matrix", "Numbers, and shares of each label.",
                partial(figures.draw_confusion_matrix, evaluation=evaluation))  # fmt: skip
    if measured.history:
        kept = measured.kept_epoch
        note = "No epoch did better on the validation part: the weights of the start are kept."
        if kept:
            note = "The dashed line is the epoch whose weights are kept."
        yield Chart("Training", "Loss", note,
                    partial(figures.draw_losses, history=measured.history, kept=kept))  # fmt: skip
        yield Chart("Training", "Accuracy and AUC", note,
                    partial(figures.draw_rates, history=measured.history, kept=kept))  # fmt: skip


def _set_charts(report: Report) -> Iterator[Chart]:
    group = "Micrographs"
    if report.micrographs is not None:
        yield Chart(group, "Acceptance by micrograph", "Sorted; outliers are named.",
                    partial(draw_micrographs, micrographs=report.micrographs))  # fmt: skip
    for trend in report.trends:
        note = "Bars: 95 % intervals of the share; grey: where the particles are."
        yield Chart(group, f"Acceptance against {_plain(trend.label)}", note,
                    partial(draw_trend, trend=trend))  # fmt: skip
    for picks in report.pick_maps:
        yield Chart("Picks", f"Picks on {picks.name}", "Filled: accepted; crosses: rejected.",
                    partial(draw_picks, picks=picks))  # fmt: skip
    if report.features is not None:
        note = "Particles that the network finds alike lie close together."
        for name, draw in (("Mean score", draw_features), ("Number of particles", draw_density)):
            yield Chart("Features", f"Features: {name.lower()}", note,
                        partial(draw, features=report.features))  # fmt: skip


def _plain(label: str) -> str:
    name = label.partition(" (")[0]
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def draw_histogram(axes: Axes, report: Report) -> None:
    """Draw how many particles have which score, accepted and rejected in two colours."""
    histogram, cuts = report.histogram, report.cuts
    threshold, edges = float(cuts.thresholds[cuts.default]), histogram.edges
    if histogram.good is not None:
        bad = histogram.counts - histogram.good
        for counts, colour, name, n in (
            (histogram.good, BLUE, "good", cuts.n_good),
            (bad, ORANGE, "bad", cuts.n - cuts.n_good),
        ):
            axes.stairs(counts, edges, color=colour, alpha=0.35, fill=True)
            axes.stairs(counts, edges, color=colour, linewidth=1.5, label=f"{n:,} {name}")
    else:
        _draw_two_sides(axes, report, threshold)
    axes.axvline(threshold, color=VERMILION, linestyle="--", label=f"threshold {threshold:g}")
    scale = "Number of particles"
    if histogram.steep:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        scale += ", logarithmic"
    axes.set(xlabel="Score", ylabel=scale, title="Scores", xlim=(edges[0], edges[-1]))
    axes.yaxis.set_major_formatter(FuncFormatter(_grouped))
    axes.legend(loc="best", fontsize="small")


def _draw_two_sides(axes: Axes, report: Report, threshold: float) -> None:
    """Colour the bins by side; the bin with the threshold in it is cut in two at the line."""
    cuts, counts, edges = report.cuts, report.histogram.counts, report.histogram.edges
    accepted = int(cuts.accepted[cuts.default])
    for low, high, colour, n, name in (
        (threshold, np.inf, BLUE, accepted, "accepted"),
        (-np.inf, threshold, ORANGE, cuts.n - accepted, "rejected"),
    ):
        inside = (edges[1:] > low) & (edges[:-1] < high)
        left = np.maximum(edges[:-1], low)[inside]
        width = np.minimum(edges[1:], high)[inside] - left
        axes.bar(left, counts[inside], width, align="edge", color=colour, label=f"{n:,} {name}")


def draw_retention(axes: Axes, report: Report) -> None:
    """Draw the share that is kept against the threshold."""
    cuts = report.cuts
    threshold = float(cuts.thresholds[cuts.default])
    if cuts.good is None:
        _draw_share(axes, report, cuts.accepted, cuts.n, BLUE, "-", "all particles")
    else:
        bad = cuts.accepted - cuts.good
        _draw_share(axes, report, cuts.good, cuts.n_good, BLUE, "-", "good particles")
        _draw_share(axes, report, bad, cuts.n - cuts.n_good, ORANGE, "--", "bad particles")
    kept = cuts.accepted[cuts.default] / cuts.n
    axes.axvline(threshold, color=VERMILION, linestyle="--",
                 label=f"threshold {threshold:g} keeps {100 * kept:.1f} %")  # fmt: skip
    edges = report.histogram.edges
    axes.set(xlabel="Threshold (score)", ylabel="Accepted (%)", title="Retention",
             xlim=(edges[0], edges[-1]), ylim=(-2, 102))  # fmt: skip
    axes.legend(loc="best", fontsize="small")


def _draw_share(
    axes: Axes, report: Report, counts: NDArray[Any], n: int, colour: str, style: str, name: str
) -> None:
    if n:
        axes.step(report.cuts.thresholds, 100 * counts / n, where="pre", color=colour,
                  linestyle=style, label=name)  # fmt: skip


def draw_micrographs(axes: Axes, micrographs: Micrographs) -> None:
    """Draw the share accepted of each micrograph, sorted, outliers marked and named."""
    order = micrographs.order
    share = 100 * micrographs.share[order]
    rank = np.arange(1, len(order) + 1)
    marker = "o" if len(order) <= MARKED else ""
    axes.plot(rank, share, color=BLUE, marker=marker, markersize=4)
    mean = 100 * micrographs.accepted.sum() / micrographs.total.sum()
    axes.axhline(mean, color=GREY, linestyle=":", label=f"all: {mean:.1f} %")
    place = {int(number): at for at, number in enumerate(order.tolist())}
    for outliers, side in zip(micrographs.outliers(), ("lower", "upper")):
        at = [place[number] for number in outliers]
        if at:
            axes.plot(rank[at], share[at], color=VERMILION, marker="s", markersize=5, linestyle="",
                      label=f"{counted(len(at), 'outlier')}, {side}")  # fmt: skip
        _name(axes, micrographs, outliers, side)
    axes.set(xlabel="Micrograph, by acceptance", ylabel="Accepted (%)", ylim=(-4, 104),
             title=f"Acceptance of {counted(len(order), 'micrograph')}")  # fmt: skip
    if len(order) <= NAMED_ON_AXIS:
        names = distinct_names(micrographs.names)
        shown = [shortened(names[number], 16) for number in order.tolist()]
        axes.set_xticks(rank, shown, rotation=30, ha="right", fontsize="small")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="lower right", fontsize="small")


def _name(axes: Axes, micrographs: Micrographs, outliers: list[int], side: str) -> None:
    """List outliers where a rising curve leaves room: low ones top left, high ones below."""
    names = distinct_names(micrographs.names)
    lines = [
        f"{100 * micrographs.share[number]:3.0f} %  {shortened(names[number])}"
        for number in outliers[:MOST_NAMED]
    ]
    if not lines:
        return
    more = len(outliers) - len(lines)
    lines = [f"{'Lowest' if side == 'lower' else 'Highest'}:", *lines]
    lines += [f"and {more:,} more"] if more else []
    x, y = (0.04, 0.97) if side == "lower" else (0.4, 0.5)
    axes.text(x, y, "\n".join(lines), va="top", fontsize="small", transform=axes.transAxes)


def draw_trend(axes: Axes, trend: Trend) -> None:
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
             title=f"Acceptance against {_plain(trend.label)}")  # fmt: skip


def draw_picks(axes: Axes, picks: PickMap) -> None:
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
             title=f"{shortened(picks.name)}: {100 * kept / n:.0f} % accepted")  # fmt: skip
    axes.margins(0.03)
    axes.invert_yaxis()  # as RELION shows micrographs
    axes.locator_params(nbins=5)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


def draw_features(axes: Axes, features: FeatureMap) -> None:
    """Draw the mean score of each bin of the map of features."""
    x, y = features.xy.T
    picture = axes.hexbin(x, y, C=features.scores, gridsize=45, cmap="cividis",
                          vmin=0, vmax=1, mincnt=1, linewidths=0.1)  # fmt: skip
    axes.figure.colorbar(picture, ax=axes, label="Mean score")
    _finish_features(axes, features, "Features by mean score")


def draw_density(axes: Axes, features: FeatureMap) -> None:
    """Draw the number of particles in each bin of the map of features."""
    scale: Literal["log"] | None = "log" if len(features.xy) > LOG_DENSITY else None
    x, y = features.xy.T
    picture = axes.hexbin(x, y, gridsize=45, cmap="cividis", bins=scale, mincnt=1,
                          linewidths=0.1)  # fmt: skip
    axes.figure.colorbar(picture, ax=axes, label="Particles a bin")
    _finish_features(axes, features, "Features by number")


def _finish_features(axes: Axes, features: FeatureMap, title: str) -> None:
    first, second = (f"{100 * part:.0f} % of variance" for part in features.variance)
    shown = f"{len(features.xy):,} of {counted(features.n, 'particle')}"
    axes.set(xlabel=f"Component 1 ({first})", ylabel=f"Component 2 ({second})",
             title=f"{title}: {shown}")  # fmt: skip


def _grouped(value: float, place: int | None) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"

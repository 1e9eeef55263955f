"""Charts of what was thrown away: averages, and kept shares by class and by view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from relion_cryofilter.images.alignment import NO_SIGNAL
from relion_cryofilter.results.averages import MOST_CLUSTERS, Averages
from relion_cryofilter.results.charts import BLUE, GREY, VERMILION, Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from relion_cryofilter.results.summaries import Classes
    from relion_cryofilter.results.views import Views

ROWS, CELL = 2, (1.32, 1.08)  # of pictures, and a picture's place with its text, in pictures
NAMED_CLASSES = 30  # with more of them, not every bar has its number
WHITE = 0.995  # of the pixels are less far from grey than black and white are


def average_chart(averages: Averages) -> Chart:
    """Return the chart of the averages of one group."""
    name = averages.group
    group = f"Averages of {'rejected' if name == 'rejected' else 'other'} particles"
    return AVERAGES.of(averages, name=f"averages_{name}", group=group, title=averages.title)


def _draw_averages(axes: Axes, averages: Averages) -> None:
    """Draw averages in rows, under each what stands behind it; greyed where that is nothing."""
    columns = -(-MOST_CLUSTERS[averages.group] // ROWS)
    for number, cluster in enumerate(averages.clusters):
        row, column = divmod(number, columns)
        left, top = CELL[1] * column, CELL[0] * row
        image, average = cluster.average.image, cluster.average
        white = max(float(np.quantile(np.abs(image), WHITE)), 1e-12)
        axes.imshow(
            image, cmap="gray", vmin=-white, vmax=white, alpha=1.0 if average.has_signal else 0.35,
            extent=(left, left + 1, top + 1, top), interpolation="bicubic",
        )  # fmt: skip
        agreement = f"FRC {average.agreement:.2f}"
        said = f"{len(cluster.rows):,} ({100 * cluster.share:.0f} %), score {cluster.score:.2f}\n"
        said += agreement if average.has_signal else f"{agreement}: no common signal"
        if np.isnan(average.agreement):
            said = said.replace(agreement, "too few")
        axes.text(left + 0.5, top + 1.03, said, ha="center", va="top", fontsize="small",
                  color="black" if average.has_signal else GREY)  # fmt: skip
    axes.set(xlim=(0, CELL[1] * columns), ylim=(CELL[0] * ROWS, 0), aspect="equal")
    axes.set_title(averages.title)
    axes.axis("off")


def _draw_classes(axes: Axes, classes: Classes) -> None:
    """Draw the kept share of each class, and how many particles it has."""
    places = np.arange(len(classes.numbers))
    shares = 100 * classes.accepted / classes.total
    axes.bar(places, shares, color=BLUE)
    mean = 100 * classes.accepted.sum() / classes.total.sum()
    axes.axhline(mean, color=GREY, linestyle=":", label=f"all: {mean:.1f} %")
    step = -(-len(places) // NAMED_CLASSES)
    axes.set_xticks(places[::step], classes.numbers[::step].tolist(), fontsize="small")
    if len(places) <= NAMED_CLASSES / 2:
        for place, (share, n) in enumerate(zip(shares.tolist(), classes.total.tolist())):
            axes.text(place, share + 1, f"{n:,}", ha="center", va="bottom", fontsize="small")
    axes.set(xlabel="Class", ylabel="Accepted (%)", ylim=(0, 108),
             title=f"Acceptance of {len(places)} classes")  # fmt: skip
    axes.legend(loc="upper right", fontsize="small")


def _draw_views(axes: Axes, views: Views) -> None:
    """Draw the kept share in cells of one area, with the cones that keep less."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = 100 * views.kept / views.total  # white where there are no particles
    drawn: dict[str, Any] = {"cmap": "cividis", "vmin": 0, "vmax": 100}
    picture = axes.pcolormesh(views.rot_edges, views.height_edges, share.T, **drawn)
    axes.figure.colorbar(picture, ax=axes, label="Accepted (%)")
    for cone in views.cones:
        axes.plot(cone.rot_degrees, np.cos(np.deg2rad(cone.tilt_degrees)), marker="o",
                  markersize=16, markerfacecolor="none", markeredgecolor=VERMILION,
                  markeredgewidth=2, linestyle="")  # fmt: skip
    tilts = np.array([0, 30, 60, 90, 120, 150, 180])
    axes.set_yticks(np.cos(np.deg2rad(tilts)), tilts.tolist())
    axes.set_xticks(np.arange(-180, 181, 60))
    axes.set(xlabel="Rot (degrees)", ylabel="Tilt (degrees)", title="Acceptance by view")


AVERAGES = Chart(
    "averages", "Averages", "Averages",
    "Clusters of particles that the network finds alike, each turned and shifted upon its own "
    "mean; the clusters that score highest come first. FRC: how well two halves agree that were "
    f"aligned apart (mean Fourier ring correlation); below {NO_SIGNAL} they have no common signal.",
    _draw_averages,
)  # fmt: skip
CLASSES = Chart("classes", "Acceptance by class", "Acceptance by class",
                "Numbers: particles of the class in the input.", _draw_classes)  # fmt: skip
VIEWS = Chart(
    "views", "Acceptance by view", "Acceptance by view",
    "Cells of one area on the sphere; white: no particles; circles: cones that keep significantly "
    "less than the rest.", _draw_views,
)  # fmt: skip

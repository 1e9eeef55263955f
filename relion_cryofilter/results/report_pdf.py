"""logfile.pdf: the pages that RELION's Display menu shows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from relion_cryofilter.files import replacing
from relion_cryofilter.results.charts import Chart, charts_of
from relion_cryofilter.results.names import printable
from relion_cryofilter.results.report_data import Gallery, Pictures, Report
from relion_cryofilter.results.thumbnails import THUMBNAIL_PX, sprite

PAGE_INCH, MARGIN_INCH = (11.69, 8.27), 0.35
PICTURES_A_ROW, ROWS_A_GALLERY = 12, 2
CELL_PX = (THUMBNAIL_PX + 14, THUMBNAIL_PX + 4)
FACT_WIDTH, TEXT_WIDTH = 54, 130
LINES_A_PAGE = 46
CHARTS_A_PAGE, GALLERIES_A_PAGE = 4, 4
HALF_PAGE_INCH = 5.2


@dataclass(frozen=True)
class ChartPage:
    """Some charts of one group, drawn side by side; logfile.pdf and report.html share them."""

    group: str
    charts: Sequence[Chart]
    figure: Figure


def chart_pages(report: Report) -> list[ChartPage]:
    """Draw the charts that do not move with the slider, up to four a page."""
    pages = []
    still = [chart for chart in charts_of(report) if not chart.moves]
    for name, group in groupby(still, key=lambda chart: chart.group):
        members = list(group)
        for start in range(0, len(members), CHARTS_A_PAGE):
            charts = members[start : start + CHARTS_A_PAGE]
            pages.append(ChartPage(name, charts, _chart_figure(charts)))
    return pages


def write_pdf(path: Path, report: Report, pages: Sequence[ChartPage]) -> None:
    """Write the report as PDF, complete or not at all."""
    with replacing(path) as file, PdfPages(file, metadata={"Title": report.title}) as pdf:
        for figure in _pages(report, pages):
            width, height = figure.get_size_inches()
            margins = Bbox.from_extents(
                -MARGIN_INCH, -MARGIN_INCH, width + MARGIN_INCH, height + MARGIN_INCH
            )
            pdf.savefig(figure, bbox_inches=margins)
            figure.set_layout_engine("none")  # for another picture of it: all has its place


def _pages(report: Report, pages: Sequence[ChartPage]) -> Iterator[Figure]:
    yield _front_page(report, [chart for chart in charts_of(report) if chart.moves])
    lines = _texts(report)
    for start in range(0, len(lines), LINES_A_PAGE):
        yield _text_page(lines[start : start + LINES_A_PAGE])
    for start in range(0, len(report.galleries), GALLERIES_A_PAGE):
        yield _gallery_page(report.pictures, report.galleries[start : start + GALLERIES_A_PAGE])
    yield from (page.figure for page in pages)


def _page(title: str) -> Figure:
    figure = Figure(figsize=PAGE_INCH, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    return figure


def _front_page(report: Report, charts: Sequence[Chart]) -> Figure:
    figure = _page(shortened_title(report.title))
    left, right = np.ravel(figure.subfigures(1, 2, squeeze=False, width_ratios=[1.1, 1]))
    _write_facts(left.subplots(), report)
    for axes, chart in zip(np.ravel(right.subplots(len(charts), 1)), charts):
        chart.draw(axes)
    return figure


def _write_facts(axes: Axes, report: Report) -> None:
    axes.axis("off")
    notes = [("" if number else "To note", note) for number, note in enumerate(report.notes)]
    line = 0.0
    for name, value in [*report.facts, *notes]:
        for number, part in enumerate(_wrapped(value)):
            texts = ((0.24, part, "normal"), (0.0, name if not number else "", "bold"))
            for x, text, weight in texts:
                axes.text(x, 1 - line * 0.0235, printable(text), va="top", fontsize=8.5,
                          fontweight=weight, transform=axes.transAxes, in_layout=False)  # fmt: skip
            line += 1
        line += 0.35


def _wrapped(text: str) -> list[str]:
    return [
        part
        for row in text.splitlines() or [""]
        for part in textwrap.wrap(row, FACT_WIDTH, break_on_hyphens=False) or [""]
    ]


def shortened_title(title: str, most: int = 100) -> str:
    """Return a title that fits on a page."""
    return printable(title if len(title) <= most else f"{title[: most - 1]}…")


def _texts(report: Report) -> list[tuple[str, bool]]:
    """Return lines of notes, outlying micrographs, label sources and self-tests; bold or not."""
    lines: list[tuple[str, bool]] = []
    for title, texts in text_sections(report):
        lines.append((title, True))
        for text in texts:
            wrapped = textwrap.wrap(text, TEXT_WIDTH, subsequent_indent="    ") or [""]
            lines += [(part, False) for part in wrapped]
        lines.append(("", False))
    return lines


def text_sections(report: Report) -> Iterator[tuple[str, list[str]]]:
    """Yield the titles and lines of what a report says in words."""
    if report.measured is not None:
        yield "Figures", report.measured.evaluation.summary().splitlines()
        if report.sources:
            yield "Labels", list(report.sources)
        if report.measured.self_tests:
            yield "Self-tests", [str(test) for test in report.measured.self_tests]
    if report.micrographs is not None:
        found = report.micrographs.outliers()
        for name, outliers in zip(("Lowest", "Highest"), found):
            if outliers:
                title = f"{name} acceptance: outlying micrographs"
                yield title, outlier_lines(report, outliers)


def outlier_lines(report: Report, outliers: Sequence[int], most: int = 20) -> list[str]:
    """Return a line for each outlying micrograph, the first few of many."""
    table = report.micrographs
    if table is None:
        return []
    lines = [
        f"{table.names[m]}: {table.accepted[m]:,} of {table.total[m]:,} accepted "
        f"({100 * table.share[m]:.0f} %)"
        for m in outliers[:most]
    ]
    more = len(outliers) - most
    return [*lines, f"… and {more:,} more"] if more > 0 else lines


def _text_page(lines: Sequence[tuple[str, bool]]) -> Figure:
    figure = _page("")
    axes = figure.subplots()
    axes.axis("off")
    for number, (text, bold) in enumerate(lines):
        axes.text(0.02, 1 - number / LINES_A_PAGE, printable(text), va="top", fontsize=8.5,
                  family="monospace" if not bold else "sans-serif",
                  fontweight="bold" if bold else "normal", transform=axes.transAxes,
                  in_layout=False)  # fmt: skip
    return figure


def _gallery_page(pictures: Pictures, galleries: Sequence[Gallery]) -> Figure:
    figure = _page(f"Particles. {pictures.about}")
    for axes, gallery in zip(np.ravel(figure.subplots(len(galleries), 1)), galleries):
        _draw_gallery(axes, pictures, gallery)
    return figure


def _draw_gallery(axes: Axes, pictures: Pictures, gallery: Gallery) -> None:
    """Draw two rows of pictures as one image, with the score under each."""
    members = list(gallery.members[: PICTURES_A_ROW * ROWS_A_GALLERY])
    axes.set_title(gallery.title, loc="left", fontsize=10)
    axes.axis("off")
    framed = np.full((PICTURES_A_ROW * ROWS_A_GALLERY, *CELL_PX), 255, np.uint8)
    framed[: len(members), :THUMBNAIL_PX, :THUMBNAIL_PX] = pictures.images[members]
    axes.imshow(sprite(framed, PICTURES_A_ROW), cmap="gray", vmin=0, vmax=255, resample=False)
    if not members:
        axes.text(0, 20, gallery.empty, va="top")
    for number, member in enumerate(members):
        row, column = divmod(number, PICTURES_A_ROW)
        place = (CELL_PX[1] * column + THUMBNAIL_PX / 2, CELL_PX[0] * row + THUMBNAIL_PX + 1)
        axes.text(*place, f"{pictures.scores[member]:.4f}", ha="center", va="top", fontsize=6.5,
                  in_layout=False)  # fmt: skip


def _chart_figure(charts: Sequence[Chart]) -> Figure:
    figure = Figure(figsize=PAGE_INCH, layout="constrained")
    rows, columns = {1: (1, 1), 2: (1, 2)}.get(len(charts), (2, 2))
    if rows == 1:
        figure.set_size_inches(PAGE_INCH[0], HALF_PAGE_INCH)
    places = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes, chart in zip(places, charts):
        chart.draw(axes)
    for axes in places[len(charts) :]:
        axes.axis("off")
    return figure

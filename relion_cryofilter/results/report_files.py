"""logfile.pdf and report.html, of one value: a `Report`.

Matplotlib and Pillow are imported inside `write_report`'s try: where they are missing or broken a
job loses its report, and nothing else.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.files import LOGFILE, REPORT, remove, replacing, write_text
from relion_cryofilter.images.thumbnails import THUMBNAIL_PX, sprite
from relion_cryofilter.options import available_cores
from relion_cryofilter.processes import need_memory
from relion_cryofilter.progress import duration
from relion_cryofilter.results.charts import Chart, clean, printable, write_png
from relion_cryofilter.results.outputs import Output

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from relion_cryofilter.results.summaries import Cuts, Histogram

log = logging.getLogger("relion_cryofilter")

PAGE_INCH, HALF_PAGE_INCH, MARGIN_INCH = (11.69, 8.27), (11.69, 5.2), 0.35
PICTURES_A_ROW, ROWS_A_GALLERY = 12, 2
CELL_PX = (THUMBNAIL_PX + 14, THUMBNAIL_PX + 4)
FACT_WIDTH, TEXT_WIDTH, TITLE_WIDTH, FONT = 54, 130, 100, 8.5
LINES_A_PAGE, CHARTS_A_PAGE, GALLERIES_A_PAGE = 46, 4, 4
NO_PICTURE = "none"
REPORT_BYTES, BYTES_A_CORE = 0.6e9, 50e6  # address space of its libraries, and of their threads

# Of report.html: its sprite, the pictures on either side of the slider's cut, its charts.
SPRITE_COLUMNS, NEAREST, DOTS_PER_INCH, COLOURS = 20, 16, 110, 256


@dataclass(frozen=True, eq=False)
class Pictures:
    """Small images of m particles, by falling score."""

    images: NDArray[np.uint8]  # (m, p, p)
    scores: NDArray[np.float64]  # (m,)
    names: Sequence[str]
    about: str = ""  # how they were made


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that logfile.pdf and report.html show.

    Attributes
    ----------
    title
        Of the report: the mode and the input.
    facts
        Names and texts: inputs, models, options, counts, times, versions.
    cuts, histogram
        Of the scores, for the slider.
    charts, further
        In order; those that move with the slider are on the first page, the `further` ones after
        words and galleries.
    pictures, galleries
        The pictures, and by the title of each gallery the numbers of those in it.
    notes
        Warnings and what is not shown, and why.
    sections
        Titles and lines of what is said in words.
    command
        Words of a `select` with {cut} to be filled in; "" where there is none.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    cuts: Cuts
    histogram: Histogram
    charts: Sequence[Chart]
    pictures: Pictures
    galleries: Mapping[str, Sequence[int]]
    further: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    sections: Sequence[tuple[str, Sequence[str]]] = ()
    command: str = ""


@dataclass(frozen=True)
class ChartPage:
    """Some charts of one group side by side, drawn once for both files."""

    group: str
    charts: Sequence[Chart]
    figure: Figure


def write_report(folder: Path, collect: Callable[[], Report]) -> tuple[Output, ...]:
    """Write both files, or say why not and leave no report of an earlier run.

    `collect` makes the report; whatever it raises costs a warning.
    """
    start = time.monotonic()
    try:
        need_memory(REPORT_BYTES + available_cores() * BYTES_A_CORE, "the report")
        report = collect()
        pages, further = chart_pages(report.charts), chart_pages(report.further)
        write_pdf(folder / LOGFILE, report, pages, further)
        write_html(folder / REPORT, report, pages, further)
    except Exception as error:  # whatever it is, the results are there and must stay a success
        for name in (LOGFILE, REPORT):
            remove(folder / name)
        log.warning(
            "No report (%s, %s) could be made: %s: %s. The results themselves are complete; "
            "--verbose shows where it failed.", LOGFILE, REPORT, type(error).__name__,
            " ".join(str(error).split()),
        )  # fmt: skip
        log.debug("The report failed here:", exc_info=error)
        return ()
    log.debug("The report took %s.", duration(time.monotonic() - start))
    return (Output(LOGFILE, "log"),)


def chart_pages(charts: Sequence[Chart]) -> list[ChartPage]:
    """Draw the charts that do not move with the slider, up to four of a group on a page."""
    from matplotlib.figure import Figure

    pages = []
    still = [chart for chart in charts if not chart.moves]
    for group, found in groupby(still, key=lambda chart: chart.group):
        members = list(found)
        for start in range(0, len(members), CHARTS_A_PAGE):
            shown = members[start : start + CHARTS_A_PAGE]
            rows, columns = {1: (1, 1), 2: (1, 2)}.get(len(shown), (2, 2))
            size = HALF_PAGE_INCH if rows == 1 else PAGE_INCH
            figure = Figure(figsize=size, layout="constrained")
            places = np.ravel(figure.subplots(rows, columns, squeeze=False))
            for axes, chart in zip(places, shown):
                chart.draw(axes)
            for axes in places[len(shown) :]:
                axes.axis("off")
            pages.append(ChartPage(group, shown, figure))
    return pages


def write_pdf(
    path: Path, report: Report, pages: Sequence[ChartPage], further: Sequence[ChartPage] = ()
) -> None:
    """Write the report as PDF, complete or not at all; the pages: charts that stay."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.transforms import Bbox

    # The front page: facts and notes, and beside them the charts that move.
    title = report.title
    title = title if len(title) <= TITLE_WIDTH else f"{title[: TITLE_WIDTH - 1]}…"
    figures = [_page(printable(title))]
    left, right = np.ravel(figures[0].subfigures(1, 2, squeeze=False, width_ratios=[1.1, 1]))
    axes = left.subplots()
    axes.axis("off")
    style: dict[str, Any] = {"va": "top", "transform": axes.transAxes, "in_layout": False}
    notes = [("" if number else "To note", note) for number, note in enumerate(report.notes)]
    line = 0.0
    for name, value in [*report.facts, *notes]:
        y = 1 - line * 0.0235
        axes.text(0, y, printable(name), fontsize=FONT, fontweight="bold", **style)
        for row in value.splitlines() or [""]:
            for part in textwrap.wrap(row, FACT_WIDTH, break_on_hyphens=False) or [""]:
                axes.text(0.24, 1 - line * 0.0235, printable(part), fontsize=FONT, **style)
                line += 1
        line += 0.35
    moving = [chart for chart in report.charts if chart.moves]
    for axes, chart in zip(np.ravel(right.subplots(len(moving), 1)), moving):
        chart.draw(axes)
    figures += [page.figure for page in pages]

    # Words.
    lines: list[tuple[str, dict[str, Any]]] = []
    for title, texts in report.sections:
        lines.append((title, {"fontweight": "bold"}))
        for text in texts:
            parts = textwrap.wrap(text, TEXT_WIDTH, subsequent_indent="    ") or [""]
            lines += [(part, {"family": "monospace"}) for part in parts]
        lines.append(("", {}))
    for start in range(0, len(lines), LINES_A_PAGE):
        figures.append(_page(""))
        axes = figures[-1].subplots()
        axes.axis("off")
        for number, (text, font) in enumerate(lines[start : start + LINES_A_PAGE]):
            axes.text(0.02, 1 - number / LINES_A_PAGE, printable(text), va="top", fontsize=FONT,
                      transform=axes.transAxes, in_layout=False, **font)  # fmt: skip

    # Galleries: two rows of pictures as one image, with the score under each.
    pictures, galleries = report.pictures, list(report.galleries.items())
    for start in range(0, len(galleries), GALLERIES_A_PAGE):
        shown = galleries[start : start + GALLERIES_A_PAGE]
        figures.append(_page(f"Particles. {pictures.about}"))
        for axes, (title, chosen) in zip(np.ravel(figures[-1].subplots(len(shown), 1)), shown):
            members = list(chosen[: PICTURES_A_ROW * ROWS_A_GALLERY])
            axes.set_title(title, loc="left", fontsize=10)
            axes.axis("off")
            framed = np.full((PICTURES_A_ROW * ROWS_A_GALLERY, *CELL_PX), 255, np.uint8)
            framed[: len(members), :THUMBNAIL_PX, :THUMBNAIL_PX] = pictures.images[members]
            rows = sprite(framed, PICTURES_A_ROW)
            axes.imshow(rows, cmap="gray", vmin=0, vmax=255, resample=False)
            if not members:
                axes.text(0, 20, NO_PICTURE, va="top")
            for number, member in enumerate(members):
                place, column = divmod(number, PICTURES_A_ROW)
                x, y = CELL_PX[1] * column + THUMBNAIL_PX / 2, CELL_PX[0] * place + THUMBNAIL_PX + 1
                axes.text(x, y, f"{pictures.scores[member]:.4f}", ha="center", va="top",
                          fontsize=6.5, in_layout=False)  # fmt: skip

    # All that, and the other charts.
    with replacing(path) as file, PdfPages(file, metadata={"Title": clean(report.title)}) as pdf:
        for figure in [*figures, *(page.figure for page in further)]:
            width, height = figure.get_size_inches() + MARGIN_INCH
            margins = Bbox.from_extents(-MARGIN_INCH, -MARGIN_INCH, width, height)
            pdf.savefig(figure, bbox_inches=margins)
            figure.set_layout_engine("none")  # for another picture of it: all has its place


def _page(title: str) -> Figure:
    """Return an empty page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PAGE_INCH, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    return figure


def write_html(
    path: Path, report: Report, pages: Sequence[ChartPage], further: Sequence[ChartPage] = ()
) -> None:
    """Write the report as one HTML file, complete or not at all; the pages: charts that stay."""
    from PIL import Image

    # Words: columns of figures as they are, other lines as lists.
    texts = ""
    for title, lines in report.sections:
        body = "<ul>" + "".join(f"<li>{_escaped(line)}</li>" for line in lines) + "</ul>"
        if title in ("Figures", "Classes"):
            body = "<pre>" + "\n".join(map(_escaped, lines)) + "</pre>"
        texts += f"<section><h2>{_escaped(title)}</h2>{body}</section>"

    # What the page's script reads.
    cuts, histogram, pictures = report.cuts, report.histogram, report.pictures
    data = {
        "thresholds": cuts.thresholds.tolist(),
        "accepted": cuts.accepted.tolist(),
        "good": None if cuts.good is None else cuts.good.tolist(),
        "start": cuts.default,
        "n": cuts.n,
        "nGood": cuts.n_good,
        "edges": np.round(histogram.edges, 6).tolist(),
        "counts": histogram.counts.tolist(),
        "goodCounts": None if histogram.good is None else histogram.good.tolist(),
        "steep": histogram.steep,
        "scores": pictures.scores.tolist(),
        "names": [clean(name) for name in pictures.names],
        "pictures": pictures.about,
        "columns": SPRITE_COLUMNS,
        "nearest": NEAREST,
        "galleries": [[*gallery, NO_PICTURE] for gallery in report.galleries.items()],
        "command": clean(report.command),
    }
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=_escaped(report.title),
        facts="".join(f"<dt>{_escaped(k)}</dt><dd>{_escaped(v)}</dd>" for k, v in report.facts),
        notes="".join(f"<li>{_escaped(note)}</li>" for note in report.notes),
        texts=texts,
        charts=_sections_of(pages),
        further=_sections_of(further),
        sprite=_data_uri(Image.fromarray(sprite(pictures.images, SPRITE_COLUMNS))),
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    write_text(path, text)


def _sections_of(pages: Sequence[ChartPage]) -> str:
    """Return charts as HTML, under a title for each group."""
    from PIL import Image

    charts, group = "", ""
    for page in pages:
        title = "" if page.group == group else f"<h2>{_escaped(page.group)}</h2>"
        group = page.group
        names = _escaped("; ".join(chart.title for chart in page.charts))
        notes = _escaped(" ".join(dict.fromkeys(chart.note for chart in page.charts)))
        file = io.BytesIO()
        write_png(page.figure, file, DOTS_PER_INCH)
        source = _data_uri(Image.open(file).convert("RGB").quantize(COLOURS))
        charts += (
            f'<section>{title}<figure><img alt="{names}" src="{source}">'
            f"<figcaption>{notes}</figcaption></figure></section>"
        )
    return charts


def _escaped(text: str) -> str:
    """Return text as HTML."""
    return html.escape(clean(text))


def _data_uri(picture: Image) -> str:
    """Return a picture as the address of an image."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

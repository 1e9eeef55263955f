"""report.html: one file without network, with a slider that moves the threshold."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from relion_cryofilter.files import write_text
from relion_cryofilter.results.report_data import Report
from relion_cryofilter.results.report_pdf import ChartPage, text_sections
from relion_cryofilter.results.thumbnails import sprite

SPRITE_COLUMNS = 20
NEAREST = 16
DOTS_PER_INCH = 110
COLOURS = 64


def write_html(path: Path, report: Report, pages: Sequence[ChartPage]) -> None:
    """Write the report as one HTML file, complete or not at all."""
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=_escaped(report.title),
        facts="".join(f"<dt>{_escaped(k)}</dt><dd>{_escaped(v)}</dd>" for k, v in report.facts),
        notes="".join(f"<li>{_escaped(note)}</li>" for note in report.notes),
        texts=_texts(report),
        charts=_charts(pages),
        sprite=_data_uri(Image.fromarray(sprite(report.pictures.images, SPRITE_COLUMNS))),
        data=json.dumps(_data(report)).replace("<", "\\u003c"),
    )
    write_text(path, text)


def _escaped(text: str) -> str:
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _texts(report: Report) -> str:
    parts = []
    for title, lines in text_sections(report):
        tag = "pre" if title == "Figures" else "div"
        body = "\n".join(map(_escaped, lines))
        if tag == "div":
            body = "".join(f"<li>{_escaped(line)}</li>" for line in lines)
            body = f"<ul>{body}</ul>"
        parts.append(f"<section><h2>{_escaped(title)}</h2><{tag}>{body}</{tag}></section>")
    return "".join(parts)


def _charts(pages: Sequence[ChartPage]) -> str:
    parts, group = [], ""
    for page in pages:
        title = "" if page.group == group else f"<h2>{_escaped(page.group)}</h2>"
        group = page.group
        names = _escaped("; ".join(chart.title for chart in page.charts))
        notes = _escaped(" ".join(dict.fromkeys(chart.note for chart in page.charts)))
        parts.append(
            f'<section>{title}<figure><img alt="{names}" src="{_png(page.figure)}">'
            f"<figcaption>{notes}</figcaption></figure></section>"
        )
    return "".join(parts)


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return _data_uri(Image.open(file).convert("RGB").quantize(COLOURS))


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _data(report: Report) -> dict[str, Any]:
    cuts, histogram, pictures = report.cuts, report.histogram, report.pictures
    return {
        "thresholds": cuts.thresholds.tolist(),
        "accepted": cuts.accepted.tolist(),
        "good": _list(cuts.good),
        "start": cuts.default,
        "n": cuts.n,
        "nGood": cuts.n_good,
        "edges": np.round(histogram.edges, 6).tolist(),
        "counts": histogram.counts.tolist(),
        "goodCounts": _list(histogram.good),
        "steep": histogram.steep,
        "scores": pictures.scores.tolist(),
        "names": [_printable(name) for name in pictures.names],
        "pictures": pictures.about,
        "columns": SPRITE_COLUMNS,
        "nearest": NEAREST,
        "galleries": [[g.title, list(g.members), g.empty] for g in report.galleries],
        "command": _printable(report.command),
    }


def _list(values: NDArray[Any] | None) -> list[Any] | None:
    return None if values is None else values.tolist()

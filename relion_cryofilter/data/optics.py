"""Optics groups: pixel size (Å/px) and box size (px), by RELION's tables or its older columns."""

from __future__ import annotations

from dataclasses import dataclass

from relion_cryofilter.data.star import Loop, StarFile, columns
from relion_cryofilter.data.star_labels import IMAGE_PIXEL_SIZE, IMAGE_SIZE, OPTICS_GROUP


@dataclass(frozen=True)
class OpticsGroup:
    """One optics group.

    Attributes
    ----------
    name
        The value of rlnOpticsGroup (or of rlnOpticsGroupName) as text.
    pixel_size_angstrom
        Å/px of the particle images; None when the file does not say.
    box_px
        Box size in pixels as the file says it; None when it does not.
    """

    name: str
    pixel_size_angstrom: float | None = None
    box_px: int | None = None


def read_optics(star: StarFile) -> dict[str, OpticsGroup]:
    """Return the optics groups by their rlnOpticsGroup; empty when the file has no table."""
    loop = star.loop("optics")
    if loop is None or OPTICS_GROUP not in loop.labels:
        return {}
    wanted = [OPTICS_GROUP, IMAGE_PIXEL_SIZE, IMAGE_SIZE]
    present = [label for label in wanted if label in loop.labels]
    groups = {}
    for values in columns(star, loop, present):
        row = dict(zip(present, values))
        name = group_name(row[OPTICS_GROUP])
        box = _number(row.get(IMAGE_SIZE))
        groups[name] = OpticsGroup(
            name, _number(row.get(IMAGE_PIXEL_SIZE)), int(box) if box else None
        )
    return groups


def group_name(text: str) -> str:
    """Return an optics group's number as RELION reads it: ``01`` and ``1.000000`` are ``1``."""
    number = _number(text)
    return str(int(number)) if number and number == int(number) else text


def pixel_size_of_rows(star: StarFile, loop: Loop) -> float | None:
    """Return the pixel size (Å/px) that the first row tells itself, or None.

    RELION 3.0's way is the detector pixel (µm) over the magnification; cryoDRGN and Warp write
    rlnImagePixelSize or rlnPixelSize among the particles.
    """
    for label in (IMAGE_PIXEL_SIZE, "rlnPixelSize"):
        if label in loop.labels:
            return _number(next(columns(star, loop, [label]))[0])
    labels = ["rlnDetectorPixelSize", "rlnMagnification"]
    if not all(label in loop.labels for label in labels):
        return None
    detector, magnification = map(_number, next(columns(star, loop, labels)))
    return detector * 1e4 / magnification if detector and magnification else None


def _number(text: str | None) -> float | None:
    """Return a positive number, or None for anything else (absent, 0, text)."""
    try:
        value = float(text or 0)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None

"""Images that can't be scored: found, counted, named, and either refused or set aside."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.errors import ImageError
from relion_cryofilter.files import BAD_IMAGES, write_text
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.stacks import StackHeader, read_header
from relion_cryofilter.progress import counted

log = logging.getLogger("relion_cryofilter")

MISSING = "in stacks that can't be read"
PAST_END = "past the end of their stack"
TRUNCATED = "beyond where their stack is truncated"
NO_PARTICLES = "in files that hold no particle images"
OTHER_BOX = "of another box than the input says"
NOT_FINITE = "with NaN or infinite values"
CONSTANT = "blank (all pixels equal)"
TOO_LARGE = "with values too large (beyond 1e18) for their scatter to be a float32 number"
FLAT = "no contrast left after down-sampling"

_NAMED, _ALSO_NAMED = 5, 3  # causes, and images besides the first of each
_MICROGRAPH_PX = 2048  # boxes are smaller


class BadImages:
    """The rows of a particle set whose images can't be used, each with its reason."""

    def __init__(self, particles: ParticleSet) -> None:
        self._particles = particles
        self._reasons: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def rows(self) -> np.ndarray:
        """(n_bad,) the bad rows, ascending."""
        return np.array(sorted(self._reasons), np.int64)

    def add(self, rows: Iterable[int], reason: str, detail: str = "") -> None:
        """Note that `rows` can't be used; `detail` goes into messages after the first places."""
        self._reasons.update((int(row), (reason, detail)) for row in rows)

    def to_dict(self) -> dict[int, tuple[str, str]]:
        """Return reason and detail by row, for `update` in another process."""
        return dict(self._reasons)

    def update(self, found: dict[int, tuple[str, str]]) -> None:
        """Note what `to_dict` gave in another process."""
        self._reasons.update(found)

    def summary(self) -> str:
        """Return counts by reason and the first few places, as one text."""
        counts = Counter(reason for reason, _ in self._reasons.values())
        kinds = "; ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        lines = [f"{len(self):,} of {len(self._particles):,} images can't be used: {kinds}."]
        # One line for all of a stack that can't be used for one reason.
        causes: dict[tuple[int, str, str], list[int]] = {}
        for row in self.rows.tolist():
            cause = (int(self._particles.stack_of[row]), *self._reasons[row])
            causes.setdefault(cause, []).append(row)
        for (_, reason, detail), (row, *others) in list(causes.items())[:_NAMED]:
            image, place = self._particles.image_name(row), self._particles.place(row)
            where = image if place == image else f"{place}: {image}"
            also = ", ".join(map(self._particles.image_name, others[:_ALSO_NAMED]))
            if (left := len(others) - _ALSO_NAMED) > 0:
                also += f" and {left:,} more of this stack"
            more = f" (also {also})" if also else ""
            lines.append(f"  {where}: {detail or reason}{more}".replace("\r", "\\r"))
        if left := sum(map(len, list(causes.values())[_NAMED:])):
            lines.append(f"  … and {left:,} more, in other stacks or for other reasons")
        return "\n".join(lines)

    def refuse(self, otherwise: str = "--skip_bad goes on without them") -> None:
        """Raise an ImageError that names the images, if there are any, and what else to do."""
        if self._reasons:
            raise ImageError(
                f"{self.summary()}\nCheck that the stacks belong to this input, or extract them "
                f"again; {otherwise}."
            )

    def refuse_if_all(self) -> None:
        """Raise an ImageError if no image is left, which is no result to go on with."""
        if len(self) == len(self._particles):
            missing = all(reason == MISSING for reason, _ in self._reasons.values())
            cure = "the working directory and the stacks" if missing else "how the stacks were made"
            raise ImageError(f"{self.summary()}\nNo image is left. Check {cure}.")

    def write_csv(self, path: Path) -> None:
        """Write `path`: row (0-based), image, reason."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "image", "reason"])
        for row in self.rows.tolist():
            reason, detail = self._reasons[row]
            writer.writerow([row, self._particles.image_name(row), detail or reason])
        write_text(path, text.getvalue())


def usable_in(particles: ParticleSet, folder: Path) -> NDArray[np.bool_]:
    """Return which of n particles (n,) have images that no bad_images.csv of `folder` lists."""
    usable = np.ones(len(particles), bool)
    path = folder / BAD_IMAGES
    if not path.is_file():
        return usable
    with path.open(encoding="utf-8", newline="") as file:
        listed = {line.get("image") or "" for line in csv.DictReader(file)}
    stacks = {image.partition("@")[2] for image in listed}
    among = [number for number, name in enumerate(particles.stack_names) if name in stacks]
    rows = np.flatnonzero(np.isin(particles.stack_of, among))
    usable[[row for row in rows.tolist() if particles.image_name(row) in listed]] = False
    unusable = counted(int((~usable).sum()), "image")
    log.info("%s lists %s of these; they are left out.", path, unusable)
    return usable


def say_unsigned(headers: Iterable[StackHeader | None]) -> None:
    """Log how many stacks hold bytes without sign (MRC mode 0), which few programs write."""
    count = sum(header is not None and header.dtype == np.uint8 for header in headers)
    if count:
        log.info("Read as bytes from 0 to 255 (MRC mode 0): %s.", counted(count, "stack"))


def check_stacks(particles: ParticleSet) -> tuple[list[StackHeader | None], BadImages]:
    """Return each stack's header, and the rows whose image isn't there, or is none of a particle.

    A header is None if it can't be read or its images can't be particles', or if no row is in its
    stack. Volumes in place of images are an ImageError.
    """
    headers: list[StackHeader | None] = []
    problems: list[tuple[str, str]] = []
    needed = np.bincount(particles.stack_of, minlength=len(particles.stacks)) > 0
    inverted = particles.inverted or (False,) * len(particles.stacks)
    names = particles.stack_names
    for path, name, wanted, dark in zip(particles.stacks, names, needed.tolist(), inverted):
        header, problem = None, ("", "")
        try:
            header = replace(read_header(path), inverted=dark) if wanted else None
        except ImageError as error:
            problem = MISSING, str(error).partition(". ")[0]
        if header and name in particles.unnumbered and header.n_images > 1:
            raise ImageError(
                f"{path}: {particles.source} names it without an image number, but it holds "
                f"{header.n_images} sections, as a subtomogram or a map does. This program scores "
                "single-particle images only."
            )
        if header and (header.ny != header.nx or header.nx >= _MICROGRAPH_PX):
            size = f"its images have {header.nx} x {header.ny} px"
            problem = NO_PARTICLES, f"{path}: {size}; it looks like a micrograph or is damaged"
            header = None
        headers.append(header)
        problems.append(problem)

    # Where the header and the input disagree on the box, one of them is wrong.
    bad = BadImages(particles)
    boxes = np.array([header.nx if header else 0 for header in headers])[particles.stack_of]
    groups = [group.box_px or np.nan for group in particles.optics]
    said_px = np.array(groups, np.float64)[particles.optics_of]
    for row in np.flatnonzero((boxes > 0) & (boxes != said_px) & ~np.isnan(said_px)).tolist():
        path, detail = particles.stacks[particles.stack_of[row]], f"{boxes[row]} px"
        bad.add([row], OTHER_BOX, f"{path} has boxes of {detail}, not of {said_px[row]:g} px")

    # Images that the files don't hold.
    held = np.array([header.n_complete if header else 0 for header in headers], np.int64)
    index = particles.index
    for row in np.flatnonzero((index >= held[particles.stack_of]) | (index < 0)).tolist():
        stack, place = particles.stack_of[row], index[row]
        header = headers[stack]
        if header is None:
            bad.add([row], *problems[stack])
            continue
        name, said = header.path.name, header.n_images
        if place >= said or place < 0:
            detail = f"{name} holds {said} images but image {place + 1} is asked for"
            bad.add([row], PAST_END, detail)
        else:
            holds = f"its header says {said} images, the file holds {header.n_complete}"
            bad.add([row], TRUNCATED, f"{name} is truncated: {holds}")
    return headers, bad

"""Labels that scores contradict: the particles to look at, and the classes they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.particles.labels import LabelledSet

MOST_SUSPECTS, DOUBTFUL = 150, 0.5
"""Of each kind, and how far a score is from its label at least."""
FEWEST_OF_CLASS, FAR = 10, 0.6
"""Particles of a class that is called mislabelled, and how far its mean score is from its label."""


@dataclass(frozen=True)
class LabelledClass:
    """A class that labels come from.

    Attributes
    ----------
    number, particles
        Its number, and how many labelled particles it has.
    good
        Whether it was labelled good.
    estimated_good
        The mean of its particles' out-of-fold scores, so the share of good ones that is expected.
    """

    number: int
    particles: int
    good: bool
    estimated_good: float

    @property
    def mislabelled(self) -> bool:
        """Whether most of its particles look as if they were of the other kind."""
        off = 1 - self.estimated_good if self.good else self.estimated_good
        return self.particles >= FEWEST_OF_CLASS and off > FAR

    def __str__(self) -> str:
        """Return the class as a line of a table."""
        label, mark = "good" if self.good else "bad", "  looks mislabelled" * self.mislabelled
        share = f"{100 * self.estimated_good:.0f} %"
        return f"{self.number:>5} {self.particles:>10,} {label:>9} {share:>15}{mark}"


@dataclass(frozen=True, eq=False)
class Suspects:
    """The particles whose labels scores contradict most.

    Attributes
    ----------
    rows
        Of the measured set; the most contradicted first.
    classes
        The classes that labels come from, by number; empty where they come from files.
    """

    rows: NDArray[np.int64]
    classes: tuple[LabelledClass, ...]

    def table(self) -> list[str]:
        """Return the classes as lines under a head."""
        head = f"{'class':>5} {'particles':>10} {'labelled':>9} {'estimated good':>15}"
        return [head, *map(str, self.classes)] if self.classes else []


def suspects_of(labelled: LabelledSet, scores: NDArray[np.float64]) -> Suspects:
    """Find the particles whose label their out-of-fold scores (n,) contradict most.

    At most 150 of each kind, those that score on the other side of 0.5.
    """
    labels = labelled.labels
    contradiction = np.where(labels, 1 - scores, scores)
    order = np.argsort(-contradiction, kind="stable")
    order = order[contradiction[order] > DOUBTFUL]
    kinds = [order[labels[order] == kind][:MOST_SUSPECTS] for kind in (True, False)]
    rows = np.concatenate(kinds)
    rows = rows[np.argsort(-contradiction[rows], kind="stable")]
    classes = []
    if labelled.origin is not None:
        numbers = labelled.origin.classes
        for number in np.unique(numbers).tolist():
            here = numbers == number
            mean = float(scores[here].mean())
            classes.append(
                LabelledClass(number, int(here.sum()), bool(labels[here].mean() > 0.5), mean)
            )
    return Suspects(rows, tuple(classes))

"""How a network is trained on labels of a user, and when what it was before is kept instead.

Measured on three simulated sets and a real one, with 300 and 1,764 labels, a tenth of them wrong,
by true AUC on other micrographs: the forgiving loss is better than cross entropy by 0.004 and 0.003
in the mean. With it a gentler recipe (12 epochs at a third of the rate) is worse by 0.002 and
0.003, so there is no choice of recipes any more. Four fifths of the way from the start are better
than its end by 0.003 and 0.001 (by cross entropy); halfway is worse, but kept a project of three
micrographs whose labels contradict the start from ending far below it. What did not pay is in
benchmarks/results/fine_tuning.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.options import TrainOptions

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Numbers = NDArray[np.int64]

BUDGET_STEPS, BUDGET_LABELS = 400, 2500
"""Steps at most, up to so many labels; with more they rise as the square root."""
FEW_MICROGRAPHS = 6
FOUR_FIFTHS, HALFWAY = 0.8, 0.5
RESAMPLES, TIE = 60, 0.5
"""Resamples of micrographs, and what is a tie (in standard errors)."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the weights of the last step are kept.

    Attributes
    ----------
    name
        In the log, and in the name of the checkpoint.
    epochs, capped
        Looks at each image, and whether a budget of steps limits them.
    learning_rate
        At the start; it falls to a twentieth along half a cosine.
    batch_size, noise_share
        Images a step; bad images of white and of phase-randomised noise, each / images of a step.
    frozen
        Whether batch norms keep their statistics.
    way
        Where between the weights of the start (0) and of the last step (1) those that are kept
        lie (M. Wortsman et al., CVPR 2022).
    forgiveness
        Power of the loss of labelled images, see `fitting.forgiving_losses`; that of pure noise,
        which is surely bad, is cross entropy, as at 0.
    augmentation
        Whether each image is shown in another of its eight flips and rotations each time.
    """

    name: str
    epochs: int
    learning_rate: float
    batch_size: int = 32
    capped: bool = True
    noise_share: float = 0.05
    frozen: bool = True
    way: float = 1.0
    forgiveness: float = 0.7
    augmentation: bool = True

    def steps(self, n: int) -> int:
        """Return how many steps a training on n images takes."""
        if not self.capped:
            return self.epochs * math.ceil(n / self.batch_size)
        most = BUDGET_STEPS * math.sqrt(max(1.0, n / BUDGET_LABELS))
        return min(math.ceil(self.epochs * n / self.batch_size), round(most))

    def describe(self) -> str:
        """Return the recipe in words, for the log."""
        where = "" if self.way == 1 else f", then {100 * self.way:.0f} % of the way from the start"
        return (
            f"{self.name} ({self.epochs} epochs{', at most a budget of steps' * self.capped}, rate "
            f"{self.learning_rate:g}{where})"
        )


USUAL = Recipe("usual", epochs=20, learning_rate=3e-3, way=FOUR_FIFTHS)
SCRATCH = Recipe(
    "scratch", epochs=30, learning_rate=1e-3, batch_size=64, capped=False, noise_share=0.0,
    frozen=False, forgiveness=0.0,
)  # fmt: skip


def recipe_for(options: TrainOptions, n_micrographs: int, start_auc: float | None) -> Recipe:
    """Return how to train.

    `start_auc` is of the untrained network's scores against the labels, None for a new network;
    where it is below 0.5, or labels are of few micrographs, only halfway is near enough to the
    start. What the options say of epochs, rate or batch size replaces what the recipe says.
    """
    recipe = SCRATCH if start_auc is None else USUAL
    asked = options.epochs is not None or options.learning_rate is not None
    if asked:
        recipe = replace(recipe, name="as_asked", way=1.0)
    if start_auc is not None and (n_micrographs < FEW_MICROGRAPHS or start_auc < 0.5):
        recipe = replace(recipe, way=HALFWAY)
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs, capped=False)
    if options.learning_rate is not None:
        recipe = replace(recipe, learning_rate=options.learning_rate)
    if options.batch_size is not None:
        recipe = replace(recipe, batch_size=options.batch_size)
    return replace(recipe, augmentation=options.augmentation)


def fold_auc(
    scores: Floats, labels: Bools, fold_of: Numbers, weights: Floats | None = None
) -> float:
    """Return the mean AUC within folds, by their sizes; folds without both kinds don't count.

    Of (n,) scores, labels, folds and weights. By hand, because a bootstrap with scikit-learn's AUC
    takes minutes for 100,000 labels; scores that tie count as one order or the other.
    """
    each = np.ones(len(scores)) if weights is None else weights
    aucs, sizes = [], []
    for fold in np.unique(fold_of):
        rows = np.flatnonzero(fold_of == fold)
        rows = rows[np.argsort(scores[rows], kind="stable")]
        good, bad = each[rows] * labels[rows], each[rows] * ~labels[rows]
        pairs = good.sum() * bad.sum()
        if pairs:
            aucs.append(float((good * np.cumsum(bad)).sum() / pairs))
            sizes.append(len(rows))
    return float(np.average(aucs, weights=sizes)) if aucs else float("nan")


def clearly_better(
    scores: Floats, others: Floats, labels: Bools, fold_of: Numbers, clusters: Numbers, seed: int
) -> bool:
    """Return whether scores (n,) sort the labels better than others do, within folds.

    By more than half a standard error of the difference, from a bootstrap of whole micrographs,
    or of particles where there is one micrograph.
    """

    def difference(weights: Floats | None = None) -> float:
        aucs = [fold_auc(values, labels, fold_of, weights) for values in (scores, others)]
        return aucs[0] - aucs[1]

    groups = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    if not groups.any():
        groups = np.arange(len(groups))
    rng, n_groups = np.random.default_rng(seed), int(groups.max()) + 1
    drawn = [
        np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)[groups]
        for _ in range(RESAMPLES)
    ]
    error = float(np.nanstd([difference(times.astype(np.float64)) for times in drawn]))
    return difference() > TIE * error

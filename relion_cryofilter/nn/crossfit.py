"""Cross-fitting: every labelled particle scored by a model that has not seen its micrograph."""

from __future__ import annotations

import contextvars
import copy
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from relion_cryofilter.errors import Aborted
from relion_cryofilter.files import CHECKPOINTS, claim
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.nn.fitting import NOISE_POOL, Fit, FitData
from relion_cryofilter.nn.networks import Network, choose_devices
from relion_cryofilter.nn.recipes import COMPARED_FOLDS, Recipe, candidates, choose, fold_auc
from relion_cryofilter.nn.task import NOISE_SEED, Task
from relion_cryofilter.nn.trainer import Epoch, predict, refuse_diverged
from relion_cryofilter.particles.splits import Folds, short_hash
from relion_cryofilter.progress import Progress, counted

Floats = NDArray[np.float64]

EVERYTHING = -1
"""In place of a fold's number: the training on all labels."""

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class CrossFit:
    """A network that was trained on all labels, and what its like say of particles unseen.

    Attributes
    ----------
    network
        Its logits are for as many good as bad particles.
    logits
        (m,) of the folds' rows, each by a network that was trained on the other folds.
    recipe
        How all were trained; None if the untrained network did better and is kept.
    history
        Of the training on all labels.
    auc, start_auc
        Out of fold, and of the untrained network, within folds, against the labels; nan for a new
        network.
    """

    network: Network
    logits: Floats
    recipe: Recipe | None
    history: Sequence[Epoch]
    auc: float
    start_auc: float


def images_to_show(task: Task, folds: Folds) -> int:
    """Return how many images the trainings of one `cross_fit` look at, at most, for progress."""
    n_clusters, known = len(np.unique(folds.clusters[folds.rows])), bool(task.start.origin)
    found = candidates(task.options, len(folds.rows), n_clusters, 1.0 if known else None)
    looks = 0
    for number, recipe in enumerate(found):
        sizes = [len(folds.rows) - len(held) for held in folds.held]
        sizes = sizes[:COMPARED_FOLDS] if number else [*sizes, len(folds.rows)]
        looks += sum(recipe.steps(size) * recipe.batch_size for size in sizes)
    return looks


def cross_fit(
    task: Task,
    folds: Folds,
    progress: Progress,
    number: int = 1,
    after_round: Callable[[Sequence[Epoch]], None] = lambda history: None,
) -> CrossFit:
    """Choose a recipe, and train by it on all folds but one, each in turn, and on all labels.

    `number` is of the model in its ensemble, from 1. If the scores of the untrained network sort
    the labels better than the trained ones do out of fold, that network is what is returned.
    """
    options, labels, start = task.options, task.labelled.labels[folds.rows], task.start
    rows, fold_of, clusters = folds.rows, folds.fold_of, folds.clusters[folds.rows]
    work = _Work(task, folds, progress, options.seed + number - 1, after_round)

    # What is known already, and the recipes to compare.
    untrained, name = start.untrained
    start_logits, start_auc = np.zeros(len(rows)), float("nan")
    if start.origin:
        found = predict(untrained.eval(), task.loaded.images, rows)
        start_logits = found.numpy().astype(np.float64)
        start_auc = fold_auc(start_logits, labels, fold_of)
        log.info("Before any training: AUC %.4f within folds, against the labels.", start_auc)
        if start_auc < 0.5:
            log.warning(
                "The labels contradict %s: it ranks the bad ones above the good ones (AUC %.2f). "
                "Look at some of both (suspicious_labels.star); if they are as you mean them, go "
                "on. The model is kept halfway between its start and what the labels teach.",
                name, start_auc,
            )  # fmt: skip
    n_clusters = len(np.unique(clusters))
    recipes = candidates(options, len(rows), n_clusters, start_auc if start.origin else None)
    recipe = recipes[0]
    if len(recipes) > 1:
        some = range(min(COMPARED_FOLDS, len(folds.held)))
        work.do([(each, fold) for each in recipes for fold in some])
        held = np.isin(fold_of, list(some))
        each = [work.logits(one, some)[held] for one in recipes]
        best, aucs = choose(each, labels[held], fold_of[held], clusters[held], options.seed)
        recipe = recipes[best]
        said = ", ".join(f"{one.name} {auc:.4f}" for one, auc in zip(recipes, aucs))
        log.info(
            "AUC on %s by the others: %s. Ties go to the gentler: %s.",
            counted(len(some), "fold"), said, recipe.name,
        )  # fmt: skip
    else:
        log.info("Recipe: %s.", recipe.describe())

    # Its other folds and the training on everything.
    work.do([(recipe, fold) for fold in (EVERYTHING, *range(len(folds.held)))])
    logits = work.logits(recipe, range(len(folds.held)))
    network, history = work.trained
    auc = fold_auc(logits, labels, fold_of)
    if start.origin and not auc > start_auc:
        log.warning(
            "No recipe did better out of fold (AUC %.4f) than %s did before (AUC %.4f), so its "
            "weights are kept; only the calibration and the threshold are new.",
            auc, name, start_auc,
        )  # fmt: skip
        kept = copy.deepcopy(untrained)
        return CrossFit(kept, start_logits, None, history, start_auc, start_auc)
    return CrossFit(network, logits, recipe, history, auc, start_auc)


class _Work:
    """The trainings of one `cross_fit`: each is done once, some side by side."""

    def __init__(
        self,
        task: Task,
        folds: Folds,
        progress: Progress,
        seed: int,
        after_round: Callable[[Sequence[Epoch]], None],
    ) -> None:
        self.task, self.folds, self.progress = task, folds, progress
        self.seed, self.after_round = seed, after_round
        white = None
        if task.start.origin:
            white = task.white_noise(folds.rows, NOISE_POOL, task.options.seed + NOISE_SEED)
        device = choose_devices(gpu_numbers(task.options.gpu))[0]
        self.data = FitData(task.loaded.images, task.labelled.labels, white, device)
        self.identity = task.identity(list(folds.parts.values()))
        self.held: dict[tuple[str, int], Floats] = {}
        self.trained: tuple[Network, list[Epoch]]
        self.stopped = threading.Event()
        claim(task.folder / CHECKPOINTS, known=True)

    def logits(self, recipe: Recipe, some: Sequence[int]) -> Floats:
        """Return the logits (m,) of the held rows of some folds; nan elsewhere."""
        found = np.full(len(self.folds.rows), np.nan)
        for fold in some:
            found[np.searchsorted(self.folds.rows, self.folds.held[fold])] = self.held[
                recipe.name, fold
            ]
        return found

    def do(self, jobs: Sequence[tuple[Recipe, int]]) -> None:
        """Train by a recipe on all folds but one, for each such pair that is not done yet.

        One thread each, unless there are more threads than trainings; on a GPU one by one.
        """
        jobs = [job for job in jobs if (job[0].name, job[1]) not in self.held]
        threads = self.task.options.threads
        at_once = max(1, min(threads, len(jobs))) if self.data.device.type == "cpu" else 1
        torch.set_num_threads(max(1, threads // at_once))
        try:
            with ThreadPoolExecutor(at_once) as pool:
                tasks = [
                    pool.submit(contextvars.copy_context().run, partial(self._one, *job))
                    for job in jobs
                ]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:
                    self.stopped.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)

    def _one(self, recipe: Recipe, fold: int) -> None:
        """Do one training, and score what it has not seen."""
        folds, everything = self.folds, fold == EVERYTHING
        rows = folds.rows if everything else folds.others(fold)
        plain = replace(recipe, way=1.0)
        name = f"{recipe.name}_{'all' if everything else f'fold{fold + 1}'}_{self.seed}.pt"
        fit = Fit(
            self.task.start.network,
            self.data,
            rows,
            recipe,
            self.seed * 100 + fold + 1,
            self.task.folder / CHECKPOINTS / name,
            {
                **self.identity,
                "recipe": asdict(plain),
                "seed": self.seed,
                "trained": short_hash(str(rows.tolist())),
            },
        )
        network, history = fit.run(self._step, self.after_round if everything else _nothing)
        if everything:
            self.trained = network, history
            self.held[recipe.name, fold] = np.empty(0)
            return
        held = folds.held[fold]
        predicted = predict(network, self.task.loaded.images, held)
        refuse_diverged(predicted, recipe.learning_rate)
        logits = predicted.numpy().astype(np.float64)
        self.held[recipe.name, fold] = logits
        labels = self.task.labelled.labels[held]
        log.info(
            "Fold %d of %d, %s: %s, AUC %.4f on %s.",
            fold + 1, len(folds.held), recipe.name, counted(fit.steps, "step"),
            fold_auc(logits, labels, np.zeros(len(held), np.int64)),
            counted(len(held), "other particle"),
        )  # fmt: skip

    def _step(self, count: int) -> None:
        if self.stopped.is_set():
            raise Aborted("Another training was stopped.")
        self.progress.step(count)


def _nothing(history: Sequence[Epoch]) -> None:
    """Do nothing after a round."""

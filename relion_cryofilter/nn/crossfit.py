"""Cross-fitting: every labelled particle scored by a model that has not seen its micrograph."""

from __future__ import annotations

import contextvars
import copy
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from relion_cryofilter.errors import Aborted
from relion_cryofilter.files import CHECKPOINTS, claim
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.nn.fitting import NOISE_POOL, Fit, FitData
from relion_cryofilter.nn.networks import Network, choose_devices
from relion_cryofilter.nn.recipes import Recipe, clearly_better, fold_auc, recipe_for
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
    recipe = recipe_for(task.options, n_clusters, 1.0 if known else None)
    sizes = [len(folds.rows), *(len(folds.rows) - len(held) for held in folds.held)]
    return sum(recipe.steps(size) * recipe.batch_size for size in sizes)


def cross_fit(
    task: Task,
    folds: Folds,
    progress: Progress,
    number: int = 1,
    after_round: Callable[[Sequence[Epoch]], None] = lambda history: None,
) -> CrossFit:
    """Train on all folds but one, each in turn, and on all labels.

    `number` is of the model in its ensemble, from 1. If the scores of the untrained network sort
    the labels clearly better than the trained ones do out of fold, that network is returned.
    """
    options, labels, start = task.options, task.labelled.labels[folds.rows], task.start
    rows, fold_of, clusters = folds.rows, folds.fold_of, folds.clusters[folds.rows]

    # What is known already, and how to train.
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
    known = start_auc if start.origin else None
    recipe = recipe_for(options, len(np.unique(clusters)), known)
    log.info("Recipe: %s.", recipe.describe())

    # Train.
    work = _Work(task, folds, recipe, progress, options.seed + number - 1, after_round)
    network, history, logits = work.do()
    auc = fold_auc(logits, labels, fold_of)
    if start.origin and clearly_better(
        start_logits, logits, labels, fold_of, clusters, options.seed
    ):
        log.warning(
            "Out of fold the training did worse (AUC %.4f) than %s did before (AUC %.4f), so its "
            "weights are kept; only the calibration and the threshold are new.",
            auc, name, start_auc,
        )  # fmt: skip
        kept = copy.deepcopy(untrained)
        return CrossFit(kept, start_logits, None, history, start_auc, start_auc)
    return CrossFit(network, logits, recipe, history, auc, start_auc)


class _Work:
    """The trainings of one `cross_fit`, some side by side."""

    def __init__(
        self,
        task: Task,
        folds: Folds,
        recipe: Recipe,
        progress: Progress,
        seed: int,
        after_round: Callable[[Sequence[Epoch]], None],
    ) -> None:
        self.task, self.folds, self.recipe, self.progress = task, folds, recipe, progress
        self.seed, self.after_round = seed, after_round
        white = None
        if task.start.origin:
            white = task.white_noise(folds.rows, NOISE_POOL, task.options.seed + NOISE_SEED)
        device = choose_devices(gpu_numbers(task.options.gpu))[0]
        self.data = FitData(task.loaded.images, task.labelled.labels, white, device)
        self.identity = task.identity(list(folds.parts.values()))
        self.stopped = threading.Event()
        claim(task.folder / CHECKPOINTS, known=True)

    def do(self) -> tuple[Network, Sequence[Epoch], Floats]:
        """Return what is trained on all, its history, and the logits (m,) by the others.

        One thread each, unless there are more threads than trainings; on a GPU one by one.
        """
        folds, threads = range(len(self.folds.held)), self.task.options.threads
        one_by_one = self.data.device.type != "cpu"
        at_once = 1 if one_by_one else max(1, min(threads, 1 + len(folds)))
        torch.set_num_threads(max(1, threads // at_once))
        try:
            with ThreadPoolExecutor(at_once) as pool:

                def submitted(work: Callable[[int], Any], fold: int) -> Future[Any]:
                    return pool.submit(contextvars.copy_context().run, partial(work, fold))

                of_all = submitted(self._fit, EVERYTHING)
                of_folds = [submitted(self._held_out, fold) for fold in folds]
                try:
                    for future in as_completed([of_all, *of_folds]):
                        future.result()  # raises the first fault as soon as there is one
                except BaseException:
                    self.stopped.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)
        logits = np.full(len(self.folds.rows), np.nan)
        for held, future in zip(self.folds.held, of_folds):
            logits[np.searchsorted(self.folds.rows, held)] = future.result()
        return *of_all.result(), logits

    def _fit(self, fold: int) -> tuple[Network, Sequence[Epoch]]:
        """Train on all folds but one, or on `EVERYTHING`."""
        everything = fold == EVERYTHING
        rows = self.folds.rows if everything else self.folds.others(fold)
        name = f"{self.recipe.name}_{'all' if everything else f'fold{fold + 1}'}_{self.seed}.pt"
        fit = Fit(
            self.task.start.network,
            self.data,
            rows,
            self.recipe,
            self.seed * 100 + fold + 1,
            self.task.folder / CHECKPOINTS / name,
            {
                **self.identity,
                "recipe": asdict(replace(self.recipe, way=1.0)),
                "seed": self.seed,
                "trained": short_hash(str(rows.tolist())),
            },
        )
        after = self.after_round if everything else _nothing
        return fit.run(self._step, after, self.progress.skip)

    def _held_out(self, fold: int) -> Floats:
        """Train on all folds but one, and return the logits of that one."""
        network, _ = self._fit(fold)
        held = self.folds.held[fold]
        predicted = predict(network, self.task.loaded.images, held)
        refuse_diverged(predicted, self.recipe.learning_rate)
        logits = predicted.numpy().astype(np.float64)
        labels = self.task.labelled.labels[held]
        log.info(
            "Fold %d of %d: AUC %.4f on %s.",
            fold + 1, len(self.folds.held),
            fold_auc(logits, labels, np.zeros(len(held), np.int64)),
            counted(len(held), "other particle"),
        )  # fmt: skip
        return logits

    def _step(self, count: int) -> None:
        if self.stopped.is_set():
            raise Aborted("Another training was stopped.")
        self.progress.step(count)


def _nothing(history: Sequence[Epoch]) -> None:
    """Do nothing after a round."""

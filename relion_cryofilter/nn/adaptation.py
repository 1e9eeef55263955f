"""A model for the set at hand, without labels: the bundled one, taught by its own surest scores.

What the bundled model is surest of, of both kinds, are labels good enough to learn from: the start
is trained on them by the usual recipe, whose loss forgives wrong ones (pseudo-labels: D.-H. Lee,
ICML workshop 2013). What it gains is in benchmarks/results/zero_shot.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from relion_cryofilter.images.small_images import load_small_images
from relion_cryofilter.kinds import ThresholdRequest, gpu_numbers
from relion_cryofilter.nn.fitting import MOST_SPECTRA, NOISE_POOL, Fit, FitData
from relion_cryofilter.nn.model import Model, Models
from relion_cryofilter.nn.networks import choose_devices
from relion_cryofilter.nn.recipes import USUAL
from relion_cryofilter.nn.selftests import pure_noise
from relion_cryofilter.nn.task import NOISE_SEED, Task, start_of
from relion_cryofilter.nn.trainer import predict, refuse_diverged
from relion_cryofilter.options import ScoreOptions, TrainOptions
from relion_cryofilter.particles.labels import LabelledSet
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.progress import Progress, counted

SAMPLE, FEWEST = 5000, 100
"""Particles to adapt to, at most and at least."""
SUREST_GOOD, SUREST_BAD = 0.3, 0.6
"""The share of what looks good, and bad, that is sure enough. Where good ones are rare, junk looks
good, and a half of them would teach it."""
LEAST_SHARE = 0.1
"""Of each kind, whatever the scores say."""
ADAPTED = "adapted_to"
"""Key of the provenance: the particles, and the model that taught."""
ABOUT = ("source", "fine_tuned_from", "pixel_sizes_angstrom", "boxes_px", "versions")
"""What else the provenance holds; labels of people were not seen."""

log = logging.getLogger("relion_cryofilter")


def adapted(
    particles: ParticleSet,
    bundled: Models,
    options: ScoreOptions,
    folder: Path,
    abort_requested: Callable[[], bool] = lambda: False,
) -> Model | None:
    """Return a model adapted to particles (n), or None if too few of them can be used.

    Images that are bad are left out; whether they are an error is for the scoring to say. The
    threshold is 0.5, where an image is as likely to be taught as good and as bad. `folder`
    holds the checkpoint until then, from which an adaptation that was stopped is resumed.

    Raises
    ------
    Aborted
        `abort_requested` said True.
    """
    # A sample, and what the bundled model says of it.
    rng = np.random.default_rng(0)
    sample = np.sort(rng.permutation(len(particles))[:SAMPLE])
    some = particles.take(sample)
    training = TrainOptions(j=options.threads, gpu=options.gpu)
    labelled = LabelledSet(some, np.zeros(len(some), bool))
    start = start_of(training, labelled)
    loaded = load_small_images(
        some, start.preprocess, Progress(len(some), "images read to adapt to", abort_requested),
        threads=options.threads, max_memory_bytes=training.max_memory * 1e9,
    )  # fmt: skip
    rows = np.setdiff1d(np.arange(len(some)), loaded.bad.rows)
    if len(rows) < FEWEST:
        log.warning(
            "--adapt needs %d particles or more, and found %d that can be used; the bundled model "
            "scores as it is.", FEWEST, len(rows),
        )  # fmt: skip
        return None
    (teacher,) = bundled
    scores = teacher.probabilities(loaded.images.get(rows)).numpy()
    sure, good = surest(scores, teacher.curve.threshold(ThresholdRequest.parse("balanced")))

    # A training on those that it is sure of.
    labels = np.zeros(len(some), bool)
    labels[rows[sure]] = good
    task = Task(training, LabelledSet(some, labels), loaded, start, folder)
    rows = rows[sure]
    white = task.white_noise(rows, NOISE_POOL, NOISE_SEED)
    fit = Fit(
        start.network,
        FitData(loaded.images, labels, white, choose_devices(gpu_numbers(options.gpu))[0]),
        rows,
        USUAL,
        training.seed,
        folder / "adapted_all_0.pt",
        {**task.identity([rows]), "recipe": asdict(USUAL), "taught_by": teacher.hash},
    )
    log.info(
        "Adapting to %s: the surest %s (%d %% taken as good) teach the bundled start.",
        counted(len(some), "particle"), f"{len(rows):,}", round(100 * good.mean()),
    )  # fmt: skip
    progress = Progress(fit.steps * USUAL.batch_size, "image steps", abort_requested)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums don't depend on how many there are
    try:
        network, _ = fit.run(progress.step)
    finally:
        torch.set_num_threads(before)
    fit.checkpoint.unlink()
    refuse_diverged(predict(network, loaded.images, rows), USUAL.learning_rate)
    about = task.provenance(rows)
    provenance = {key: about[key] for key in ABOUT} | {ADAPTED: _key(particles, bundled)}
    model = Model(network, start.preprocess, 0.5, provenance=provenance)
    shares = [
        f"{(model.probabilities(noise) >= model.threshold).float().mean():.1%} of {kind}"
        for kind, noise in pure_noise(task, loaded.images.get(rows[:MOST_SPECTRA]), rows).items()
    ]
    log.info(
        "The adapted model would accept %s. It has seen no label: look at both subsets before you "
        "discard anything.", " and ".join(shares),
    )  # fmt: skip
    return model


def surest(scores: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the places (m,) of the surest of both kinds, ascending, and which are good (m,).

    A score (n,) of the threshold or more looks good; of each kind its outermost share is sure.
    """
    share = float(np.clip((scores >= threshold).mean(), LEAST_SHARE, 1 - LEAST_SHARE))
    order = np.argsort(scores, kind="stable")
    n_bad = max(1, round(SUREST_BAD * (1 - share) * len(scores)))
    n_good = max(1, round(SUREST_GOOD * share * len(scores)))
    good = np.zeros(len(scores), bool)
    good[order[-n_good:]] = True
    sure = np.sort(np.concatenate([order[:n_bad], order[-n_good:]]))
    return sure, good[sure]


def is_adapted(model: Model, particles: ParticleSet, bundled: Models) -> bool:
    """Return whether a model was adapted to these particles, of which there may be more by now."""
    return model.provenance.get(ADAPTED) == _key(particles, bundled)


def _key(particles: ParticleSet, bundled: Models) -> Mapping[str, str]:
    return {"particles": particles.source, "by": bundled.hashes}

"""A model for the set at hand, without labels: the bundled one, taught by its own surest scores.

What the bundled model is surest of, of both kinds, are labels good enough to learn from: the start
is trained on them by the usual recipe, whose loss forgives wrong ones (pseudo-labels: D.-H. Lee,
ICML workshop 2013). What it gains is in benchmarks/results/zero_shot.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from relion_cryofilter.errors import ModelError
from relion_cryofilter.files import ADAPTING, remove
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.images.small_images import load_small_images
from relion_cryofilter.inputs import watching
from relion_cryofilter.kinds import ThresholdRequest, gpu_numbers
from relion_cryofilter.nn.fitting import MOST_SPECTRA, NOISE_POOL, Fit, FitData
from relion_cryofilter.nn.model import ADAPTED, NOISE_ACCEPTED, Model, Models, load_model
from relion_cryofilter.nn.networks import choose_devices
from relion_cryofilter.nn.recipes import USUAL
from relion_cryofilter.nn.selftests import NOISE_SHARE, pure_noise
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
ABOUT = ("source", "fine_tuned_from", "pixel_sizes_angstrom", "boxes_px", "versions")
"""What else the provenance holds; labels of people were not seen."""
NUMBER = "number"
"""Key of how many particles there were."""

log = logging.getLogger("relion_cryofilter")


def adapt(
    particles: ParticleSet,
    bundled: Models,
    options: ScoreOptions,
    path: Path,
    abort_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Leave a model at `path` that is adapted to particles (n), or none if too few can be used.

    One that is there stays if it was adapted to these particles, of which there may be more by
    now; while it has seen few, not twice as many. Images that are bad are left out; whether they
    are an error is for the scoring to say, but of missing ones, which are known beforehand. Beside
    `path` is the checkpoint from which an adaptation that was stopped is resumed.

    Raises
    ------
    Aborted
        `abort_requested` said True; what was at `path` is still there.
    ImageError
        Images are missing, without ``--skip_bad``.
    """
    if not options.rescore and _fits(path, particles, bundled):
        log.info("%s was adapted by an earlier run (--rescore adapts anew).", path)
        return
    if not options.skip_bad:
        check_stacks(particles)[1].refuse(options.skipping)
    checkpoint = path.with_name(ADAPTING)
    task = _sample(particles, options, path.parent, abort_requested)
    if task is None:
        log.warning(
            "--adapt needs %d particles or more that can be used, and found fewer; the bundled "
            "model scores as it is.", FEWEST,
        )  # fmt: skip
        remove(path)
    else:
        model = _taught(task, bundled, checkpoint, abort_requested)
        to = {**_key(particles, bundled), NUMBER: len(particles)}
        replace(model, provenance={**model.provenance, ADAPTED: to}).save(path)
    remove(checkpoint)


def _fits(path: Path, particles: ParticleSet, bundled: Models) -> bool:
    """Return whether the model at `path` was adapted to these particles."""
    if not path.exists():
        return False
    try:
        with watching():  # it may be replaced, unlike the inputs of this run
            known = dict(load_model(path).provenance.get(ADAPTED, {}))
    except ModelError as error:
        log.warning("%s\nSo the bundled model is adapted anew.", error)
        return False
    before = known.pop(NUMBER, 0)
    if known != _key(particles, bundled):
        return False
    if before < SAMPLE and len(particles) >= 2 * before:
        log.info("Adapting anew: %s was adapted to %s only.", path, counted(before, "particle"))
        return False
    return True


def _key(particles: ParticleSet, bundled: Models) -> Mapping[str, object]:
    sizes = sorted({round(group.pixel_size_angstrom or 0, 4) for group in particles.optics_used})
    return {"particles": particles.source, "by": bundled.hashes, "pixel_sizes_angstrom": sizes}


def _sample(
    particles: ParticleSet,
    options: ScoreOptions,
    folder: Path,
    abort_requested: Callable[[], bool],
) -> Task | None:
    """Return the start and the small images of a sample that has no labels yet, None if few."""
    rng = np.random.default_rng(0)
    some = particles.take(np.sort(rng.permutation(len(particles))[:SAMPLE]))
    training = TrainOptions(j=options.threads, gpu=options.gpu)
    labelled = LabelledSet(some, np.zeros(len(some), bool))
    start = start_of(training, labelled)
    loaded = load_small_images(
        some, start.preprocess, Progress(len(some), "images read to adapt to", abort_requested),
        threads=options.threads, max_memory_bytes=training.max_memory * 1e9,
    )  # fmt: skip
    if len(some) - len(loaded.bad) < FEWEST:
        return None
    return Task(training, labelled, loaded, start, folder)


def _taught(
    task: Task, bundled: Models, checkpoint: Path, abort_requested: Callable[[], bool]
) -> Model:
    """Return the start of `task`, trained on what the bundled model is surest of in its images.

    The threshold is 0.5, where an image is as likely to be taught as good and as bad.
    """
    # What the bundled model is sure of.
    (teacher,) = bundled
    images = task.loaded.images
    rows = np.setdiff1d(np.arange(len(task.labelled)), task.loaded.bad.rows)
    scores = teacher.probabilities(images.get(rows)).numpy()
    sure, good = surest(scores, teacher.curve.threshold(ThresholdRequest.parse("balanced")))
    log.info(
        "Adapting to %s: the surest %s (%d %% taken as good) teach the bundled start.",
        counted(len(task.labelled), "particle"), f"{len(sure):,}", round(100 * good.mean()),
    )  # fmt: skip
    labels = np.zeros(len(task.labelled), bool)
    labels[rows[sure]] = good
    task = replace(task, labelled=LabelledSet(task.labelled.particles, labels))
    rows = rows[sure]

    # A training on those.
    white = task.white_noise(rows, NOISE_POOL, NOISE_SEED)
    fit = Fit(
        task.start.network,
        FitData(images, labels, white, choose_devices(gpu_numbers(task.options.gpu))[0]),
        rows,
        USUAL,
        task.options.seed,
        checkpoint,
        {
            **task.identity([rows]),
            "recipe": asdict(USUAL),
            "taught_by": teacher.hash,
        },
    )
    progress = Progress(fit.steps * USUAL.batch_size, "image steps", abort_requested)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums don't depend on how many there are
    try:
        network, _ = fit.run(progress.step, resumed=progress.skip)
    finally:
        torch.set_num_threads(before)
    refuse_diverged(predict(network, images, rows), USUAL.learning_rate)

    # What it makes of noise.
    about = task.provenance(rows)
    model = Model(
        network, task.start.preprocess, 0.5, provenance={key: about[key] for key in ABOUT}
    )
    shares = {
        kind: float((model.probabilities(noise) >= model.threshold).float().mean())
        for kind, noise in pure_noise(task, images.get(rows[:MOST_SPECTRA]), rows).items()
    }
    log.log(
        logging.WARNING if max(shares.values()) > NOISE_SHARE else logging.INFO,
        "The adapted model would accept %s. It has seen no label: look at both subsets before you "
        "discard anything.", said_of_noise(shares),
    )  # fmt: skip
    return replace(model, provenance={**model.provenance, NOISE_ACCEPTED: shares})


def said_of_noise(shares: Mapping[str, float]) -> str:
    """Return the share of each kind of noise that is accepted, in words."""
    return " and ".join(f"{share:.1%} of {kind}" for kind, share in shares.items())


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

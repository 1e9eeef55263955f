"""Model × images → scores and features, with bounded memory; results go to the input rows."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from relion_cryofilter.errors import ModelError
from relion_cryofilter.files import replacing
from relion_cryofilter.images.bad import BadImages, check_stacks, say_unsigned
from relion_cryofilter.images.batches import find_faults, map_batches
from relion_cryofilter.images.preprocess import Preprocess
from relion_cryofilter.inputs import require_unchanged
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.nn.home import HOME, SAMPLE, warn_if_far
from relion_cryofilter.nn.model import Model
from relion_cryofilter.nn.networks import CPU, choose_devices
from relion_cryofilter.nn.score_cache import ScoreCache
from relion_cryofilter.options import ModelOptions, ScoreOptions
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.processes import ALONE, Ranks
from relion_cryofilter.progress import Progress

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class Scores:
    """What scoring gives.

    Attributes
    ----------
    values
        (n,) float64 in input order, 0 to 1, higher is better; bad images score 0.
    bad
        The images that could not be scored.
    seconds
        Wall time.
    n_known
        How many were scored by an earlier run; bad images count for neither.
    sampled, features
        (s,) rows of a random sample of those that this run and process scored, ascending, and
        their (s, k) features, for the report.
    outside
        The share of particles that don't look like the training of the first model (see
        `home.Home.outside`); NaN if nothing is known of it.
    """

    values: np.ndarray
    bad: BadImages
    seconds: float = 0.0
    n_known: int = 0
    sampled: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    features: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    outside: float = float("nan")


@dataclass(frozen=True)
class How:
    """How to score: everything but what is scored and by which models."""

    threads: int = 1
    devices: Sequence[torch.device] = (CPU,)  # worker threads take them in turn
    batch_size: int | None = None  # see `map_batches`
    tta: bool = False  # average over the eight flips and rotations
    skip_bad: bool = False  # score bad images 0; otherwise they are an error
    skipping: str = ScoreOptions.skipping  # what is said then of --skip_bad
    ranks: Ranks = ALONE  # the processes that share the images; the first gets the scores of all

    @classmethod
    def asked(cls, options: ModelOptions, ranks: Ranks = ALONE) -> How:
        """Return what the options say."""
        devices = ranks.device(choose_devices(gpu_numbers(options.gpu)))
        return cls(
            options.threads, devices, options.batch_size, options.tta, options.skip_bad,
            options.skipping, ranks,
        )  # fmt: skip


def score_particles(
    particles: ParticleSet,
    models: Iterable[Model],
    progress: Progress,
    how: How = How(),
    *,
    cache: ScoreCache | None = None,
    features_path: Path | None = None,
    sample: int = 0,
) -> Scores:
    """Score every particle that is not in the cache.

    Parameters
    ----------
    particles, models
        n particles; models whose scores are averaged, each with its preprocessing.
    progress, how
        Told of every batch of this process, may raise Aborted; threads, devices and so on.
    cache
        What earlier runs found; what this one finds is added at once.
    features_path
        Where to write the features of the first model, (n, k) float32 .npy; NaN for bad images.
    sample
        Of so many particles, chosen at random, the features are kept in memory.

    Raises
    ------
    ModelError
        The model gives an image no score.
    ImageError
        Images are bad (see `images.bad`), all or without `how.skip_bad`. Missing ones are found
        before anything is scored.
    """
    # What is known already, and this process's share of the rest in the order of the disk.
    headers, bad = check_stacks(particles)
    say_unsigned(headers)
    if not how.skip_bad:
        bad.refuse(how.skipping)
    bad.refuse_if_all()
    values = np.full(len(particles), np.nan) if cache is None else cache.values.copy()
    values[bad.rows] = np.nan
    n_known = int(np.isfinite(values).sum())
    values[bad.rows] = 0
    left = np.flatnonzero(np.isnan(values))
    rows = how.ranks.share(left[np.lexsort((particles.index[left], particles.stack_of[left]))])
    progress.skip(len(particles) - len(left))
    how.ranks.wait()  # until all have read what is known

    # Batches as they come; scores go to their input rows.
    models = list(models)
    provenance = models[0].provenance
    sample = max(sample, SAMPLE if provenance.get(HOME) else 0)
    scorer = _Scorer(models, how, features_path is not None or sample > 0)
    batches = map_batches(
        scorer, particles, rows, headers, threads=how.threads, batch_size=how.batch_size,
        when_done=lambda done, result: cache.add(done, result.scores) if cache else None,
        pinned=how.devices[0].type == "cuda",
    )  # fmt: skip
    with replacing(features_path) if features_path else nullcontext() as file:
        features = _Features(rows, sample, file, len(particles))
        for batch_rows, result in batches:
            values[batch_rows] = result.scores
            features.keep(batch_rows, result.features)
            if result.faults and not len(bad) and not how.skip_bad:
                log.warning("Found images that can't be used; counting them all before stopping.")
            for reason, places in result.faults.items():
                bad.add(batch_rows[places], reason)
            progress.step(len(batch_rows))

        # What the other processes found, and the images that can't be used.
        require_unchanged()
        found = (rows, values[rows], bad.to_dict())
        for others_rows, others_values, others_bad in how.ranks.gather(found):
            values[others_rows] = others_values
            bad.update(others_bad)
        values[bad.rows] = 0
        features.close(bad.rows)
        if how.ranks.first and not np.isfinite(values).all():
            raise ModelError(
                f"The model gives no score for {int((~np.isfinite(values)).sum()):,} of "
                f"{len(values):,} images that can be used. Its weights are too large for them; "
                "train it again."
            )
        bad.refuse_if_all()
        if not how.skip_bad:
            bad.refuse(how.skipping)
    outside = warn_if_far(provenance, particles, features.rows, features.sample)
    return Scores(values, bad, progress.seconds, n_known, features.rows, features.sample, outside)


class _BatchResult(NamedTuple):
    scores: np.ndarray
    features: np.ndarray
    faults: dict[str, list[int]]


class _Scorer:
    """Scores the images of one batch, on the device of the thread that it runs in."""

    def __init__(self, models: Sequence[Model], how: How, with_features: bool) -> None:
        replicas = [
            models if device.type == "cpu" else [model.to(device) for model in models]
            for device in how.devices
        ]
        self._replicas = cycle(zip(replicas, how.devices))
        self._tta, self._with_features = how.tta, with_features
        self._own = threading.local()

    def __call__(self, images: torch.Tensor) -> _BatchResult:
        own = self._own
        if not hasattr(own, "models"):
            own.models, own.device = next(self._replicas)
            own.stream = nullcontext()
            if own.device.type == "cuda":  # a stream each, so that copies and work overlap
                own.stream = torch.cuda.stream(torch.cuda.Stream(own.device))  # type: ignore[no-untyped-call]
        models: Sequence[Model] = own.models
        small: dict[Preprocess, torch.Tensor] = {}
        faults: dict[str, list[int]] = {}
        with own.stream, torch.inference_mode():
            boxes = images.to(own.device, non_blocking=True)
            for model in models:
                if model.preprocess not in small:
                    small[model.preprocess] = model.preprocess(boxes, model.precision)
            first = small[models[0].preprocess]
            if self._with_features:
                scores, features = models[0].probabilities_and_features(first, self._tta)
            else:
                scores = models[0].probabilities(first, self._tta)
                features = scores.new_empty(len(scores), 0)
            for model in models[1:]:
                scores = scores + model.probabilities(small[model.preprocess], self._tta)
            for maps in small.values():
                for reason, places in find_faults(images, maps).items():
                    faults.setdefault(reason, []).extend(places)
            scores = scores / len(models)
            return _BatchResult(scores.cpu().numpy(), features.cpu().numpy(), faults)


class _Features:
    """Features of at most `count` random `rows`, NaN until they are seen; of all, in a file.

    features.npy is filled through a memory map, if there is a file to fill.
    """

    def __init__(self, rows: np.ndarray, count: int, file: BinaryIO | None, n_all: int) -> None:
        if len(rows) > count:
            rows = np.random.default_rng(0).choice(rows, count, replace=False, shuffle=False)
        self.rows = np.sort(rows)
        self.sample = np.empty((len(self.rows), 0), np.float32)
        self._file, self._n_all = file, n_all
        self._all: np.ndarray | None = None

    def keep(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Keep (m, k) `features` of `rows`."""
        if len(self.rows):
            if not self.sample.shape[1]:
                self.sample = np.full((len(self.rows), features.shape[1]), np.nan, np.float32)
            place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
            held = self.rows[place] == rows
            self.sample[place[held]] = features[held]
        if self._file and self._all is None:
            shape = (self._n_all, features.shape[1])
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
            self._file.flush()
            if hasattr(os, "posix_fallocate"):  # where the disk is full a memory map is a SIGBUS
                n_bytes = 4 * shape[0] * shape[1]
                os.posix_fallocate(self._file.fileno(), self._file.tell(), n_bytes)
            self._all = np.memmap(self._file, "<f4", "r+", self._file.tell(), shape)
        if self._all is not None:
            self._all[rows] = features

    def close(self, bad: np.ndarray) -> None:
        """Put NaN at the rows in `bad` and let the memory map go."""
        if self._all is not None:
            self._all[bad] = np.nan
            self._all = None

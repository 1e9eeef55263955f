"""Model × images → scores and features, with bounded memory; results go to the input rows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from relion_cryofilter.data.bad_images import BadImages, check_stacks
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.score_cache import ScoreCache
from relion_cryofilter.files import replacing
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.pipeline import find_faults, map_batches
from relion_cryofilter.nn.preprocess import Preprocess
from relion_cryofilter.nn.ranks import ALONE, Ranks
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
        How many were scored by an earlier run.
    sampled, features
        (s,) rows of a random sample of those that this run and process scored, ascending, and
        their (s, k) features, for the report.
    """

    values: np.ndarray
    bad: BadImages
    seconds: float = 0.0
    n_known: int = 0
    sampled: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    features: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))


def score_particles(
    particles: ParticleSet,
    models: Sequence[Model],
    progress: Progress,
    *,
    threads: int = 1,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    batch_size: int | None = None,
    tta: bool = False,
    features_path: Path | None = None,
    skip_bad: bool = False,
    cache: ScoreCache | None = None,
    ranks: Ranks = ALONE,
    sample: int = 0,
) -> Scores:
    """Score every particle that is not in the cache.

    Parameters
    ----------
    particles
        n particles.
    models
        Their scores are averaged; each brings its preprocessing.
    progress
        Told of every batch of this process; may raise Aborted.
    threads, batch_size
        See `pipeline.map_batches`.
    devices
        Where the networks run; worker threads are dealt out in turn.
    tta
        Average over the eight flips and rotations.
    features_path
        Where to write the features of the first model, (n, k) float32 .npy; NaN for bad images.
    skip_bad
        Score bad images 0; otherwise they are an error.
    cache
        What earlier runs found; what this one finds is added at once.
    ranks
        The processes that share out the images. Only the first gets the scores of all.
    sample
        Of so many particles, chosen at random, the features are kept in memory.

    Raises
    ------
    ImageError
        Images are missing, past the end, truncated, NaN or blank, and `skip_bad` is off. Missing
        ones are found before anything is scored.
    Aborted
        On request; at most one batch a thread later.
    """
    headers, bad = check_stacks(particles)
    if not skip_bad:
        bad.refuse()
    bad.refuse_if_all()
    values = np.full(len(particles), np.nan) if cache is None else cache.values.copy()
    values[bad.rows] = 0
    left = np.flatnonzero(np.isnan(values))
    rows = ranks.share(left[np.lexsort((particles.index[left], particles.stack_of[left]))])
    progress.skip(len(particles) - len(left))
    ranks.wait()  # until all have read what is known
    scorer = _Scorer(models, devices, tta, features_path is not None or sample > 0)
    sampled = _FeatureSample(rows, sample)
    batches = map_batches(
        scorer, particles, rows, headers, threads=threads, batch_size=batch_size,
        when_done=lambda done, result: cache.add(done, result.scores) if cache else None,
        pinned=devices[0].type == "cuda",
    )  # fmt: skip
    with _FeatureFile(features_path, len(particles)) as features:
        for batch_rows, result in batches:
            values[batch_rows] = result.scores
            features.write(batch_rows, result.features)
            sampled.keep(batch_rows, result.features)
            if result.faults and not len(bad) and not skip_bad:
                log.warning("Found images that can't be used; counting them all before stopping.")
            for reason, places in result.faults.items():
                bad.add(batch_rows[places], reason)
            progress.step(len(batch_rows))
        for others_rows, others_values, others_bad in ranks.gather(
            (rows, values[rows], bad.to_dict())
        ):
            values[others_rows] = others_values
            bad.update(others_bad)
        values[bad.rows] = 0
        features.blank(bad.rows)
        bad.refuse_if_all()
        if not skip_bad:
            bad.refuse()
    n_known = len(particles) - len(left)
    return Scores(values, bad, progress.seconds, n_known, sampled.rows, sampled.features)


@dataclass(frozen=True)
class _BatchResult:
    scores: np.ndarray
    features: np.ndarray
    faults: dict[str, list[int]]


class _Scorer:
    """Scores the images of one batch, on the device of the thread that it runs in."""

    def __init__(
        self,
        models: Sequence[Model],
        devices: Sequence[torch.device],
        tta: bool,
        with_features: bool,
    ) -> None:
        replicas = [
            models if device.type == "cpu" else [model.to(device) for model in models]
            for device in devices
        ]
        self._replicas = cycle(zip(replicas, devices))
        self._tta, self._with_features = tta, with_features
        self._own = threading.local()

    def __call__(self, images: torch.Tensor) -> _BatchResult:
        if not hasattr(self._own, "models"):
            self._own.models, self._own.device = next(self._replicas)
            self._own.stream = _own_stream(self._own.device)
        with self._own.stream:
            return self._score(images)

    def _score(self, images: torch.Tensor) -> _BatchResult:
        models: Sequence[Model] = self._own.models
        with torch.inference_mode():
            boxes = images.to(self._own.device, non_blocking=True)
            small: dict[Preprocess, torch.Tensor] = {}
            for model in models:
                if model.preprocess not in small:
                    small[model.preprocess] = model.preprocess(boxes, model.precision)
            first = small[models[0].preprocess]
            scores, features = self._first(models[0], first)
            for model in models[1:]:
                scores = scores + model.probabilities(small[model.preprocess], self._tta)
        faults: dict[str, list[int]] = {}
        for maps in small.values():
            for reason, places in find_faults(images, maps).items():
                faults.setdefault(reason, []).extend(places)
        return _BatchResult((scores / len(models)).cpu().numpy(), features.cpu().numpy(), faults)

    def _first(self, model: Model, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._with_features:
            return model.probabilities_and_features(small, self._tta)
        return model.probabilities(small, self._tta), small[:, 0, 0, :0]


def _own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a CUDA stream of the thread's own, so that copies and work of threads overlap."""
    if device.type != "cuda":
        return nullcontext()
    return cast(AbstractContextManager[Any], torch.cuda.stream(torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]


class _FeatureSample:
    """Features of a random sample of `rows`, at most `count`; NaN until they are seen."""

    def __init__(self, rows: np.ndarray, count: int) -> None:
        if len(rows) > count:
            rows = np.random.default_rng(0).choice(rows, count, replace=False, shuffle=False)
        self.rows = np.sort(rows)
        self.features = np.empty((len(self.rows), 0), np.float32)

    def keep(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Keep those of (m, k) `features` whose `rows` are in the sample."""
        if not len(self.rows):
            return
        if not self.features.shape[1]:
            self.features = np.full((len(self.rows), features.shape[1]), np.nan, np.float32)
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        held = self.rows[place] == rows
        self.features[place[held]] = features[held]


class _FeatureFile:
    """features.npy, filled through a memory map and given its name when it is complete."""

    def __init__(self, path: Path | None, n_rows: int) -> None:
        self._n_rows = n_rows
        self._replacing = replacing(path) if path else None
        self._rows: np.ndarray | None = None

    def __enter__(self) -> _FeatureFile:
        self._file = self._replacing.__enter__() if self._replacing else None
        return self

    def __exit__(self, *exc: Any) -> None:
        self._rows = None
        if self._replacing is not None:
            self._replacing.__exit__(*exc)

    def write(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Put (m, k) `features` at `rows`."""
        if self._file is None:
            return
        if self._rows is None:
            shape = (self._n_rows, features.shape[1])
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
            self._file.flush()
            self._rows = np.memmap(self._file, "<f4", "r+", self._file.tell(), shape)
        self._rows[rows] = features

    def blank(self, rows: np.ndarray) -> None:
        """Put NaN at `rows`."""
        if self._rows is not None:
            self._rows[rows] = np.nan

"""Model × images → scores and features, with bounded memory.

Worker threads each read a batch in disk order, make its small images and score them; reading,
preprocessing and inference of different batches overlap, because file reads and torch's
operations release the interpreter lock. Results go to the input rows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relion_cryofilter.data.bad_images import CONSTANT, NOT_FINITE, BadImages, check_stacks
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.stacks import BatchPlan, StackHeader, StackReader, plan_batches
from relion_cryofilter.files import replacing
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.progress import Progress

BATCH_BYTES = 32 * 2**20
LARGEST_BATCH = 512
NO_CONTRAST = "no contrast left after down-sampling"


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
    """

    values: np.ndarray
    bad: BadImages
    seconds: float


@dataclass(frozen=True)
class _BatchResult:
    rows: np.ndarray
    scores: np.ndarray
    features: np.ndarray
    faults: dict[str, list[int]]


def score_particles(
    particles: ParticleSet,
    model: Model,
    progress: Progress,
    *,
    threads: int = 1,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    batch_size: int | None = None,
    tta: bool = False,
    features_path: Path | None = None,
    skip_bad: bool = False,
) -> Scores:
    """Score every particle.

    Parameters
    ----------
    particles
        n particles.
    model
        The model; it brings its preprocessing.
    progress
        Told of every batch; may raise Aborted.
    threads
        Worker threads, each with one torch thread.
    devices
        Where the networks run; batches are dealt out in turn.
    batch_size
        Images a batch; by default what fits into 32 MiB, at most 512.
    tta
        Average over the eight flips and rotations.
    features_path
        Where to write the features, (n, k) float32 .npy; NaN for bad images.
    skip_bad
        Score bad images 0; otherwise they are an error.

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
    values = np.zeros(len(particles))
    rows = np.setdiff1d(np.arange(len(particles)), bad.rows, assume_unique=True)
    size = batch_size or _fitting_batch(headers)
    plans = plan_batches(rows, particles.stack_of, particles.index, headers, size)
    worker = _Worker(model, devices, tta, features_path is not None)
    with _FeatureFile(features_path, len(particles)) as features, _one_torch_thread():
        for result in _in_flight(worker, plans, threads):
            values[result.rows] = result.scores
            features.write(result.rows, result.features)
            for reason, places in result.faults.items():
                bad.add(result.rows[places], reason)
            progress.step(len(result.rows))
        values[bad.rows] = 0
        features.blank(bad.rows)
        if not skip_bad:
            bad.refuse()
    return Scores(values, bad, progress.seconds)


def _fitting_batch(headers: Iterable[StackHeader | None]) -> int:
    largest = max((header.image_bytes for header in headers if header), default=1)
    return max(1, min(LARGEST_BATCH, BATCH_BYTES // largest))


class _Worker:
    """Scores one batch; every thread keeps its own reading buffer."""

    def __init__(
        self, model: Model, devices: Sequence[torch.device], tta: bool, with_features: bool
    ) -> None:
        replicas = [model if device.type == "cpu" else model.to(device) for device in devices]
        self._replicas = cycle(zip(replicas, devices))
        self._tta, self._with_features = tta, with_features
        self._own = threading.local()

    def __call__(self, plan: BatchPlan) -> _BatchResult:
        if not hasattr(self._own, "reader"):
            self._own.reader = StackReader()
            self._own.model, self._own.device = next(self._replicas)
        model, device = self._own.model, self._own.device
        images = torch.from_numpy(self._own.reader.read(plan))
        with torch.inference_mode():
            small = model.preprocess(images.to(device).float())
            faults = _faults(images, small)
            if self._with_features:
                scores, features = model.probabilities_and_features(small, self._tta)
            else:
                scores, features = model.probabilities(small, self._tta), small[:, 0, 0, :0]
        return _BatchResult(plan.rows, scores.cpu().numpy(), features.cpu().numpy(), faults)


def _faults(images: torch.Tensor, small: torch.Tensor) -> dict[str, list[int]]:
    """Find the images that can't be scored: their small images are NaN (see `preprocess`)."""
    faults: dict[str, list[int]] = {}
    blank = torch.isnan(small[:, 0, 0, 0]).nonzero().flatten().tolist()
    for place in blank:
        image = images[place].float()
        if not torch.isfinite(image).all():
            reason = NOT_FINITE
        else:
            reason = CONSTANT if image.min() == image.max() else NO_CONTRAST
        faults.setdefault(reason, []).append(place)
    return faults


def _in_flight(worker: _Worker, plans: Iterator[BatchPlan], threads: int) -> Iterator[_BatchResult]:
    """Run `worker` over `plans` in `threads`, at most two batches a thread under way."""
    waiting: deque[Future[_BatchResult]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="score") as pool:
        try:
            for plan in plans:
                waiting.append(pool.submit(worker, plan))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Give each worker thread one core: two of those beat one worker with two (measured)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

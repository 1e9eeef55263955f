"""The self-tests of a training, put to its data and its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from relion_cryofilter.data.labelled import LabelledSet, Split
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.small_images import Loaded, noise_images
from relion_cryofilter.results.selftests import (
    SelfTest,
    copies_test,
    evidence_test,
    leak_tests,
    noise_test,
    permutation_test,
    split_test,
)

N_NOISE = 1000
THUMBNAIL_PX = 12
MOST_PROBED = 8000

log = logging.getLogger("relion_cryofilter")


def log_self_tests(tests: Sequence[SelfTest]) -> None:
    """Log what was found; what did not pass is a warning, said even with --quiet."""
    log.info("Self-tests:")
    for test in tests:
        if test.passed:
            log.info("  pass: %s: %s", test.name, test.finding)
        else:
            log.warning("self-test %s: %s", test.name, test.finding)


def run_self_tests(
    models: Sequence[Model],
    threshold: float,
    loaded: Loaded,
    labelled: LabelledSet,
    split: Split,
    seed: int,
) -> list[SelfTest]:
    """Ask all self-tests of a training; see `results.selftests`.

    `models` of one preprocessing score as their mean, against `threshold`.
    """
    particles, labels = labelled.particles, labelled.labels
    sizes = np.array([group.pixel_size_angstrom or 0.0 for group in particles.optics])
    statistics = {
        **loaded.statistics,
        "box size": loaded.boxes_px.astype(np.float64),
        "pixel size": sizes[particles.optics_of],
    }
    used = np.sort(np.concatenate(list(split.parts.values())))
    identity = _equal_images(loaded.statistics)
    some = np.sort(np.random.default_rng(seed).permutation(used)[:MOST_PROBED])
    small = loaded.images.get(some)
    thumbs = torch.nn.functional.adaptive_avg_pool2d(small[:, :1], THUMBNAIL_PX).flatten(1)
    train, test = (np.flatnonzero(np.isin(some, rows)) for rows in (split.train, split.test))
    box = int(np.median(loaded.boxes_px[used]))
    noise = models[0].preprocess(noise_images(box, N_NOISE, seed))
    noise_scores = np.mean([model.probabilities(noise).numpy() for model in models], axis=0)
    others = np.concatenate([split.validation, split.test])
    return [
        *leak_tests(
            {name: values[used] for name, values in statistics.items()},
            labels[used],
            particles.stack_of[used],
        ),
        copies_test(identity, split.train, others),
        permutation_test(thumbs.numpy(), labels[some], identity[some], train, test, seed),
        noise_test(noise_scores, threshold),
        split_test(split.parts, split.clusters, split.cluster_unit),
        evidence_test(split.parts, labels),
    ]


def _equal_images(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return (n,) numbers, the same for images whose statistics agree to the last bit."""
    rows = np.stack([np.nan_to_num(values) for values in statistics.values()], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)

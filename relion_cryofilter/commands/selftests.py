"""The self-tests of a training, put to its data and its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from relion_cryofilter.data.labelled import LabelledSet, Split
from relion_cryofilter.data.stacks import read_header
from relion_cryofilter.nn.checkpoint import Model
from relion_cryofilter.nn.small_images import Loaded
from relion_cryofilter.nn.training import noise_images
from relion_cryofilter.results.selftests import (
    SelfTest,
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


def unit_name(labelled: LabelledSet, split: Split) -> str:
    """Return what `split.groups` numbers: micrographs wherever they are known."""
    by_particle = split.unit == "particle" and labelled.particles.has_micrographs
    return "micrograph" if by_particle else split.unit


def run_self_tests(
    model: Model, loaded: Loaded, labelled: LabelledSet, split: Split, seed: int
) -> list[SelfTest]:
    """Ask all self-tests of a training; see `results.selftests`."""
    particles = labelled.particles
    boxes = np.array([read_header(path).nx for path in particles.stacks])[particles.stack_of]
    statistics = {**loaded.statistics, "box size": boxes}
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(len(labelled))[:MOST_PROBED])
    small = loaded.images.get(some)
    thumbs = torch.nn.functional.adaptive_avg_pool2d(small[:, :1], THUMBNAIL_PX).flatten(1).numpy()
    places = {int(row): place for place, row in enumerate(some)}
    train, test = (
        np.array([places[row] for row in rows.tolist() if row in places], np.int64)
        for rows in (split.train, split.test)
    )
    noise = model.preprocess(noise_images(int(np.median(boxes)), N_NOISE, seed))
    return [
        *leak_tests(statistics, labelled.labels, particles.stack_of),
        permutation_test(thumbs, labelled.labels[some], train, test, seed),
        noise_test(model.probabilities(noise).numpy(), model.threshold),
        split_test(split.parts, split.groups, unit_name(labelled, split)),
    ]

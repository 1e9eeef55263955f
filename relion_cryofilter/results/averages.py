"""Averages of particles that are alike: what was thrown away, as people can see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from relion_cryofilter.images.alignment import Average, average_of
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.images.batches import map_batches
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.model import Model
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.thresholds import Chosen

MOST_PARTICLES = {"rejected": 1000, "borderline": 400, "accepted": 400}
MOST_CLUSTERS = {"rejected": 8, "borderline": 4, "accepted": 4}
FEWEST_PARTICLES, PARTICLES_A_CLUSTER = 30, 50
SIDE_PX = 48
NEAR = 0.1  # of all particles are borderline, on either side, at most

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cluster:
    """Particles that the network finds alike."""

    average: Average
    rows: Rows  # (n,) of the particle set
    share: float  # of those of its group that were looked at
    score: float  # mean


@dataclass(frozen=True, eq=False)
class Averages:
    """The clusters of one group of particles.

    Attributes
    ----------
    group
        ``rejected``, ``borderline`` or ``accepted``.
    clusters
        Those with a common signal first, and of these the one with the highest score.
    looked_at, n
        How many particles are in the clusters, a random sample, and how many in the group.
    """

    group: str
    clusters: tuple[Cluster, ...]
    looked_at: int
    n: int

    @property
    def title(self) -> str:
        """What they are averages of."""
        return f"Averages of {self.looked_at:,} of {self.n:,} {self.group} particles"


def averages_of(
    particles: ParticleSet, model: Model, chosen: Chosen, usable: Rows, threads: int
) -> list[Averages]:
    """Read samples of the rejected, the borderline and the accepted, and average what is alike.

    Features and small images are made of the sample's images anew, so the result is the same
    whoever scored them, and when. `usable` are the rows whose images can be read; groups of fewer
    than `FEWEST_PARTICLES` are left out.
    """
    # Who is looked at.
    rng = np.random.default_rng(0)
    order = usable[np.argsort(-chosen.values[usable], kind="stable")]
    accepted = chosen.accepted[order]
    kept, near = int(accepted.sum()), int(NEAR * len(order))
    near = min(near, MOST_PARTICLES["borderline"] // 2)
    groups = {
        "rejected": order[~accepted],
        "borderline": order[max(0, kept - near) : kept + near],
        "accepted": order[accepted],
    }
    samples = {
        name: np.sort(rng.choice(rows, min(MOST_PARTICLES[name], len(rows)), replace=False))
        for name, rows in groups.items()
        if len(rows) >= FEWEST_PARTICLES
    }
    if not samples:
        return []

    # Their images and features, each read once.
    rows = np.unique(np.concatenate(list(samples.values())))
    images, features = _read(particles.take(rows), model, threads)
    values, made = chosen.values[rows], []
    for name, sample in samples.items():
        at = np.searchsorted(rows, sample)
        at = at[np.isfinite(images[at, 0, 0]) & np.isfinite(features[at]).all(axis=1)]
        if len(at) < FEWEST_PARTICLES:
            continue
        of = _clusters(features[at], MOST_CLUSTERS[name])
        found = []
        for number in np.unique(of).tolist():
            here = at[of == number]
            share, score = len(here) / len(at), float(values[here].mean())
            found.append(Cluster(average_of(images[here]), rows[here], share, score))
        found.sort(key=lambda cluster: (-cluster.average.has_signal, -cluster.score))
        made.append(Averages(name, tuple(found), len(at), len(groups[name])))
    return made


def _read(
    particles: ParticleSet, model: Model, threads: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return small images (n, 48, 48) and features (n, k) of particles."""
    headers, bad = check_stacks(particles)
    bad.refuse("the images were there when they were scored")
    crop = FourierCrop(SIDE_PX)
    images = np.empty((len(particles), SIDE_PX, SIDE_PX), np.float32)
    features = np.empty((len(particles), model.network.feature_count), np.float32)

    def reduce(boxes: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        small = model.preprocess(boxes, model.precision)
        found = model.probabilities_and_features(small)[1].float().numpy()
        same = small[:, 0] if model.preprocess == crop else crop(boxes.float())[:, 0]
        return same.float().numpy(), found

    everyone = np.arange(len(particles))
    for places, (small, found) in map_batches(
        reduce, particles, everyone, headers, threads=threads
    ):
        images[places], features[places] = small, found
    return images, features


def _clusters(features: NDArray[np.float32], most: int) -> NDArray[np.int32]:
    """Return the number of the cluster, of at most so many, of each of n features (n, k)."""
    from sklearn.cluster import KMeans  # slow to import

    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    wanted = int(np.clip(len(features) // PARTICLES_A_CLUSTER, 1, most))
    wanted = min(wanted, len(np.unique(scaled, axis=0)))
    found: NDArray[np.int32] = KMeans(wanted, n_init=3, random_state=0).fit_predict(scaled)
    return found

"""Where a model is at home: what its training images look like to its network.

A model carries, for the features of its network, the mean of the training's micrographs and how
far they lie apart. A set that is scored is far from home where most of its particles are of
micrographs that lie further off. The direction from bad to good particles is left out, for shares
of junk differ from set to set; so is what varies least, which is noise.

`OUTSIDE` and `FAR` are from benchmarks/results/home.md. The radial spectrum of the images was
tried beside the features: in trainings of eight micrographs it follows their defocus, took false
alarms from 3 to 6 % of runs, and found nothing more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from relion_cryofilter.nn.networks import Network
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.splits import Folds, Split, clusters_of

if TYPE_CHECKING:
    from relion_cryofilter.nn.task import Task

HOME = "home"
"""Key of the provenance."""

DIRECTIONS, SAMPLE, GROUPS = 12, 1000, 40
FEWEST_TRAINED, FEWEST_GROUPS, FEWEST_IN_GROUP = 5, 4, 10
FLOOR, FLOOR_WITHOUT_MICROGRAPHS = 0.1, 0.3
"""Least spread of micrographs, in standard deviations of the particles of one."""
OUTSIDE, FAR = 1.2, 0.6
"""A micrograph is outside at this many times the usual distance, a set is far at this share."""

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True, eq=False)
class Home:
    """Where the micrographs of a training lie among the k features of its network.

    Attributes
    ----------
    mean
        (k,) of the particles' features.
    axes
        (k, p): from features about the mean to p numbers, uncorrelated and of unit variance among
        the particles of one micrograph.
    centre, spread
        (p,) mean and variance of the micrographs' means.
    """

    mean: np.ndarray
    axes: np.ndarray
    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(
        cls, features: np.ndarray, labels: np.ndarray, groups: np.ndarray, floor: float = FLOOR
    ) -> Home | None:
        """Return the home of a training from features (n, k), labels and groups (n,).

        None where there are too few groups of particles to tell, or nothing varies.
        """
        numbers, of, counts = np.unique(groups, return_inverse=True, return_counts=True)
        if len(numbers) < FEWEST_TRAINED or len(set(labels.tolist())) < 2:
            return None
        # The directions in which the particles of one micrograph vary most.
        features = features.astype(np.float64)
        mean, sigma = features.mean(axis=0), features.std(axis=0)
        scale = 1 / np.maximum(sigma, 1e-3 * sigma.max() + 1e-12)
        scaled = (features - mean) * scale
        means = _means(scaled, of)
        variance, vectors = np.linalg.eigh(np.cov((scaled - means[of]).T))
        most = np.argsort(-variance)[:DIRECTIONS]
        most = most[variance[most] > 1e-3 * variance.max()]
        axes = vectors[:, most] / np.sqrt(variance[most])
        if not axes.size:
            return None
        # Without that from bad to good particles.
        places = scaled @ axes
        apart = places[labels].mean(axis=0) - places[~labels].mean(axis=0)
        apart /= np.linalg.norm(apart) + 1e-12
        axes = axes - np.outer(axes @ apart, apart)
        # How far micrographs lie apart, but for the noise of their means; few of them say little
        # of one direction by itself, so what all directions say counts as four more.
        means = means @ axes
        spread = np.maximum(means.var(axis=0, ddof=1) - (1 / counts).mean(), 0)
        spread = (spread * (len(counts) - 1) + spread.mean() * 4) / (len(counts) + 3) + floor**2
        return cls(mean, axes * scale[:, None], means.mean(axis=0), spread)

    def outside(self, features: np.ndarray, groups: np.ndarray) -> float:
        """Return the share, 0 to 1, of particles in groups that lie outside; NaN if too few tell.

        `features` are (n, k), `groups` (n,).
        """
        usable = np.isfinite(features).all(axis=1)
        numbers, of, counts = np.unique(groups[usable], return_inverse=True, return_counts=True)
        if len(numbers) < FEWEST_GROUPS or features.shape[1] != len(self.mean):
            return float("nan")
        means = _means((features[usable] - self.mean) @ self.axes, of)
        usual = self.spread + 1 / counts[:, None]
        distance = np.sqrt(((means - self.centre) ** 2 / usual).mean(axis=1))
        return float(counts[distance > OUTSIDE].sum() / counts.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON, with six digits."""
        return {
            item.name: np.vectorize(lambda x: float(f"{x:.6g}"))(getattr(self, item.name)).tolist()
            for item in fields(self)
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Home:
        """Return what `to_dict` wrote down; a ValueError if it is no such thing."""
        try:
            home = cls(*(np.array(stored[item.name], np.float64) for item in fields(cls)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError("damaged") from error
        (k, p), all_of = home.axes.shape if home.axes.ndim == 2 else (0, 0), vars(home).values()
        shapes = [part.shape for part in (home.mean, home.centre, home.spread)]
        finite = all(np.isfinite(part).all() for part in all_of)
        if shapes != [(k,), (p,), (p,)] or not p or not finite or home.spread.min() <= 0:
            raise ValueError("damaged")
        return home


def _means(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Return the mean of the `values` (n, p) of each group; `of` (n,) are their numbers."""
    sums = np.zeros((of.max() + 1, values.shape[1]))
    np.add.at(sums, of, values)
    return np.asarray(sums / np.bincount(of)[:, None])


def sample_groups(clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (m,) rows of at most a thousand particles, and (m,) their groups.

    A group is of one of the `clusters` (n,), which are micrographs; where these hold few particles
    each, it is of neighbouring ones.
    """
    rng, order = np.random.default_rng(0), np.argsort(clusters, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
    large = [part for part in parts if len(part) >= FEWEST_IN_GROUP]
    if 2 * sum(map(len, large)) < len(order):
        large = np.array_split(order, max(1, len(order) // (SAMPLE // GROUPS)))
    chosen = rng.permutation(len(large))[:GROUPS]
    size = SAMPLE // max(1, len(chosen))
    rows = [np.sort(rng.permutation(large[number])[:size]) for number in chosen]
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(part) for part in rows])


def home_of(
    network: Network, task: Task, rows: np.ndarray, split: Split | Folds
) -> dict[str, Any] | None:
    """Return the home of a network that was trained on `rows`, for the provenance, or None.

    Images of at most a thousand are looked at.
    """
    taken, groups = sample_groups(split.clusters[rows])
    rows = rows[taken]
    network.eval()
    with torch.no_grad():
        parts = [
            network.forward_with_features(part.to(network.device))[1].cpu()
            for part in torch.split(task.loaded.images.get(rows), 64)
        ]
    features, labels = torch.cat(parts).numpy(), task.labelled.labels[rows]
    floor = FLOOR_WITHOUT_MICROGRAPHS if split.cluster_unit == "particle" else FLOOR
    home = Home.of(features, labels, groups, floor)
    return home.to_dict() if home else None


def warn_if_far(
    provenance: Mapping[str, Any], particles: ParticleSet, rows: np.ndarray, features: np.ndarray
) -> float:
    """Warn where a set does not look like the training of a model with this provenance.

    `features` (m, k) are of the `rows` (m,) of the set. Returns the share of particles outside; NaN
    where nothing is known of the training, or too little of the set.
    """
    stored = provenance.get(HOME)
    if not stored or not len(rows):
        return float("nan")
    try:
        home = Home.from_dict(stored)
    except ValueError:
        log.warning("What the model says of its training's images is damaged; not compared.")
        return float("nan")
    taken, groups = sample_groups(clusters_of(particles)[0][rows])
    share = home.outside(features[taken], groups)
    if share > FAR:
        log.warning(
            "Features lie outside those of the model's training for %.0f %% of the particles (by "
            "micrograph, of %s that were looked at; a fifth is usual): scores may mean nothing. "
            "Train again, on labels of these images.", 100 * share, f"{len(taken):,}",
        )  # fmt: skip
    return share

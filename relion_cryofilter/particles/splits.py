"""Which particles train, which choose and which test: splits and folds of whole micrographs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.progress import counted

ATTEMPTS = 200  # random splits, of which the most even one is taken
FOLDS = 5  # fewer where there are fewer micrographs
FEWEST_STACKS = 10  # so many, without micrograph names, are taken for one stack a micrograph


@dataclass(frozen=True)
class Split:
    """Rows for training, validation (choices) and test (the figure that is reported).

    Attributes
    ----------
    train, validation, test
        Row numbers, ascending.
    unit
        What is never on two sides: ``micrograph``, ``stack`` or ``particle``.
    clusters, cluster_unit
        (n,) for each row, what it has neighbours in (see `clusters_of`), and what that is.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    unit: str
    clusters: np.ndarray
    cluster_unit: str

    def without(self, bad: np.ndarray) -> Split:
        """Return this split without the rows in `bad`."""
        kept = [np.setdiff1d(part, bad) for part in self.parts.values()]
        return replace(self, train=kept[0], validation=kept[1], test=kept[2])

    def members(self, labels: np.ndarray, count: int, seed: int) -> list[Split]:
        """Return `count` splits of one test part, each with another validation part.

        The first is this one. The others are folds of the training and validation rows, by cluster
        (if this split is not by particle), with both labels (n,) in each (scikit-learn's
        StratifiedGroupKFold), and none is this one again; a CryoFilterError if too few clusters
        have both for so many.
        """
        if count == 1:
            return [self]
        rows = np.sort(np.concatenate([self.train, self.validation]))
        groups = rows if self.unit == "particle" else self.clusters[rows]
        fewest = min(labels[rows].sum(), (~labels[rows]).sum(), len(np.unique(groups)))
        usual = round(len(rows) / max(1, len(self.validation)))
        number = min(max(count, usual), int(fewest))
        found = []
        if number >= count:
            from sklearn.model_selection import StratifiedGroupKFold  # slow to import

            folds = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
            for train, validation in folds.split(rows, labels[rows], groups):
                again = np.array_equal(rows[validation], self.validation)
                if len(set(labels[rows[validation]].tolist())) == 2 and not again:
                    found.append(replace(self, train=rows[train], validation=rows[validation]))
        if len(found) < count - 1:
            raise CryoFilterError(
                f"--ensemble {count} needs as many {self.unit}s, or groups of them, that hold good "
                f"and bad particles; only {len(found) + 1} could be made. Ask for fewer."
            )
        return [self, *found[: count - 1]]

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The three parts by name."""
        return {"training": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class Folds:
    """Rows in parts, each of which is scored by a model that was trained on the others.

    Attributes
    ----------
    held
        Row numbers of each fold, ascending.
    unit
        What is never in two folds: ``micrograph``, ``stack`` or ``particle``.
    clusters, cluster_unit
        (n,) for each row, what it has neighbours in (see `clusters_of`), and what that is.
    """

    held: tuple[np.ndarray, ...]
    unit: str
    clusters: np.ndarray
    cluster_unit: str

    @property
    def rows(self) -> np.ndarray:
        """(m,) the rows of all folds, ascending."""
        return np.sort(np.concatenate(self.held))

    @property
    def fold_of(self) -> np.ndarray:
        """(m,) for each of `rows`, the number of its fold, from 0."""
        rows = self.rows
        found = np.empty(len(rows), np.int64)
        for number, part in enumerate(self.held):
            found[np.searchsorted(rows, part)] = number
        return found

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The folds by name."""
        return {f"fold {number}": part for number, part in enumerate(self.held, 1)}

    def others(self, number: int) -> np.ndarray:
        """Return the rows that are not in fold `number`, from 0, ascending."""
        return np.sort(np.concatenate([*self.held[:number], *self.held[number + 1 :]]))


def folds_by_micrograph(
    particles: ParticleSet,
    labels: np.ndarray,
    seed: int,
    bad: Sequence[int] | np.ndarray = (),
    count: int = FOLDS,
) -> Folds:
    """Part particles into folds so that no micrograph is in two and each has both labels.

    At most `count`, fewer where fewer micrographs hold the rarer kind (scikit-learn's
    StratifiedGroupKFold). Where two can't be made, folds are by stack, and where these can't be
    either, by particle; a CryoFilterError if there are fewer than two of a kind. `labels` are (n,)
    bool; the rows in `bad` are left out. The same particles, in any order, give the same folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # slow to import

    usable = ~np.isin(np.arange(len(labels)), bad)
    kinds = {"positive": labels & usable, "negative": ~labels & usable}
    for kind, mask in kinds.items():
        if (number := mask.sum()) < 2:
            raise CryoFilterError(
                f"Only {counted(int(number), f'{kind} particle')}; a model is trained on some and "
                "measured on others, so at least two are needed. Label more."
            )
    clusters, cluster_unit = clusters_of(particles)
    stacks = by_name(particles.stack_of, particles.stack_names)
    units = {"stack": stacks, "particle": np.lexsort((particles.index, stacks)).argsort()}
    if particles.has_micrographs:
        by_micrograph = by_name(particles.micrograph_of, particles.micrographs)
        units = {"micrograph": by_micrograph, **units}
    for unit, groups in units.items():
        order = np.lexsort((particles.index, stacks, groups))
        order = order[usable[order]]
        most = min(len(np.unique(groups[mask])) for mask in kinds.values())
        for number in range(min(count, most), 1, -1):
            if unit == "particle":
                by = StratifiedKFold(number, shuffle=True, random_state=seed)
                parts = by.split(order, labels[order])
            else:
                by = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
                parts = by.split(order, labels[order], groups[order])
            found = [held for _, held in parts]
            held = tuple(np.sort(order[part]) for part in found)
            if all(len(set(labels[part].tolist())) == 2 for part in held):
                return Folds(held, unit, clusters, cluster_unit)
    raise AssertionError("two of each kind make two folds by particle")


def split_by_micrograph(
    particles: ParticleSet, labels: np.ndarray, train_fraction: float, seed: int
) -> Split:
    """Split particles so that no micrograph is on two sides and every side has both labels.

    Where that can't be (too few micrographs, or one kind of particle in too few of them), the
    split is by stack, and where that can't be either, by particle; a CryoFilterError if there are
    fewer than three of a kind. `labels` are (n,) bool. What `train_fraction` leaves is halved
    between validation and test. The same particles, in whatever order, give the same split.
    """
    for kind, count in (("positive", labels.sum()), ("negative", (~labels).sum())):
        if count < len(("train", "validation", "test")):
            raise CryoFilterError(
                f"Only {counted(int(count), f'{kind} particle')}; training, validation and test "
                "need at least one each. Label more."
            )
    clusters, cluster_unit = clusters_of(particles)
    units = {"stack": by_name(particles.stack_of, particles.stack_names)}
    if particles.has_micrographs:
        by_micrograph = by_name(particles.micrograph_of, particles.micrographs)
        units = {"micrograph": by_micrograph, **units}
    for unit, groups in units.items():
        parts = _split_groups(groups, labels, train_fraction, seed)
        if parts is not None:
            return Split(*parts, unit, clusters, cluster_unit)
    # By particle, each kind by itself.
    rng = np.random.default_rng(seed)
    order = np.lexsort((particles.index, units["stack"]))
    shares = []
    for of_kind in (labels[order], ~labels[order]):
        rows = rng.permutation(order[of_kind])
        n_train = min(len(rows) - 2, max(1, round(train_fraction * len(rows))))
        shares.append(np.split(rows, [n_train, n_train + (len(rows) - n_train) // 2]))
    train, validation, test = (np.sort(np.concatenate(part)) for part in zip(*shares))
    return Split(train, validation, test, "particle", clusters, cluster_unit)


def clusters_of(particles: ParticleSet) -> tuple[np.ndarray, str]:
    """Return (n,) what each particle has neighbours in, as numbers, and what these are.

    Particles of one micrograph are alike, so intervals resample whole micrographs. Without
    micrograph names, stacks stand in where there are many; else each particle is by itself.
    """
    if particles.has_micrographs:
        return by_name(particles.micrograph_of, particles.micrographs), "micrograph"
    if len(particles.stacks) >= FEWEST_STACKS:
        return by_name(particles.stack_of, particles.stack_names), "stack"
    return np.arange(len(particles)), "particle"


def by_name(group_of: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return (n,) each row's group as its rank among the sorted names, whatever the row order."""
    rank = np.empty(len(names), np.int64)
    rank[sorted(range(len(names)), key=lambda number: names[number])] = np.arange(len(names))
    return np.asarray(rank[group_of])


def seen_units(particles: ParticleSet) -> list[str]:
    """Return short hashes of the micrographs (or what stands in) that particles are of.

    A model carries those that it has seen, so that it can't be measured on them unawares.
    """
    unit = clusters_of(particles)[1]
    if unit == "particle":
        names = {particles.image_name(row) for row in range(len(particles))}
    elif unit == "micrograph":
        names = {particles.micrographs[n] for n in np.unique(particles.micrograph_of)}
    else:
        names = {particles.stack_names[n] for n in np.unique(particles.stack_of)}
    return sorted(map(short_hash, names))


def _split_groups(
    groups: np.ndarray, labels: np.ndarray, train_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the most even of many random splits of whole groups; None if none has all labels."""
    numbers, group_of = np.unique(groups, return_inverse=True)
    n = len(numbers)
    if n < 3:
        return None
    counts = np.stack([np.bincount(group_of, kind, n) for kind in (labels, ~labels)])
    n_train = min(n - 2, max(1, round(train_fraction * n)))
    edges = [n_train, n_train + (n - n_train) // 2]
    rest = (1 - train_fraction) / 2
    wanted = np.array([train_fraction, rest, rest])
    rng = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(ATTEMPTS):
        parts = np.split(rng.permutation(n), edges)
        held = np.stack([counts[:, part].sum(axis=1) for part in parts], axis=1)
        off = np.abs(held / held.sum(axis=1, keepdims=True) - wanted).max(axis=1).sum()
        if held.min() > 0 and off < least:
            best, least = parts, off
    if best is None:
        return None
    train, validation, test = (np.flatnonzero(np.isin(group_of, part)) for part in best)
    return train, validation, test


def short_hash(text: str) -> str:
    """Return the first 12 hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]

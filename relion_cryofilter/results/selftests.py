"""Self-tests of a training: could its figures be too good to be true?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from relion_cryofilter.wording import counted

LEAK_AUC = 0.85
"""A single number that separates the classes so well for certain is a leak, not biology."""

ROUNDING = 1e-3
"""Of the images' sigma: RELION normalises to float32 rounding, which must not count."""

SAME_SPREAD = 0.1
"""If a statistic varies so much less in one class, that class alone was normalised by it."""

ORIGIN_SHARE = 0.95
NOISE_SHARE = 0.01
FEWEST = 20
PROBE_ROWS = 4000


@dataclass(frozen=True)
class SelfTest:
    """One question and its answer.

    Attributes
    ----------
    name
        What was looked at.
    passed
        False is a warning: the figures may not mean what they seem to.
    finding
        What was found, with numbers, and what to do about it.
    """

    name: str
    passed: bool
    finding: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'WARNING'}: {self.name}: {self.finding}"


def leak_tests(
    statistics: Mapping[str, np.ndarray], labels: np.ndarray, origin: np.ndarray
) -> list[SelfTest]:
    """Ask whether something that has nothing to do with particles gives the labels away.

    Particles themselves raise the mean and the sigma of an image whose background is normalised,
    and lower those of the background where whole images are normalised. So a difference counts
    unless the partner (the background's for the image, the image's for the background) is the
    same for all images, which is what normalising leaves.

    Parameters
    ----------
    statistics
        (n,) numbers of the raw images: ``image mean``, ``background mean``, ``image sigma``,
        ``background sigma``, ``box size`` and ``pixel size``.
    labels
        (n,) bool.
    origin
        (n,) the file that each image is from.
    """
    grain = ROUNDING * float(np.median(statistics["image sigma"]))
    rounded = {name: np.round(values / grain) for name, values in statistics.items()}
    tests = []
    for image, background in (
        ("image mean", "background mean"),
        ("image sigma", "background sigma"),
    ):
        sides = [_separation(rounded[name], labels) for name in (image, background)]
        together = sides[0] * sides[1] > 0
        for name, side, partner in ((image, sides[0], background), (background, sides[1], image)):
            natural = name == image or _same_for_all(rounded[partner])
            leaks = side != 0 and (together or not natural)
            tests.append(
                _leak(name, rounded[name], labels, leaks or _one_sided(rounded[name], labels))
            )
    for name in ("box size", "pixel size"):
        values = np.nan_to_num(statistics[name])
        tests.append(_leak(name, values, labels, _separation(values, labels) != 0))
    return [*tests, _origin_test(labels, origin)]


def _same_for_all(values: np.ndarray) -> bool:
    """Tell whether rounded values are equal but for rounding."""
    low, high = np.percentile(values, (2, 98))
    return bool(high - low <= 2)


def _separation(values: np.ndarray, labels: np.ndarray) -> int:
    """Return 1 or -1 if the good have surely higher or lower values, else 0.

    Surely: the AUC less two standard errors (Hanley & McNeil, Radiology 143, 29, 1982).
    """
    auc = float(roc_auc_score(labels, values))
    strength = max(auc, 1 - auc)
    n_good, n_bad = int(labels.sum()), int((~labels).sum())
    q1, q2 = strength / (2 - strength), 2 * strength**2 / (1 + strength)
    variance = (
        strength * (1 - strength)
        + (n_good - 1) * (q1 - strength**2)
        + (n_bad - 1) * (q2 - strength**2)
    ) / (n_good * n_bad)
    if strength - 2 * np.sqrt(max(variance, 0.0)) < LEAK_AUC:
        return 0
    return 1 if auc > 0.5 else -1


def _one_sided(values: np.ndarray, labels: np.ndarray) -> bool:
    """Tell whether a statistic varies in one class and hardly in the other."""
    spreads = sorted(
        float(np.subtract(*np.percentile(values[k], (90, 10)))) for k in (labels, ~labels)
    )
    return spreads[1] > 5 and spreads[0] < SAME_SPREAD * spreads[1]


def _leak(name: str, values: np.ndarray, labels: np.ndarray, leaks: bool) -> SelfTest:
    auc = float(roc_auc_score(labels, values))
    finding = f"alone it separates the classes with AUC {max(auc, 1 - auc):.3f}"
    if leaks:
        finding += (
            "; good and bad images were probably normalised or extracted differently, and the "
            "model's figures mean nothing then. Extract both in one job."
        )
    elif max(auc, 1 - auc) >= LEAK_AUC:
        finding += "; no leak, as the background is alike: the particles themselves do it"
    return SelfTest(name, not leaks, finding)


def _origin_test(labels: np.ndarray, origin: np.ndarray) -> SelfTest:
    files, file_of = np.unique(origin, return_inverse=True)
    share = np.bincount(file_of, labels) / np.bincount(file_of)
    pure = float(np.isin(share[file_of], (0.0, 1.0)).mean())
    finding = (
        f"{100 * pure:.0f} % of the images are in one of {len(files)} files with one kind only"
    )
    if pure >= ORIGIN_SHARE:
        finding += (
            "; any difference in how these files were made looks like a difference of particles. "
            "Labels from one extraction are safer."
        )
    return SelfTest("file of origin", pure < ORIGIN_SHARE, finding)


def copies_test(identity: np.ndarray, train: np.ndarray, others: np.ndarray) -> SelfTest:
    """Ask whether images of the training part are in the other parts under other names.

    Parameters
    ----------
    identity
        (n,) the same number for images that are equal.
    train, others
        Rows of the training part and of the two other parts.
    """
    copies = int(np.isin(identity[others], identity[train]).sum())
    finding = f"{copies:,} images outside the training part are copies of images in it"
    if copies:
        finding += "; figures are too good. Remove the copies"
    return SelfTest("copies", copies == 0, f"{finding}.")


def permutation_test(
    small: np.ndarray,
    labels: np.ndarray,
    identity: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> SelfTest:
    """Ask whether labels that mean nothing can be predicted; if so, the split leaks.

    A linear probe is trained on permuted labels (equal images get equal ones). It can do better
    than chance on the other part only if that part holds the same images.

    Parameters
    ----------
    small
        (n, k) flattened small images.
    labels, identity, train, test
        (n,) bool, (n,) numbers of equal images, and the rows of the two parts.
    """
    rng = np.random.default_rng(seed)
    train, test = (rng.permutation(part)[:PROBE_ROWS] for part in (train, test))
    _, first, image_of = np.unique(identity, return_index=True, return_inverse=True)
    shuffled = rng.permutation(labels[first])[image_of.reshape(-1)]
    if len(set(shuffled[train])) < 2 or len(set(shuffled[test])) < 2:
        return SelfTest("permuted labels", True, "too few particles to tell")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # scikit-learn 1.3 with a newer SciPy
        probe.fit(small[train], shuffled[train])
    auc = float(roc_auc_score(shuffled[test], probe.decision_function(small[test])))
    # Standard error of the AUC of unrelated scores: Hanley & McNeil, Radiology 143, 29 (1982).
    n_good = int(shuffled[test].sum())
    n_bad = len(test) - n_good
    error = float(np.sqrt((n_good + n_bad + 1) / (12 * n_good * n_bad)))
    passed = auc < 0.5 + max(0.05, 4 * error)
    return SelfTest(
        "permuted labels",
        passed,
        f"a probe trained on them has AUC {auc:.3f} on the test part (chance 0.5 ± {2 * error:.3f})"
        + ("" if passed else "; the same images are on both sides of the split"),
    )


def noise_test(noise_scores: np.ndarray, threshold: float) -> SelfTest:
    """Ask how many images of pure noise would be accepted."""
    share = float((noise_scores >= threshold).mean())
    finding = f"{100 * share:.1f} % of {len(noise_scores)} images of white noise would be accepted"
    if share > NOISE_SHARE:
        finding += "; the model has not learnt what an empty image is. Add empty ones as bad."
    return SelfTest("pure noise", share <= NOISE_SHARE, finding)


def split_test(parts: Mapping[str, np.ndarray], clusters: np.ndarray, unit: str) -> SelfTest:
    """Ask whether a micrograph (or what stands in for it) is on two sides of the split.

    Parameters
    ----------
    parts
        The rows of each part by name.
    clusters, unit
        (n,) the micrograph of each row as a number; what the numbers stand for.
    """
    sides = [set(clusters[rows].tolist()) for rows in parts.values()]
    shared = len(set.union(*(a & b for i, a in enumerate(sides) for b in sides[:i])))
    finding = f"{counted(shared, unit)} on two sides of the split"
    if shared:
        finding += "; neighbours are alike, so figures are too good"
    return SelfTest("split", shared == 0, finding)


def evidence_test(parts: Mapping[str, np.ndarray], labels: np.ndarray) -> SelfTest:
    """Ask whether each part holds enough particles of each kind to say anything."""
    counts = {
        f"{name} holds {counted(int(kind[rows].sum()), word + ' particle')}": int(kind[rows].sum())
        for name, rows in parts.items()
        for word, kind in (("good", labels), ("bad", ~labels))
    }
    fewest = min(counts, key=lambda text: counts[text])
    if counts[fewest] >= FEWEST:
        return SelfTest("evidence", True, f"at least {counts[fewest]} of each kind in each part")
    return SelfTest(
        "evidence",
        False,
        f"the {fewest}: too few to choose a threshold by or to believe the figures. Label more.",
    )

"""Self-tests of a training: whether its figures could be too good to be true."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from relion_cryofilter.nn.fitting import MOST_SPECTRA, noise_of_spectrum
from relion_cryofilter.nn.linear import linear_baseline, radial_features
from relion_cryofilter.nn.measurement import Measured
from relion_cryofilter.nn.model import Models
from relion_cryofilter.nn.task import Task
from relion_cryofilter.particles.splits import Folds, Split
from relion_cryofilter.progress import counted
from relion_cryofilter.thresholds import CURVE

LEAK_AUC = 0.85
"""A single number that separates the classes so well for certain is a leak, not biology."""
ROUNDING = 1e-3
"""Of the images' sigma: RELION normalises to float32 rounding, which must not count."""
SAME_SPREAD = 0.1
"""If a statistic varies so much less in one class, that class alone was normalised by it."""
ORIGIN_SHARE, NOISE_SHARE, FEWEST = 0.95, 0.01, 20
N_NOISE, THUMBNAIL_PX, PROBE_ROWS, MOST_PROBED = 1000, 12, 4000, 8000
FEATURES_AT_ONCE = 1000

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class SelfTest:
    """One question and its answer; one that did not pass is a warning of the figures."""

    name: str
    passed: bool
    finding: str  # with numbers and, of a warning, with what it means and what to do

    @classmethod
    def of(cls, name: str, passed: bool, finding: str, meaning: str) -> SelfTest:
        """Return an answer that says what it means if it is a warning."""
        return cls(name, passed, finding if passed else f"{finding}; {meaning}")

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'WARNING'}: {self.name}: {self.finding}"


def leak_tests(
    statistics: Mapping[str, np.ndarray], labels: np.ndarray, origin: np.ndarray
) -> list[SelfTest]:
    """Ask whether something that has nothing to do with particles gives the labels away.

    Of `statistics` (n,) of raw images, box size and pixel size, and of the file `origin` (n,).

    Particles themselves raise the mean and the sigma of an image whose background is normalised,
    and lower those of the background where whole images are normalised. So a difference of images
    counts only with one of their backgrounds, and one of backgrounds alone only unless the images
    are all the same, which is what normalising leaves.
    """
    grain = ROUNDING * float(np.median(statistics["image sigma"]))
    rounded = {name: np.round(values / grain) for name, values in statistics.items()}
    looked_at = []
    for what in ("mean", "sigma"):
        names = (f"image {what}", f"background {what}")
        image, background = (rounded[name] for name in names)
        sides = [_separation(values, labels) for values in (image, background)]
        together = sides[0] * sides[1] > 0
        low, high = np.percentile(image, (2, 98))
        found = (together, together or (sides[1] != 0 and high - low > 2))
        for name, values, leaks in zip(names, (image, background), found):
            # A leak, too, is a statistic that varies in one class and hardly in the other.
            ends = [np.percentile(values[kind], (10, 90)) for kind in (labels, ~labels)]
            less, more = sorted(float(high - low) for low, high in ends)
            one_sided = more > 5 and less < SAME_SPREAD * more
            looked_at.append((name, values, leaks or one_sided))
    for name in ("box size", "pixel size"):
        values = np.nan_to_num(statistics[name])
        looked_at.append((name, values, _separation(values, labels) != 0))
    tests = []
    meaning = (
        "good and bad images were probably normalised or extracted differently, and the model's "
        "figures mean nothing then. Extract both in one job."
    )
    for name, values, leaks in looked_at:
        auc = float(roc_auc_score(labels, values))
        finding = f"alone it separates the classes with AUC {max(auc, 1 - auc):.3f}"
        if not leaks and max(auc, 1 - auc) >= LEAK_AUC:
            finding += "; no leak, as the background is alike: the particles themselves do it"
        tests.append(SelfTest.of(name, not leaks, finding, meaning))

    # The files that the images are from.
    files, file_of = np.unique(origin, return_inverse=True)
    share = np.bincount(file_of, labels) / np.bincount(file_of)
    pure = float(np.isin(share[file_of], (0.0, 1.0)).mean())
    where = f"in one of {len(files)} files with one kind only"
    finding = f"{100 * pure:.0f} % of the images are {where}"
    meaning = (
        "any difference in how these files were made looks like a difference of particles. Labels "
        "from one extraction are safer."
    )
    return [*tests, SelfTest.of("file of origin", pure < ORIGIN_SHARE, finding, meaning)]


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


def copies_test(identity: np.ndarray, sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> SelfTest:
    """Ask whether images that a model was trained on are in what it is measured on, too.

    `identity` (n,) is the same for images that are equal; `sides` are rows to train on and others.
    """
    found = [others[np.isin(identity[others], identity[train])] for train, others in sides]
    copies = len(np.unique(np.concatenate(found)))
    finding = f"{copies:,} images outside the training part are copies of images in it"
    return SelfTest.of("copies", not copies, finding, "figures are too good. Remove the copies.")


def permutation_test(
    small: np.ndarray,
    labels: np.ndarray,
    identity: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> SelfTest:
    """Ask whether labels that mean nothing can be predicted; if so, the split leaks.

    A linear probe is trained on flattened images (n, k) with permuted labels (n,), equal ones (by
    `identity`) with equal labels. It can do better than chance on the rows of the other part only
    if that part holds the same images.
    """
    name, rng = "permuted labels", np.random.default_rng(seed)
    train, test = (rng.permutation(part)[:PROBE_ROWS] for part in (train, test))
    _, first, image_of = np.unique(identity, return_index=True, return_inverse=True)
    shuffled = rng.permutation(labels[first])[image_of.reshape(-1)]
    if len(set(shuffled[train])) < 2 or len(set(shuffled[test])) < 2:
        return SelfTest(name, True, "too few particles to tell")
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
    chance = f"(chance 0.5 ± {2 * error:.3f})"
    finding = f"a probe trained on them has AUC {auc:.3f} on the test part {chance}"
    passed = auc < 0.5 + max(0.05, 4 * error)
    return SelfTest.of(name, passed, finding, "the same images are on both sides of the split")


def noise_test(
    noise_scores: np.ndarray,
    threshold: float,
    kind: str = "white noise",
    models: Models | None = None,
) -> SelfTest:
    """Ask how many images of pure noise, of a `kind`, would be accepted.

    Of `models` with a curve of their validation it is said which recall would accept few.
    """
    share = float((noise_scores >= threshold).mean())
    finding = f"{100 * share:.1f} % of {len(noise_scores)} images of {kind} would be accepted"
    meaning = "the model has not learnt what an empty image is. Add empty ones as bad"
    if models is not None and share > NOISE_SHARE:
        above = float(np.quantile(noise_scores, 1 - NOISE_SHARE, method="higher")) + 1e-6
        recalls = [model.curve.recall_at(above) for model in models if CURVE in model.provenance]
        if recalls:
            meaning += (
                f", or ask for less: at a recall of {np.mean(recalls):.2f} (threshold {above:.6f}) "
                f"it would be {100 * NOISE_SHARE:.0f} %"
            )
    name = "pure noise" if kind == "white noise" else kind
    return SelfTest.of(name, share <= NOISE_SHARE, finding, f"{meaning}.")


def split_test(parts: Mapping[str, np.ndarray], clusters: np.ndarray, unit: str) -> SelfTest:
    """Ask whether one of the `clusters` (n,), each a `unit`, is in two parts (rows by name)."""
    sides = [set(clusters[rows].tolist()) for rows in parts.values()]
    shared = len(set.union(*(a & b for i, a in enumerate(sides) for b in sides[:i])))
    finding = f"{counted(shared, unit)} on two sides of the split"
    meaning = "neighbours are alike, so figures are too good"
    return SelfTest.of("split", not shared, finding, meaning)


def evidence_test(parts: Mapping[str, np.ndarray], labels: np.ndarray) -> SelfTest:
    """Ask whether each part (rows by name) holds enough particles of each kind."""
    counts = {
        f"{name} holds {counted(int(kind[rows].sum()), word + ' particle')}": int(kind[rows].sum())
        for name, rows in parts.items()
        for word, kind in (("good", labels), ("bad", ~labels))
    }
    fewest = min(counts, key=lambda text: counts[text])
    finding = f"at least {counts[fewest]} of each kind in each part"
    if counts[fewest] < FEWEST:
        few = "too few to choose a threshold by or to believe the figures. Label more."
        finding = f"the {fewest}: {few}"
    return SelfTest("evidence", counts[fewest] >= FEWEST, finding)


def baseline_test(
    features: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
) -> SelfTest:
    """Ask whether the network is better than logistic regression on `features` (n, k).

    `sides` are rows to fit on and rows to score; all that are scored, with their network's
    `scores` (n,) on one side and the baseline's on the other, are compared.
    """
    name, found = "linear baseline", np.full(len(labels), np.nan)
    for train, test in sides:
        if len(test) and len(set(labels[train].tolist())) == 2:
            found[test] = linear_baseline().fit(features[train], labels[train]).predict_proba(
                features[test]
            )[:, 1]  # fmt: skip
    rows = np.flatnonzero(~np.isnan(found))
    if len(set(labels[rows].tolist())) < 2:
        return SelfTest(name, True, "too few particles to tell")
    linear, ours = (float(roc_auc_score(labels[rows], each[rows])) for each in (found, scores))
    finding = (
        f"logistic regression on radial profile and spectrum has AUC {linear:.3f}, the network "
        f"{ours:.3f}"
    )
    meaning = (
        "the network has learnt little of the particles' shape, or the labels follow size or "
        "brightness alone. Look at both kinds, and label more of those that look alike."
    )
    return SelfTest.of(name, ours >= linear, finding, meaning)


def pure_noise(task: Task, small: Tensor, rows: np.ndarray) -> dict[str, Tensor]:
    """Return small images of noise by their kind, for boxes like those of `rows`.

    White noise, and where there is one channel, noise with the mean spectrum of `small`.
    """
    seed = task.options.seed
    noises = {"white noise": task.white_noise(rows, N_NOISE, seed)}
    if task.start.preprocess.channels == 1:
        own = noise_of_spectrum(small[:MOST_SPECTRA], N_NOISE, seed)
        noises["noise of the set's spectrum"] = own
    return noises


def run_self_tests(
    models: Models, measured: Measured, task: Task, split: Split | Folds
) -> list[SelfTest]:
    """Ask all; `models` of one preprocessing score as their mean, `measured` on unseen ones.

    Of folds, the probe is trained on all but the first and tested on that one.
    """
    loaded, seed, threshold = task.loaded, task.options.seed, measured.chosen.threshold
    particles, labels = task.labelled.particles, task.labelled.labels
    sizes = np.array([group.pixel_size_angstrom or 0.0 for group in particles.optics])
    statistics = {
        **loaded.statistics,
        "box size": loaded.boxes_px.astype(np.float64),
        "pixel size": sizes[particles.optics_of],
    }
    used = np.sort(np.concatenate(list(split.parts.values())))
    # Images are equal if their statistics agree to the last bit.
    columns = [np.nan_to_num(values) for values in loaded.statistics.values()]
    identity = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    some = np.sort(np.random.default_rng(seed).permutation(used)[:MOST_PROBED])
    small = loaded.images.get(some)
    thumbs = torch.nn.functional.adaptive_avg_pool2d(small[:, :1], THUMBNAIL_PX).flatten(1)
    scores = np.full(len(labels), np.nan)
    if isinstance(split, Folds):
        sides = [(split.others(number), held) for number, held in enumerate(split.held)]
        compared, evidence, scores[split.rows] = (
            sides,
            {"labelled set": used},
            measured.chosen.values,
        )
    else:
        sides, evidence = [(split.train, split.test)], dict(split.parts)
        compared, scores[split.test] = sides[:], measured.chosen.values
        sides.append((split.train, split.validation))
    of_some = [
        (np.flatnonzero(np.isin(some, first)), np.flatnonzero(np.isin(some, second)))
        for first, second in compared
    ]
    train, test = of_some[0]
    features = np.concatenate(
        [radial_features(part[:, 0].numpy()) for part in torch.split(small, FEATURES_AT_ONCE)]
    )
    noise_scores = {
        kind: np.mean([model.probabilities(noise).numpy() for model in models], axis=0)
        for kind, noise in pure_noise(task, small, used).items()
    }
    statistics = {name: values[used] for name, values in statistics.items()}
    return [
        *leak_tests(statistics, labels[used], particles.stack_of[used]),
        copies_test(identity, sides),
        permutation_test(thumbs.numpy(), labels[some], identity[some], train, test, seed),
        baseline_test(features, labels[some], scores[some], of_some),
        *(noise_test(found, threshold, kind, models) for kind, found in noise_scores.items()),
        split_test(split.parts, split.clusters, split.cluster_unit),
        evidence_test(evidence, labels),
    ]


def log_self_tests(tests: Sequence[SelfTest]) -> None:
    """Log what was found; what did not pass is a warning, said even with --quiet."""
    log.info("Self-tests:")
    for test in tests:
        if test.passed:
            log.info("  pass: %s: %s", test.name, test.finding)
        else:
            log.warning("self-test %s: %s", test.name, test.finding)

"""A linear baseline: any network must beat logistic regression on radial profile and spectrum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

RING_PX = 2
FOLDS = 5


def radial_features(images: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return what rings of small images and of their power spectra are like.

    Parameters
    ----------
    images
        (n, dim, dim), each of zero mean and unit standard deviation, as the network sees them.

    Returns
    -------
    (n, 3 · (dim // 4)): mean and standard deviation of the pixels in rings of `RING_PX` px about
    the centre, and the logarithm of the mean power in rings of the spectrum, up to Nyquist.
    """
    dim = images.shape[-1]
    count = dim // (2 * RING_PX)
    y, x = np.indices((dim, dim)) - (dim - 1) / 2
    v, u = np.meshgrid(np.fft.fftfreq(dim, 1 / dim), np.fft.fftfreq(dim, 1 / dim))
    power = np.abs(np.fft.fft2(images)) ** 2
    rings = np.eye(count + 1)[np.minimum(np.hypot(x, y) // RING_PX, count).astype(int)]
    shells = np.eye(count + 1)[np.minimum(np.hypot(u, v) // RING_PX, count).astype(int)]
    mean, square, spectrum = (
        np.tensordot(maps, parts[..., :-1], 2) / parts[..., :-1].sum((0, 1))
        for maps, parts in ((images, rings), (np.square(images), rings), (power, shells))
    )
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    logarithm = np.log(spectrum + 1e-6)
    return np.concatenate([mean, spread, logarithm], axis=1).astype(np.float32)


def linear_baseline() -> Pipeline:
    """Return a fresh classifier of `radial_features`, both kinds weighing the same."""
    logistic = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
    return make_pipeline(StandardScaler(), logistic)


def out_of_fold_scores(
    features: NDArray[np.floating], labels: NDArray[np.bool_], clusters: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return the baseline's score (n,) of each image by a fit that has not seen its cluster.

    Parameters
    ----------
    features, labels
        (n, k) of `radial_features`; (n,) True for good ones.
    clusters
        (n,) numbers of micrographs. With fewer than two that hold a kind, scores are nan.
    """
    fewest = min(len(set(clusters[labels == kind].tolist())) for kind in (True, False))
    scores = np.full(len(labels), np.nan)
    if fewest < 2:
        return scores
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=0)
    for train, test in folds.split(features, labels, clusters):
        if len(set(labels[train].tolist())) == 2:
            fitted = linear_baseline().fit(features[train], labels[train])
            scores[test] = fitted.predict_proba(features[test])[:, 1]
    return scores

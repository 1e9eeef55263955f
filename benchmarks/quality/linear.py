"""Linear baselines, which tell whether a network is needed at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from relion_cryofilter.images.preprocess import BlurResize, FourierCrop

RADIAL, PRINCIPAL = "radial profile, logistic regression", "PCA, logistic regression"
LINEAR = (RADIAL, PRINCIPAL)
COMPONENTS = 50


def fit_linear(
    name: str, images: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit on images (n, box, box); return what gives scores (m,) of further images."""
    logistic = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
    if name == RADIAL:
        steps = [FunctionTransformer(_profiles), StandardScaler()]
    else:
        components = min(COMPONENTS, len(images) - 1)
        steps = [FunctionTransformer(_blurred), PCA(components, random_state=0), StandardScaler()]
    pipeline = make_pipeline(*steps, logistic).fit(images, labels)
    return lambda more: np.asarray(pipeline.predict_proba(more)[:, 1])


def _profiles(images: np.ndarray) -> np.ndarray:
    """Return mean and standard deviation in rings of 2 px, (n, 2 * rings)."""
    small = FourierCrop(48)(torch.from_numpy(images))[:, 0].numpy()
    y, x = np.indices(small.shape[1:]) - (small.shape[1] - 1) / 2
    ring = (np.hypot(x, y) // 2).astype(int)
    rings = [small[:, ring == number] for number in range(12)]
    return np.concatenate(
        [np.stack([values.mean(1) for values in rings], 1),
         np.stack([values.std(1) for values in rings], 1)], axis=1
    )  # fmt: skip


def _blurred(images: np.ndarray) -> np.ndarray:
    """Return the small images of the 2020 program, flat."""
    return np.asarray(BlurResize(28)(torch.from_numpy(images)).flatten(1).numpy())

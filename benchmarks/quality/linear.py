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
from relion_cryofilter.nn.linear import radial_features

RADIAL = "radial profile and spectrum, logistic regression"
PRINCIPAL = "PCA, logistic regression"
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
    """Return the features of the package's own baseline, (n, k)."""
    return radial_features(FourierCrop(48)(torch.from_numpy(images))[:, 0].numpy())


def _blurred(images: np.ndarray) -> np.ndarray:
    """Return the small images of the 2020 program, flat."""
    return np.asarray(BlurResize(28)(torch.from_numpy(images)).flatten(1).numpy())

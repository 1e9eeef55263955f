"""Making scores probabilities."""

from __future__ import annotations

import numpy as np

TEMPERATURES = np.geomspace(0.2, 5.0, 241)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that makes sigmoid(logit / temperature) most likely.

    Guo et al., "On calibration of modern neural networks", ICML 2017. Searched from 0.2 to 5, so
    that a small or perfectly separated validation set does not drive it to an extreme.
    """
    signed = np.where(labels, logits, -logits)[:, None]
    losses = np.logaddexp(0, -signed / TEMPERATURES).mean(axis=0)
    return float(TEMPERATURES[int(losses.argmin())])


def calibrated(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return sigmoid(logit / temperature), (n,), with the six decimals of a STAR file."""
    return np.asarray(np.round(1 / (1 + np.exp(-logits / temperature)), 6))

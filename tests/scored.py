"""Scored sets that tests of thresholds and of operating curves draw, and what holds of both."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, settings
from hypothesis import strategies as st

unhurried = settings(deadline=None)  # other work may run beside the tests
fractions = st.one_of(
    st.integers(1, 100).map(lambda percent: percent / 100),
    st.floats(0, 1, exclude_min=True, allow_subnormal=False),
)
raw_scores = st.floats(0, 1)
near_scores = st.integers(0, 40).map(
    lambda k: 0.5 + k * 3e-7
)  # many fall on one six-decimal number
tied_scores = st.sampled_from([0.0, 0.25, 0.3, 0.7, 1.0])
any_score = st.one_of(raw_scores, near_scores, tied_scores)


@st.composite
def scored_sets(draw):
    """Labels with both classes, and scores: spread, nearly tied and tied."""
    pairs = draw(st.lists(st.tuples(st.booleans(), any_score), min_size=2, max_size=60))
    labels, scores = (np.array(column) for column in zip(*pairs))
    assume(0 < labels.sum() < len(labels))
    kind = draw(st.sampled_from(["float64", "six decimals", "float32"]))
    if kind == "six decimals":
        scores = np.round(scores, 6)
    return labels, scores.astype(np.float32) if kind == "float32" else scores


def as_given_and_as_filed(scores):
    return scores, np.round(scores.astype(float), 6)


def has_six_decimals(threshold):
    return isinstance(threshold, float) and threshold == float(f"{threshold:.6f}")

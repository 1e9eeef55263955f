"""The curve that travels with a model answers as the scores it was made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from making import fractions, has_six_decimals, scored_sets, unhurried

from relion_cryofilter.errors import CryoFilterError, ModelError
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.thresholds import (
    MAX_QUANTILES,
    OperatingCurve,
    choose_threshold,
    share_interval,
)


def made_set(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.6
    logits = np.where(labels, 1.5, -1.5) + 1.5 * rng.normal(size=n)
    scores = np.round(1 / (1 + np.exp(-4 * logits)), 6)  # many at 0 and 1
    return labels, scores, rng.integers(12, size=n)


def curve_of(labels, scores):
    return OperatingCurve.from_scores(labels, scores, np.zeros(len(labels), int))


@pytest.mark.slow
@settings(unhurried, max_examples=30)
@given(scored_sets(), fractions)
def test_the_curve_of_a_small_set_is_the_set(labelled, value):
    labels, scores = labelled
    scores = np.round(scores.astype(float), 6)
    curve = curve_of(labels, scores)
    for threshold in [*scores, *np.round(scores + 1e-6, 6), 0.0, 0.4, 1.0]:
        accepted = scores >= threshold
        assert curve.recall_at(threshold) == np.mean(accepted[labels])
        if accepted.any():
            assert curve.precision_at(threshold) == pytest.approx(np.mean(labels[accepted]))
        else:
            assert np.isnan(curve.precision_at(threshold))
    for kind in ("recall", "precision"):
        request = ThresholdRequest(kind, value)
        try:
            expected = choose_threshold(request, scores, labels)
        except CryoFilterError as error:
            with pytest.raises(CryoFilterError) as caught:
                curve.threshold(request)
            assert str(caught.value) == str(error)  # noqa: PT017
        else:
            assert curve.threshold(request) == expected


@pytest.mark.parametrize("text", ["recall=0.95", "recall=0.5", "precision=0.9", "precision=0.97"])
def test_the_curve_of_a_large_set_is_close_to_the_set(text):
    labels, scores, groups = made_set(20_000)
    curve = OperatingCurve.from_scores(labels, scores, groups)
    request = ThresholdRequest.parse(text)
    threshold = curve.threshold(request)
    accepted = scores >= threshold
    assert has_six_decimals(threshold)
    found = labels[accepted].mean() if request.kind == "precision" else accepted[labels].mean()
    assert found == pytest.approx(request.value, abs=0.005)
    assert curve.recall_at(threshold) == pytest.approx(accepted[labels].mean(), abs=0.005)
    assert curve.precision_at(threshold) == pytest.approx(labels[accepted].mean(), abs=0.005)


def test_a_curve_goes_through_json_unchanged_and_stays_small():
    curve = OperatingCurve.from_scores(*made_set(5_000))
    text = json.dumps(curve.to_dict())
    assert OperatingCurve.from_dict(json.loads(text)) == curve
    assert len(curve.positives) == len(curve.negatives) == MAX_QUANTILES
    assert (curve.n_positive + curve.n_negative, curve.n_groups) == (5_000, 12)
    assert len(text) < 6_000


def test_a_precision_that_the_curve_does_not_reach_is_refused():
    labels = [True, False, True, False]
    with pytest.raises(CryoFilterError, match=r"precision is 0\.6667, at a recall of 1\.0000"):
        curve_of(labels, [0.4, 0.9, 0.5, 0.1]).threshold(ThresholdRequest("precision", 0.9))


def test_a_curve_answers_for_scores_but_not_for_shares_and_numbers():
    curve = OperatingCurve.from_scores(*made_set(100))
    assert curve.threshold(ThresholdRequest("score", 0.3)) == 0.3
    for request in (ThresholdRequest("keep", 0.5), ThresholdRequest("count", 5)):
        with pytest.raises(CryoFilterError, match="needs the particles' scores"):
            curve.threshold(request)


def test_a_curve_without_a_class_says_so_when_it_is_asked():
    curve = curve_of([False, False], [0.1, 0.2])
    assert np.isnan(curve.recall_at(0.1))
    assert curve.precision_at(0.1) == 0
    with pytest.raises(CryoFilterError, match="0 good and 2 bad"):
        curve.threshold(ThresholdRequest("recall", 0.9))


@pytest.mark.parametrize(
    "change",
    [{"positives": [0.5, 0.4]}, {"positives": [0.5, 1.4]}, {"positives": []}, {"positives": None},
     {"negatives": [0.1] * 202}, {"negatives": [float("nan")]}, {"negatives": ["bad"]},
     {"n_positive": 1}, {"n_groups": "many"}],
)  # fmt: skip
def test_a_damaged_curve_is_refused(change):
    data = {
        "positives": [0.4, 0.5], "negatives": [0.1, 0.2],
        "n_positive": 2, "n_negative": 300, "n_groups": 3,
    }  # fmt: skip
    OperatingCurve.from_dict(data)
    with pytest.raises(ModelError, match="operating curve"):
        OperatingCurve.from_dict(data | change)


def test_the_interval_of_a_share_is_wilsons():
    value, low, high = share_interval(0.95, 100)
    assert (round(low, 3), value, round(high, 3)) == (0.888, 0.95, 0.978)
    assert share_interval(1.0, 10).high == 1.0


@pytest.mark.slow
def test_further_good_particles_steady_the_recall_and_leave_the_counts():
    """A recall from 40 good particles varies; with 400 more of the same kind it hardly does."""
    rng = np.random.default_rng(0)
    request = ThresholdRequest("recall", 0.95)
    spread = {}
    for count in (0, 400):
        found = []
        for _ in range(30):
            labels = np.arange(80) % 2 == 0
            scores = np.clip(rng.normal(0.3 + 0.3 * labels, 0.1), 0, 1)
            more = np.clip(rng.normal(0.6, 0.1, count), 0, 1)
            curve = OperatingCurve.from_scores(labels, scores, np.arange(80), more)
            assert (curve.n_positive, curve.n_negative) == (40, 40)
            assert OperatingCurve.from_dict(curve.to_dict()) == curve
            found.append(curve.threshold(request))
        spread[count] = np.std(found)
    assert spread[400] < 0.6 * spread[0]

"""Wrong labels: how many there are, and what scores say of the particles behind them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.nn.label_noise import (
    Shares,
    calibrate,
    curve_behind,
    estimate,
    measure_label_noise,
    threshold_behind,
)
from relion_cryofilter.thresholds import OperatingCurve, choose_threshold

RECALL, PRECISION = ThresholdRequest("recall", 0.95), ThresholdRequest("precision", 0.9)


def drawn(n=4000, flipped=0.1, seed=0, distance=2.5):
    """Return scores from 0 to 1, labels of which a share is flipped, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.5
    logits = rng.normal(np.where(truth, distance / 2, -distance / 2), 1)
    labels = truth ^ (rng.random(n) < flipped)
    return np.round(1 / (1 + np.exp(-logits)), 6), labels, truth


@pytest.mark.parametrize("flipped", [0.1, 0.2])
def test_flipped_labels_are_counted(flipped):
    for seed in range(3):
        scores, labels, _ = drawn(flipped=flipped, seed=seed)
        assert estimate(scores, labels) == pytest.approx((flipped, flipped), abs=0.07)


def test_correct_labels_are_not_called_wrong():
    for seed in range(5):
        scores, labels, _ = drawn(flipped=0, seed=seed)
        assert max(estimate(scores, labels)) < 0.03


def test_a_recall_is_that_of_the_particles_behind_the_labels():
    scores, labels, truth = drawn(n=8000)
    shares = estimate(scores, labels)
    plain = choose_threshold(RECALL, scores, labels)
    behind = threshold_behind(RECALL, scores, labels, shares)
    assert (scores >= plain)[truth].mean() > 0.985
    assert (scores >= behind)[truth].mean() == pytest.approx(0.95, abs=0.015)
    precise = threshold_behind(PRECISION, scores, labels, shares)
    assert truth[scores >= precise].mean() == pytest.approx(0.9, abs=0.03)
    scores, labels, _ = drawn(distance=0)
    with pytest.raises(CryoFilterError, match="best precision of the particles behind"):
        threshold_behind(ThresholdRequest("precision", 0.999), scores, labels, Shares(0.01, 0.01))


def test_without_wrong_labels_thresholds_are_the_plain_ones():
    scores, labels, _ = drawn(n=500)
    for request in (RECALL, PRECISION, ThresholdRequest("keep", 0.3)):
        expected = choose_threshold(request, scores, labels)
        assert threshold_behind(request, scores, labels, Shares()) == expected
    plain = OperatingCurve.from_scores(labels, scores, np.arange(500))
    assert curve_behind(scores, labels, np.arange(500), Shares()) == plain


def test_the_curve_of_a_model_is_of_the_particles_behind_the_labels():
    scores, labels, truth = drawn(n=8000)
    curve = curve_behind(scores, labels, np.arange(8000) % 40, Shares(0.1, 0.1))
    assert curve.n_positive == pytest.approx(truth.sum(), rel=0.05)
    assert curve.n_groups == 40
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        accepted = scores >= threshold
        assert curve.recall_at(threshold) == pytest.approx(accepted[truth].mean(), abs=0.02)
        assert curve.precision_at(threshold) == pytest.approx(truth[accepted].mean(), abs=0.02)
    again = OperatingCurve.from_dict(curve.to_dict())
    assert again.threshold(RECALL) == pytest.approx(
        threshold_behind(RECALL, scores, labels, Shares(0.1, 0.1)), abs=0.01
    )


def test_scores_are_calibrated_for_the_truth():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-logits - 0.5))
    labels = truth ^ (rng.random(20_000) < 0.1)
    good, bad = (float((truth[labels == kind] != kind).mean()) for kind in (True, False))
    temperature, shift = calibrate(3 * logits, labels, Shares(good, bad))
    assert temperature == pytest.approx(3, rel=0.1)
    assert shift == pytest.approx(0.5, abs=0.1)


def test_the_auc_of_the_particles_behind_is_told():
    scores, labels, truth = drawn(n=8000, flipped=0.15)
    found = Shares(0.15, 0.15).auc(roc_auc_score(labels, scores))
    assert found == pytest.approx(roc_auc_score(truth, scores), abs=0.015)


def test_intervals_hold_the_share_and_are_said():
    scores, labels, _ = drawn(n=3000)
    noise = measure_label_noise(scores, labels, np.arange(3000) % 30, 0)
    assert noise.junk_among_good.low <= 0.1 <= noise.junk_among_good.high
    for share in (noise.junk_among_good, noise.good_among_bad):
        assert share.low < share.value < share.high < share.low + 0.12
    assert noise.corrects
    assert f"about {100 * noise.junk_among_good.value:.0f} % [" in noise.describe()


def test_one_micrograph_has_no_interval():
    scores, labels, _ = drawn(n=3000)
    noise = measure_label_noise(scores, labels, np.zeros(3000, int), 0)
    assert noise.corrects
    assert "[" not in noise.describe()
    assert noise.to_dict()["junk_among_good"] == [noise.junk_among_good.value, None, None]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (drawn(n=80), "too few"),
        (drawn(distance=0.2), "hardly tell the labels apart"),
    ],
)
def test_where_nothing_can_be_told_labels_are_true_and_it_is_said(made, reason):
    scores, labels, _ = made
    noise = measure_label_noise(scores, labels, np.arange(len(labels)), 0)
    assert noise.shares == Shares()
    assert not noise.corrects
    assert reason in noise.describe()
    assert "taken as true" in noise.describe()

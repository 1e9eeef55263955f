"""Metrics are scikit-learn's; intervals know that images of one micrograph belong together."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from making import made_set
from sklearn.calibration import calibration_curve

from relion_cryofilter import evaluation
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.evaluation import METRICS, curves, evaluate
from relion_cryofilter.thresholds import Interval

THRESHOLD = 0.4


def by_scikit_learn(labels, scores, weights=None):
    """Return the metrics in the order of `METRICS`, each from scikit-learn or its definition."""
    weights = np.ones(len(labels)) if weights is None else weights
    kwargs = {"sample_weight": weights}
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False, **kwargs)
    accepted = scores >= THRESHOLD
    bins = np.searchsorted(np.linspace(0, 1, 16)[1:-1], scores)
    ece = sum(
        abs(np.sum((weights * (scores - labels))[bins == number])) for number in range(15)
    ) / np.sum(weights)  # fmt: skip
    return [
        sk.roc_auc_score(labels, scores, **kwargs),
        sk.average_precision_score(labels, scores, **kwargs),
        fpr[tpr >= 0.95].min(),
        ece,
        sk.accuracy_score(labels, accepted, **kwargs),
        sk.recall_score(labels, accepted, **kwargs),
        sk.recall_score(~labels, ~accepted, **kwargs),
        sk.precision_score(labels, accepted, **kwargs),
    ]


def values_of(evaluation):
    return [getattr(evaluation, name).value for name in METRICS]


def test_the_metrics_are_those_of_scikit_learn():
    labels, scores, groups = made_set()
    evaluation = evaluate(labels, scores, groups, THRESHOLD, resamples=5)
    assert values_of(evaluation) == pytest.approx(by_scikit_learn(labels, scores))
    accepted = scores >= THRESHOLD
    assert evaluation.confusion == tuple(map(tuple, sk.confusion_matrix(labels, accepted)))
    assert (evaluation.n, evaluation.n_groups) == (600, 12)
    assert evaluation.n_positive == labels.sum() == 600 - evaluation.n_negative


def test_ece_is_made_of_the_bins_of_scikit_learns_calibration_curve():
    labels, scores, _ = made_set()
    drawn = curves(labels, scores)
    fraction, score = calibration_curve(labels, scores, n_bins=15)
    assert drawn.bin_fraction == pytest.approx(fraction)
    assert drawn.bin_score == pytest.approx(score)
    assert drawn.bin_count.sum() == 600


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 8))
def test_a_resample_gives_what_scikit_learn_gives_with_sample_weight(seed, decimals, n_groups):
    labels, scores, groups = made_set(80, n_groups, seed)
    scores = np.round(scores, decimals)  # few decimals make ties
    drawn = np.random.default_rng(seed).integers(0, 4, size=n_groups)
    weights = drawn[groups].astype(float)
    if not 0 < weights @ labels < weights.sum() or not weights[scores >= THRESHOLD].any():
        return
    ranked = evaluation._rank(labels, scores, groups, int(np.sum(scores >= THRESHOLD)))
    found = evaluation._weighted_metrics(ranked, drawn[ranked.groups].astype(float))
    assert found == pytest.approx(by_scikit_learn(labels, scores, weights), abs=1e-12)


def test_a_micrograph_drawn_twice_counts_as_two_micrographs():
    labels, scores, groups = made_set(200, 4)
    rows = np.concatenate([np.flatnonzero(groups == group) for group in (0, 0, 1, 3)])
    weights = np.array([2.0, 1, 0, 1])
    ranked = evaluation._rank(labels, scores, groups, int(np.sum(scores >= THRESHOLD)))
    copied = by_scikit_learn(labels[rows], scores[rows])
    assert evaluation._weighted_metrics(ranked, weights[ranked.groups]) == pytest.approx(copied)


@pytest.mark.slow
def test_intervals_are_the_percentiles_of_resampled_micrographs():
    labels, scores, groups = made_set(400, 10)
    evaluation = evaluate(labels, scores, groups, THRESHOLD, seed=3, resamples=1000)
    rng = np.random.default_rng(77)
    drawn = []
    for _ in range(1000):
        counts = np.bincount(rng.integers(10, size=10), minlength=10)
        drawn.append(by_scikit_learn(labels, scores, counts[groups].astype(float)))
    low, high = np.percentile(drawn, [0.9, 99.1], axis=0)  # 2.5 and 97.5, expanded for 10
    for name, expected_low, expected_high in zip(METRICS, low, high):
        interval = getattr(evaluation, name)
        width = expected_high - expected_low
        assert interval.low == pytest.approx(expected_low, abs=0.25 * width), name
        assert interval.high == pytest.approx(expected_high, abs=0.25 * width), name


@pytest.mark.parametrize(("n_groups", "percent"), [(2, 0.0), (12, 1.08), (100_000, 2.5)])
def test_percentiles_are_expanded_where_micrographs_are_few(n_groups, percent):
    assert 100 * evaluation.expanded_tail(n_groups) == pytest.approx(percent, abs=0.005)


@pytest.mark.slow
def test_the_auc_interval_covers_the_truth_though_images_of_a_micrograph_are_alike():
    truth = sk.roc_auc_score(*made_set(400_000, 20_000, seed=1, spread=1.5)[:2])
    covered = naive = 0
    for seed in range(100):
        labels, scores, groups = made_set(600, 12, seed=100 + seed, spread=1.5)
        auc = evaluate(labels, scores, groups, 0.5, resamples=200, seed=seed).auc
        covered += auc.low <= truth <= auc.high
        auc = evaluate(labels, scores, np.arange(600), 0.5, resamples=200, seed=seed).auc
        naive += auc.low <= truth <= auc.high
    assert covered >= 85
    assert naive < 75  # what images drawn one by one would promise


def test_the_same_seed_gives_the_same_intervals():
    labelled = made_set()
    first, again = (evaluate(*labelled, THRESHOLD, seed=5, resamples=50) for _ in range(2))
    other = evaluate(*labelled, THRESHOLD, seed=6, resamples=50)
    assert first == again
    assert first.auc != other.auc


def test_numbers_of_micrographs_need_not_be_consecutive():
    labels, scores, groups = made_set()
    renamed = groups * 1000 - 7
    kwargs = {"resamples": 30}
    assert evaluate(labels, scores, groups, 0.5, **kwargs) == evaluate(
        labels, scores, renamed, 0.5, **kwargs
    )


def test_a_large_set_is_measured_in_seconds_with_fewer_resamples(monkeypatch):
    labels, scores, groups = made_set(20_000, 100)
    start = time.process_time()
    assert evaluate(labels, scores, groups, 0.5).resamples == 1000
    assert time.process_time() - start < 20
    monkeypatch.setattr(evaluation, "MAX_DRAWN_IMAGES", 20_000 * 300)
    assert evaluate(labels, scores, groups, 0.5).resamples == 300
    monkeypatch.setattr(evaluation, "MAX_DRAWN_IMAGES", 1)
    assert evaluate(labels, scores, groups, 0.5).resamples == evaluation.FEWEST_RESAMPLES
    assert evaluate(labels, scores, groups, 0.5, resamples=20).resamples == 20


def test_resamples_that_lack_a_class_are_left_out_and_counted():
    labels = np.array([True, True, False, False, True])
    evaluation = evaluate(
        labels, [0.9, 0.8, 0.2, 0.4, 0.3], [0, 0, 1, 1, 2], 0.5, resamples=500
    )  # fmt: skip
    assert evaluation.resamples + evaluation.skipped == 500
    assert evaluation.skipped == pytest.approx(500 * 9 / 27, abs=60)  # 8 without 1, 1 only 1
    assert f"{evaluation.skipped} more lacked a class and were left out" in evaluation.summary()
    assert "may be too narrow" in evaluation.summary()


@pytest.mark.parametrize(("good", "missing"), [(True, "bad"), (False, "good")])
def test_one_class_leaves_undefined_what_needs_two(good, missing):
    evaluation = evaluate([good] * 4, [0.1, 0.6, 0.7, 0.9], [0, 0, 1, 1], 0.5)
    for name in ("auc", "average_precision", "fpr_at_95_recall"):
        assert np.isnan(getattr(evaluation, name)).all()
    assert evaluation.accuracy.value == (0.75 if good else 0.25)
    assert np.isnan(evaluation.specificity.value if good else evaluation.sensitivity.value)
    assert np.isnan(evaluation.ece.low)
    assert evaluation.resamples == 0
    assert f"No intervals: there are no {missing} images" in evaluation.summary()
    assert "Auc: undefined" in evaluation.summary()


def test_one_micrograph_gives_values_without_intervals():
    labels, scores, groups = made_set(100, 1)
    evaluation = evaluate(labels, scores, groups, 0.5)
    assert values_of(evaluation)[0] == pytest.approx(sk.roc_auc_score(labels, scores))
    assert np.isnan([evaluation.auc.low, evaluation.auc.high]).all()
    assert "all images come from one micrograph" in evaluation.summary()


def test_precision_is_undefined_if_nothing_is_accepted():
    evaluation = evaluate(*made_set(), 1.0, resamples=10)
    assert np.isnan(evaluation.precision).all()
    assert evaluation.sensitivity == Interval(0, 0, 0)


def test_scores_of_float32_meet_their_threshold():
    scores = np.array([0.9, 0.1], np.float32)
    assert evaluate([True, False], scores, [0, 1], 0.9).confusion == ((1, 0), (0, 1))


def test_the_summary_says_each_figure_once_in_the_order_of_2020():
    evaluation = evaluate(*made_set(), THRESHOLD, resamples=50)
    lines = evaluation.summary().splitlines()
    (tn, fp), (fn, tp) = evaluation.confusion
    assert lines[0] == f"Auc: {evaluation.auc}"
    assert lines[1] == "CM:"
    assert " ".join(lines[2:4]).replace("[", "").replace("]", "").split() == [
        str(count) for count in (tn, fp, fn, tp)
    ]
    for line, value in zip(lines[4:7], ((tp + tn) / 600, tn / (tn + fp), tp / (tp + fn))):
        assert line.split()[1] == f"{value:.3f}"
    assert [line.partition(":")[0] for line in lines[4:11]] == [
        "Acc", "Specificity", "Sensitivity", "Precision", "Average precision",
        "FPR at 95 % recall", "ECE",
    ]  # fmt: skip
    for name in METRICS:
        assert evaluation.summary().count(f": {getattr(evaluation, name)}\n") == 1
    assert len(lines) == 13
    assert lines[-1].startswith("[95 % intervals: 50 bootstrap resamples of 12 micrographs; with")


def test_an_interval_prints_as_people_write_it():
    assert str(Interval(0.9121, 0.8941, 0.9309)) == "0.912 [0.894, 0.931]"
    assert str(Interval(0.5, np.nan, np.nan)) == "0.500"
    assert str(Interval(np.nan, np.nan, np.nan)) == "undefined"


def test_an_evaluation_goes_to_json_with_null_for_the_undefined():
    data = json.loads(json.dumps(evaluate([True], [0.9], [0], 0.5).to_dict(), allow_nan=False))
    assert data["auc"] == {"value": None, "low": None, "high": None}
    assert data["accuracy"] == {"value": 1, "low": None, "high": None}
    assert data["confusion"] == [[0, 0], [0, 1]]
    assert (data["n"], data["threshold"], data["resamples"], data["skipped"]) == (1, 0.5, 0, 0)


def test_curves_are_those_of_scikit_learn_where_they_are_short():
    labels, scores, _ = made_set()
    drawn = curves(labels, scores)
    assert np.array_equal([drawn.fpr, drawn.tpr], sk.roc_curve(labels, scores)[:2])
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    assert np.array_equal([drawn.precision, drawn.recall], [precision, recall])


def test_long_curves_are_thinned_and_keep_their_ends_and_areas():
    labels, scores, _ = made_set(50_000)
    drawn = curves(labels, scores)
    assert max(len(drawn.fpr), len(drawn.recall)) <= evaluation.MAX_POINTS
    assert (drawn.fpr[0], drawn.tpr[0], drawn.fpr[-1], drawn.tpr[-1]) == (0, 0, 1, 1)
    assert (drawn.recall[0], drawn.recall[-1], drawn.precision[-1]) == (1, 0, 1)
    assert sk.auc(drawn.fpr, drawn.tpr) == pytest.approx(
        sk.roc_auc_score(labels, scores), abs=1e-3
    )  # fmt: skip


def test_curves_of_one_class_are_empty_but_the_bins_are_there():
    drawn = curves([True, True], [0.2, 0.9])
    assert len(drawn.fpr) == len(drawn.recall) == 0
    assert drawn.bin_count.tolist() == [1, 1]


@pytest.mark.parametrize("function", [curves, lambda y, s: evaluate(y, s, np.zeros(len(s)), 0.5)])
def test_what_can_not_be_measured_is_refused(function):
    with pytest.raises(CryoFilterError, match="no labelled images"):
        function([], [])
    with pytest.raises(CryoFilterError, match="1 of 2 scores are not numbers"):
        function([True, False], [0.5, np.nan])
    with pytest.raises(ValueError, match="expected"):
        function([True, False, True], [0.5, 0.6])


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 labels, but 3 groups"):
        evaluate([True, False], [0.5, 0.6], [0, 1, 1], 0.5)


@pytest.mark.parametrize(("n_groups", "warned"), [(2, True), (40, False)])
def test_the_headline_warns_of_few_micrographs(n_groups, warned):
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.5
    scores = np.clip(0.3 * labels + 0.7 * rng.random(400), 0, 1)
    headline = evaluate(labels, scores, np.arange(400) % n_groups, 0.5).headline()
    assert headline.startswith("AUC 0.")
    assert ("From 2 micrographs only" in headline) is warned

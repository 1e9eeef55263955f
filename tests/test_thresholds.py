"""A threshold does what was asked for, on the scores as they are and as files hold them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from relion_cryofilter.errors import CryoFilterError, ModelError, UsageError
from relion_cryofilter.results.thresholds import (
    MAX_QUANTILES,
    OperatingCurve,
    ThresholdRequest,
    choose_threshold,
)

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


def ask(text, scores, labels=None):
    return choose_threshold(ThresholdRequest.parse(text), scores, labels)


@pytest.mark.parametrize(
    ("text", "kind", "value", "canonical"),
    [
        ("0.6", "score", 0.6, "0.6"),
        (" .25 ", "score", 0.25, "0.25"),
        ("0", "score", 0, "0"),
        ("1.0", "score", 1, "1"),
        ("1e-3", "score", 0.001, "0.001"),
        ("2020", "score", 0.5, "0.5"),
        ("recall=0.95", "recall", 0.95, "recall=0.95"),
        ("recall = 1", "recall", 1, "recall=1"),
        ("precision=0.9", "precision", 0.9, "precision=0.9"),
        ("precision=90 %", "precision", 0.9, "precision=0.9"),
        ("keep=0.6", "keep", 0.6, "keep=0.6"),
        ("keep=60%", "keep", 0.6, "keep=0.6"),
        ("keep =14.3%", "keep", 0.143, "keep=0.143"),
        ("count=50000", "count", 50000, "count=50000"),
        ("count= 50,000", "count", 50000, "count=50000"),
    ],
)
def test_a_request_is_read_as_users_write_it(text, kind, value, canonical):
    request = ThresholdRequest.parse(text)
    assert (request.kind, request.value) == (kind, value)
    assert str(request) == canonical


@unhurried
@given(st.sampled_from(["score", "recall", "precision", "keep"]), fractions)
def test_the_text_of_a_request_reads_back_as_the_same_request(kind, value):
    request = ThresholdRequest(kind, value)
    assert ThresholdRequest.parse(str(request)) == request


@pytest.mark.parametrize(
    "text",
    ["", "good", "nan", "inf", "-0.1", "1.5", "60%", "2021", "recal=0.9", "score=0.6", "=0.6",
     "recall", "recall=", "recall=0", "recall=1.01", "recall=95", "recall=0.9=0.8", "precision=x",
     "precision=0,9", "keep=60", "keep=0%", "keep=101%", "keep=nan", "count=0", "count=1.5",
     "count=50%", "count=50,00", "count=1e3", "count=" + "9" * 400, "0.6 0.7", "٠.٦"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_forms(text):
    with pytest.raises(UsageError, match="not understood") as caught:
        ThresholdRequest.parse(text)
    message = str(caught.value)
    assert text.partition("=")[0] in message
    for form in ("0.6", "2020", "recall=0.95", "precision=0.9", "keep=60%", "count=50000"):
        assert form in message


@pytest.mark.parametrize(("kind", "value"), [("f1", 0.5), ("score", -1), ("keep", float("nan"))])
def test_a_request_made_without_text_is_checked_too(kind, value):
    with pytest.raises(UsageError, match=kind):
        ThresholdRequest(kind, value)


def test_reading_a_request_does_not_wait_for_numpy():
    code = (
        "import sys; from relion_cryofilter.results.thresholds import ThresholdRequest;"
        "ThresholdRequest.parse('keep=60%'); assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@unhurried
@given(scored_sets(), fractions)
def test_recall_is_reached_and_no_higher_threshold_reaches_it(labelled, value):
    labels, scores = labelled
    threshold = choose_threshold(ThresholdRequest("recall", value), scores, labels)
    assert has_six_decimals(threshold)
    for known in as_given_and_as_filed(scores):
        assert np.mean(known[labels] >= threshold) >= value
    assert np.mean(scores[labels] >= round(threshold + 1e-6, 6)) < value


@unhurried
@given(scored_sets(), fractions)
def test_precision_is_reached_or_the_best_is_named(labelled, value):
    labels, scores = labelled
    try:
        threshold = choose_threshold(ThresholdRequest("precision", value), scores, labels)
    except CryoFilterError as error:
        assert f"precision={value!r}".removesuffix(".0") in str(error)  # noqa: PT017
        return
    assert has_six_decimals(threshold)
    for known in as_given_and_as_filed(scores):
        assert labels[known >= threshold].mean() >= value


@unhurried
@given(scored_sets(), fractions)
def test_precision_of_filed_scores_is_as_scikit_learn_finds_it(labelled, value):
    labels, scores = labelled
    scores = np.round(scores.astype(float), 6)
    precisions, recalls, thresholds = precision_recall_curve(labels, scores)
    request = ThresholdRequest("precision", value)
    reached = precisions[:-1] >= value
    if reached.any():
        assert choose_threshold(request, scores, labels) == thresholds[reached][0]
    else:
        best = np.argmax(precisions[:-1])
        found = rf"best precision is {precisions[best]:.4f}, at a recall of {recalls[best]:.4f}"
        with pytest.raises(CryoFilterError, match=found):
            choose_threshold(request, scores, labels)


@unhurried
@given(scored_sets(), fractions)
def test_the_share_asked_for_is_kept_and_not_one_particle_more_but_ties(labelled, value):
    scores = labelled[1]
    threshold = choose_threshold(ThresholdRequest("keep", value), scores)
    assert has_six_decimals(threshold)
    for known in as_given_and_as_filed(scores):
        assert np.mean(known >= threshold) >= value
    assert np.mean(scores >= round(threshold + 1e-6, 6)) < value


@unhurried
@given(scored_sets(), st.integers(1, 80))
def test_the_number_asked_for_is_accepted_and_not_one_more_but_ties(labelled, number):
    scores = labelled[1]
    threshold = choose_threshold(ThresholdRequest("count", number), scores)
    assert has_six_decimals(threshold)
    for known in as_given_and_as_filed(scores):
        assert np.sum(known >= threshold) >= min(number, len(scores))
    assert np.sum(scores >= round(threshold + 1e-6, 6)) < number


def test_scores_that_differ_in_six_decimals_give_exact_numbers():
    scores = np.random.default_rng(0).permutation(10_000) / 1e6
    assert np.sum(scores >= ask("keep=0.07", scores)) == 700
    assert np.sum(scores >= ask("count=1,234", scores)) == 1234


def test_a_count_above_the_number_of_particles_accepts_all():
    assert ask("count=50000", [0.2, 0.9, 0.4]) == 0.2


def test_a_score_is_taken_as_it_is_up_to_six_decimals():
    assert [ask(text, []) for text in ("0", "0.6", "1", "2020")] == [0, 0.6, 1, 0.5]
    assert ask("0.1234561", []) == 0.123457


@pytest.mark.parametrize("text", ["recall=0.9", "precision=0.9"])
def test_recall_and_precision_need_labels(text):
    with pytest.raises(CryoFilterError, match=rf"{text} .* labelled set.* trained model"):
        ask(text, [0.1, 0.9])


@pytest.mark.parametrize(
    ("text", "labels"),
    [("recall=0.9", [False, False]), ("precision=0.9", [True, True])],
)
def test_a_class_that_is_missing_is_named_with_counts(text, labels):
    match = r"2 good and 0 bad" if labels[0] else r"0 good and 2 bad"
    with pytest.raises(CryoFilterError, match=match):
        ask(text, [0.1, 0.9], labels)


def test_scores_that_are_missing_or_no_numbers_are_refused():
    with pytest.raises(CryoFilterError, match="no scores"):
        ask("keep=0.5", [])
    with pytest.raises(CryoFilterError, match="1 of 2 scores"):
        ask("keep=0.5", [0.5, np.nan])
    with pytest.raises(ValueError, match="labels"):
        ask("recall=0.5", [0.5, 0.6], [True])


def made_set(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.6
    logits = np.where(labels, 1.5, -1.5) + 1.5 * rng.normal(size=n)
    scores = np.round(1 / (1 + np.exp(-4 * logits)), 6)  # many at 0 and 1
    return labels, scores, rng.integers(12, size=n)


def curve_of(labels, scores):
    return OperatingCurve.from_scores(labels, scores, np.zeros(len(labels), int))


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

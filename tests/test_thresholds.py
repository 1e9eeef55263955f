"""A threshold does what was asked for, on the scores as they are and as files hold them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import as_given_and_as_filed, fractions, has_six_decimals, scored_sets, unhurried
from sklearn.metrics import precision_recall_curve

from relion_cryofilter.errors import CryoFilterError, UsageError
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.thresholds import Mixture, OperatingCurve, choose_threshold


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
        "import sys; from relion_cryofilter.kinds import ThresholdRequest;"
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


def two_kinds(apart, n=4000, share=0.4, seed=0):
    """Scores (n,) whose logits are normal about two means, and which are of the upper kind."""
    rng = np.random.default_rng(seed)
    upper = rng.random(n) < share
    return 1 / (1 + np.exp(-(rng.normal(size=n) + apart * (upper - 0.5)))), upper


def test_a_mixture_finds_the_valley_between_two_kinds_without_labels():
    scores, upper = two_kinds(apart=5)
    threshold = ask("gmm", scores)
    assert has_six_decimals(threshold)
    # Where both kinds are as likely: logit log(.6 / .4) / 5.
    assert np.log(threshold / (1 - threshold)) == pytest.approx(np.log(1.5) / 5, abs=0.15)
    assert ((scores >= threshold) == upper).mean() > 0.98
    found = Mixture.fit(scores)
    assert found.shares == pytest.approx((0.6, 0.4), abs=0.03)
    assert found.means == pytest.approx((-2.5, 2.5), abs=0.1)
    said = found.describe()
    assert said.startswith("two components of 60% and 40%")
    wrong = [float(word.rstrip("%")) for word in said.split() if "." in word]
    assert wrong == pytest.approx([0.5, 0.9], abs=0.4)


@pytest.mark.parametrize("apart", [0, 1])
def test_one_hump_of_scores_has_no_threshold_of_its_own(apart):
    with pytest.raises(CryoFilterError, match=r"one component .* keep=0\.6"):
        ask("gmm", two_kinds(apart)[0])
    with pytest.raises(CryoFilterError, match="one component"):
        ask("gmm", two_kinds(5, share=0.005)[0])
    with pytest.raises(CryoFilterError, match="100 scored particles"):
        ask("gmm", two_kinds(5, n=50)[0])


def test_images_that_could_not_be_scored_are_no_kind_of_their_own():
    scores, _ = two_kinds(apart=5)
    assert ask("gmm", np.append(scores, np.zeros(3000))) == ask("gmm", scores)
    with pytest.raises(CryoFilterError, match="one component"):
        ask("gmm", np.append(two_kinds(0)[0], np.zeros(3000)))


def test_balanced_loses_and_lets_pass_the_least_in_sum():
    scores, upper = two_kinds(apart=2, share=0.1)
    threshold = ask("balanced", scores, upper)
    assert has_six_decimals(threshold)

    def gain(cut):
        return (scores[upper] >= cut).mean() - (scores[~upper] >= cut).mean()

    assert gain(threshold) >= max(map(gain, scores)) - 1e-9
    assert threshold == pytest.approx(0.5, abs=0.15)  # whatever the shares of the two kinds
    curve = OperatingCurve.from_scores(upper, scores, np.zeros(len(scores), int))
    assert gain(curve.threshold(ThresholdRequest.parse("balanced"))) > gain(threshold) - 0.02
    # Of equals the highest: here all between the two kinds.
    assert ask("balanced", [0.1, 0.2, 0.7, 0.9], [False, False, True, True]) == 0.7
    with pytest.raises(CryoFilterError, match="which particles are good"):
        ask("balanced", scores)
    with pytest.raises(CryoFilterError, match="0 bad"):
        ask("balanced", [0.5], [True])


@pytest.mark.parametrize("name", ["gmm", "balanced"])
def test_some_requests_are_asked_for_by_name_alone(name):
    assert str(ThresholdRequest.parse(f" {name} ")) == name
    for text in (f"{name}=0.5", f"{name}="):
        with pytest.raises(UsageError, match="without a number"):
            ThresholdRequest.parse(text)

"""The self-tests of a training raise the alarm for leaks, and only for them."""

from __future__ import annotations

import numpy as np
import pytest

from relion_cryofilter.images.small_images import _background
from relion_cryofilter.nn.selftests import (
    baseline_test,
    copies_test,
    evidence_test,
    leak_tests,
    noise_test,
    permutation_test,
    split_test,
)
from relion_cryofilter.simulate import simulate_images


def statistics(images):
    outside = _background(*images.shape[1:]).numpy()
    return {
        "image mean": images.mean(axis=(1, 2)),
        "image sigma": images.std(axis=(1, 2)),
        "background mean": images[:, outside].mean(axis=1),
        "background sigma": images[:, outside].std(axis=1),
        "box size": np.full(len(images), images.shape[1]),
        "pixel size": np.full(len(images), 3.0),
    }


@pytest.fixture(scope="module", params=[0.05, 0.5])
def simulated(request):
    images, labels, _, micrographs = simulate_images(3, 600, snr=request.param)
    return images, np.asarray(labels).astype(bool), np.asarray(micrographs)


def alarms(images, labels, origin):
    tests = leak_tests(statistics(images), labels, origin)
    return {test.name for test in tests if not test.passed}


def test_a_clean_set_raises_no_alarm(simulated):
    assert not alarms(*simulated)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.7, 0.97, 1.03, 1.1, 1.5])
def test_negatives_scaled_differently_raise_the_alarm(simulated, scale):
    images, labels, origin = simulated
    leaky = np.where(labels[:, None, None], images, images * scale)
    assert "background sigma" in alarms(leaky, labels, origin)


@pytest.mark.parametrize("offset", [0.05, 0.8])
def test_negatives_with_an_offset_raise_the_alarm(simulated, offset):
    images, labels, origin = simulated
    leaky = np.where(labels[:, None, None], images, images + offset)
    assert "background mean" in alarms(leaky, labels, origin)


def test_one_class_normalised_as_whole_images_raises_the_alarm(simulated):
    images, labels, origin = simulated
    whole = images / images.std(axis=(1, 2), keepdims=True)
    leaky = np.where(labels[:, None, None], images, whole)
    assert "image sigma" in alarms(leaky, labels, origin)


def test_whole_images_normalised_alike_raise_no_alarm(simulated):
    images, labels, origin = simulated
    whole = images - images.mean(axis=(1, 2), keepdims=True)
    assert not alarms(whole / whole.std(axis=(1, 2), keepdims=True), labels, origin)


def test_files_of_one_kind_only_raise_the_alarm(simulated):
    images, labels, _ = simulated
    assert alarms(images, labels, labels.astype(int)) == {"file of origin"}


def test_different_boxes_raise_the_alarm(simulated):
    images, labels, origin = simulated
    numbers = {**statistics(images), "box size": np.where(labels, 64, 96)}
    tests = {test.name: test for test in leak_tests(numbers, labels, origin)}
    assert not tests["box size"].passed
    assert "Extract both in one job" in str(tests["box size"])
    numbers = {**statistics(images), "pixel size": np.where(labels, 4.0, 3.0)}
    assert not leak_tests(numbers, labels, origin)[-2].passed


def test_permuted_labels_are_at_chance_unless_images_are_on_both_sides():
    rng = np.random.default_rng(0)
    small = rng.normal(size=(800, 100)).astype(np.float32)
    labels = rng.random(800) < 0.5
    train, test, identity = np.arange(400), np.arange(400, 800), np.arange(800)
    assert permutation_test(small, labels, identity, train, test, 0).passed
    assert copies_test(identity, [(train, test)]).passed
    small[400:], identity[400:] = small[:400], identity[:400]
    doubled = permutation_test(small, labels, identity, train, test, 0)
    assert not doubled.passed
    assert "the same images are on both sides" in doubled.finding
    assert "400 images outside the training part are copies" in str(
        copies_test(identity, [(train, test)])
    )


def test_too_few_of_a_kind_in_a_part_raise_the_alarm():
    labels = np.arange(100) < 5
    parts = {"training": np.arange(0, 100, 2), "test": np.arange(1, 100, 2)}
    test = evidence_test(parts, labels)
    assert not test.passed
    assert "the test holds 2 good particles: too few" in test.finding
    assert evidence_test(parts, np.arange(100) % 4 < 2).passed


def test_accepted_noise_and_shared_micrographs_raise_the_alarm():
    assert noise_test(np.linspace(0, 0.4, 1000), 0.5).passed
    assert not noise_test(np.linspace(0, 0.6, 1000), 0.5).passed
    groups = np.array([0, 0, 1, 1, 2, 2])
    clean = {"training": np.array([0, 1]), "test": np.array([2, 3, 4, 5])}
    assert split_test(clean, groups, "micrograph").passed
    mixed = {"training": np.array([0, 2]), "test": np.array([1, 3, 4, 5])}
    assert "2 micrographs on two sides" in split_test(mixed, groups, "micrograph").finding


def test_a_network_is_held_against_a_linear_baseline_on_the_same_particles():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2 == 0
    features = labels[:, None] + rng.normal(size=(400, 3))
    halves = np.arange(200), np.arange(200, 400)
    sides = [halves, halves[::-1]]
    better = baseline_test(features, labels, labels + rng.normal(0, 0.1, 400), sides)
    assert better.passed
    assert "the network 1.000" in better.finding
    worse = baseline_test(features, labels, rng.normal(size=400), sides)
    assert not worse.passed
    assert "size or brightness alone" in worse.finding
    # Rows that nothing has scored are not compared.
    unmeasured = np.where(np.arange(400) < 200, np.nan, labels + rng.normal(0, 0.1, 400))
    assert baseline_test(features, labels, unmeasured, sides[:1]).passed

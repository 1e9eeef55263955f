"""The self-tests of a training raise the alarm for leaks, and only for them."""

from __future__ import annotations

import numpy as np
import pytest

from relion_cryofilter.data.simulate import simulate_images
from relion_cryofilter.nn.small_images import _background
from relion_cryofilter.results.selftests import (
    leak_tests,
    noise_test,
    permutation_test,
    split_test,
)


def statistics(images):
    outside = _background(*images.shape[1:]).numpy()
    return {
        "image mean": images.mean(axis=(1, 2)),
        "image sigma": images.std(axis=(1, 2)),
        "background mean": images[:, outside].mean(axis=1),
        "background sigma": images[:, outside].std(axis=1),
        "box size": np.full(len(images), images.shape[1]),
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


@pytest.mark.parametrize("scale", [0.7, 1.5])
def test_negatives_scaled_differently_raise_the_alarm(simulated, scale):
    images, labels, origin = simulated
    leaky = np.where(labels[:, None, None], images, images * scale)
    assert alarms(leaky, labels, origin) >= {"image sigma", "background sigma"}


def test_negatives_with_an_offset_raise_the_alarm(simulated):
    images, labels, origin = simulated
    leaky = np.where(labels[:, None, None], images, images + 0.8)
    assert "image mean" in alarms(leaky, labels, origin)


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


def test_permuted_labels_are_at_chance_unless_images_are_on_both_sides():
    rng = np.random.default_rng(0)
    small = rng.normal(size=(800, 100)).astype(np.float32)
    labels = rng.random(800) < 0.5
    train, test = np.arange(400), np.arange(400, 800)
    assert permutation_test(small, labels, train, test, 0).passed
    small[400:] = small[:400]
    doubled = permutation_test(small, labels, train, train, 0)
    assert not doubled.passed
    assert "the same images are on both sides" in doubled.finding


def test_accepted_noise_and_shared_micrographs_raise_the_alarm():
    assert noise_test(np.linspace(0, 0.4, 1000), 0.5).passed
    assert not noise_test(np.linspace(0, 0.6, 1000), 0.5).passed
    groups = np.array([0, 0, 1, 1, 2, 2])
    clean = {"training": np.array([0, 1]), "test": np.array([2, 3, 4, 5])}
    assert split_test(clean, groups, "micrograph").passed
    mixed = {"training": np.array([0, 2]), "test": np.array([1, 3, 4, 5])}
    assert "2 micrograph(s) on two sides" in split_test(mixed, groups, "micrograph").finding

"""The linear baseline sees rings and spectra, and no cluster on both sides of a fold."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from relion_cryofilter.nn.linear import linear_baseline, out_of_fold_scores, radial_features


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 48, 48))


def test_features_are_ring_means_spreads_and_the_spectrum():
    images = noise(3)
    features = radial_features(images)
    assert features.shape == (3, 36)
    y, x = np.indices((48, 48)) - 23.5
    ring = (np.hypot(x, y) // 2).astype(int)
    for number in (0, 5, 11):
        mean = ndimage.mean(images[1], ring, number)
        spread = ndimage.standard_deviation(images[1], ring, number)
        assert np.allclose(features[1, [number, 12 + number]], [mean, spread], atol=1e-5)
    blurred = radial_features(ndimage.gaussian_filter(images, (0, 2, 2)))
    assert (blurred[:, 30:] < features[:, 30:] - 3).all()
    assert np.allclose(blurred[:, 24], features[:, 24], atol=0.3)


def test_flips_and_quarter_turns_change_nothing():
    images = noise(4)
    turned = np.rot90(images, 1, (1, 2))[:, ::-1]
    assert np.allclose(radial_features(images), radial_features(turned), atol=1e-4)


def test_a_disc_in_the_middle_is_found_and_chance_is_not():
    images, labels = noise(400), np.arange(400) % 2 == 0
    y, x = np.indices((48, 48)) - 23.5
    clusters = np.arange(400) // 40
    chance = out_of_fold_scores(radial_features(images), labels, clusters)
    assert abs(roc_auc_score(labels, chance) - 0.5) < 0.1
    images[labels] += 0.5 * (np.hypot(x, y) < 12)
    scores = out_of_fold_scores(radial_features(images), labels, clusters)
    assert roc_auc_score(labels, scores) > 0.95
    fitted = linear_baseline().fit(radial_features(images), labels)
    assert fitted.score(radial_features(images), labels) > 0.9


def test_an_image_is_scored_by_a_fit_without_its_cluster():
    """Each cluster has a mark of its own that tells its label, so only leaks do well."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 10)
    labels = rng.permutation(np.arange(40) % 2 == 0)[clusters]
    features = rng.normal(size=(40, 60))[clusters] + 0.01 * rng.normal(size=(400, 60))
    scores = out_of_fold_scores(features, labels, clusters)
    assert roc_auc_score(labels, scores) < 0.75
    assert np.isnan(out_of_fold_scores(features, labels, clusters * 0)).all()

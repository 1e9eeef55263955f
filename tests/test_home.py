"""A model says when it scores images that do not look like those of its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from making import TRAIN_JOB, labelled_blobs, write_stack

from relion_cryofilter.nn.home import (
    FAR,
    FEWEST_GROUPS,
    FEWEST_TRAINED,
    HOME,
    SAMPLE,
    Home,
    sample_groups,
    warn_if_far,
)
from relion_cryofilter.nn.model import Models, load_model
from relion_cryofilter.nn.scoring import score_particles
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.particles.labels import LabelledSet
from relion_cryofilter.particles.particles import ParticleSet, particles_of_stacks
from relion_cryofilter.progress import Progress

K = 20


def made_up(seed, n_groups=30, per_group=30, shift=0.0, share=0.5, spread=0.1):
    """Return features of good and bad particles in micrographs, their labels and groups."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    labels = rng.random(len(groups)) < share
    features = rng.normal(size=(len(groups), K)) @ np.diag(np.linspace(3, 0.5, K))
    features[labels, 0] += 6
    features += (spread * rng.normal(size=(n_groups, K)))[groups]
    features[:, 3] += shift
    return features.astype(np.float32), labels, groups


HOME_OF_30 = Home.of(*made_up(0))


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_micrographs_of_the_session_are_at_home(seed):
    features, _, groups = made_up(seed)
    assert HOME_OF_30.outside(features, groups) < 0.5 < FAR


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_another_share_of_junk_is_not_far_from_home(share):
    features, _, groups = made_up(7, share=share)
    assert HOME_OF_30.outside(features, groups) < FAR


@pytest.mark.parametrize("shift", [4.0, -4.0])
def test_images_that_look_otherwise_are_far_from_home(shift):
    features, _, groups = made_up(8, shift=shift)
    assert HOME_OF_30.outside(features, groups) > 0.9


def test_a_home_is_written_and_read_with_six_digits():
    stored = json.loads(json.dumps(HOME_OF_30.to_dict()))
    features, _, groups = made_up(9, shift=1.0)
    again = Home.from_dict(stored).outside(features, groups)
    assert again == pytest.approx(HOME_OF_30.outside(features, groups), abs=0.05)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda home: home.pop("axes"),
        lambda home: home.update(mean=[1.0]),
        lambda home: home.update(spread=[-1.0] * len(home["spread"])),
        lambda home: home["centre"].__setitem__(0, float("nan")),
        lambda home: home.update(axes=7),
        lambda home: home.update(axes=[[1.0], [2.0, 3.0]]),
        lambda home: home.update(mean="abc"),
    ],
)
def test_a_damaged_home_is_said_and_not_used(spoil, caplog, tmp_path):
    particles = labelled_blobs(tmp_path, 48)[0]
    stored = HOME_OF_30.to_dict()
    spoil(stored)
    rows = np.arange(48)
    with caplog.at_level("WARNING", logger="relion_cryofilter"):
        assert np.isnan(warn_if_far({HOME: stored}, particles, rows, np.zeros((48, K))))
    assert "is damaged; not compared" in caplog.text


def test_too_little_to_tell_is_told_as_nothing():
    assert Home.of(*made_up(3, n_groups=FEWEST_TRAINED - 1)) is None
    features, labels, groups = made_up(3, n_groups=FEWEST_GROUPS - 1)
    assert np.isnan(HOME_OF_30.outside(features, groups))
    assert np.isnan(HOME_OF_30.outside(features[:, :5], groups))
    features, labels, groups = made_up(3)
    assert Home.of(features, np.ones_like(labels), groups) is None
    assert Home.of(np.zeros_like(features), labels, groups) is None


@pytest.mark.parametrize(
    ("n", "per"), [(10_000, 100), (10_000, 2), (300, 30), (5000, 5000), (7, 1)]
)
def test_a_sample_is_small_and_its_groups_are_of_one_micrograph_each(n, per):
    clusters = np.random.default_rng(0).permutation(np.arange(n) // per)
    rows, groups = sample_groups(clusters)
    assert len(rows) == len(set(rows.tolist())) == len(groups) <= SAMPLE
    if per >= 10:
        assert all(
            len(set(clusters[rows[groups == g]].tolist())) == 1 for g in set(groups.tolist())
        )


def smoothed(particles: ParticleSet, folder: Path) -> ParticleSet:
    """Return the same particles as another microscope would show them."""
    paths = []
    for number, path in enumerate(particles.stacks):
        images = np.frombuffer(path.read_bytes()[1024:], np.float32).reshape(-1, 32, 32)
        images = sum(np.roll(images, (y, x), (1, 2)) for y in range(4) for x in range(4))
        write_stack(folder / "other" / f"{number:03d}.mrcs", images)
        paths.append(folder / "other" / f"{number:03d}.mrcs")
    return particles_of_stacks(paths)


def test_a_trained_model_knows_its_own_images_and_warns_of_others(tmp_path, caplog):
    from relion_cryofilter.nn.training import train_models

    particles, labels, _ = labelled_blobs(tmp_path)
    options = TrainOptions(o=tmp_path, epochs=1, j=1)
    (model,) = train_models(LabelledSet(particles, labels), options, tmp_path).models
    model.save(tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    assert len(json.dumps(model.provenance[HOME])) < 20_000
    for item, far in ((particles, False), (smoothed(particles, tmp_path), True)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="relion_cryofilter"):
            scores = score_particles(item, Models((model,), ("m",)), Progress(len(item), "p"))
        assert (scores.outside > FAR) == far
        assert ("scores may mean nothing" in caplog.text) == far
    assert "Features lie outside those of the model's training for" in caplog.text
    # What is known of home changes neither scores nor the model's hash.
    bare = replace(model, provenance={})
    again = score_particles(item, Models((bare,), ("m",)), Progress(len(item), "p"))
    assert np.array_equal(again.values, scores.values)
    assert np.isnan(again.outside)
    assert bare.hash == model.hash


def test_few_micrographs_train_a_model_without_a_word_of_home(trained):
    assert load_model(Path(TRAIN_JOB, "model.safetensors")).provenance[HOME] is None

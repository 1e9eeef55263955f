"""Pre-training: real sets are split by micrograph, batches are as said, a killed run goes on."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from making import ROOT

sys.path.insert(0, str(ROOT / "benchmarks/pretraining"))

import ablations
import export
import pool
import pretrain
from real_images import split_real

from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.model import BUNDLED_MODEL, load_model

SETS = {
    # name: columns beyond image, and what they hold of image number i
    "real_negatives": {"category": lambda i: f"kind {i // 60}", "micrograph": lambda i: i // 12},
    "junk_textures": {"category": lambda i: "cracks", "micrograph": lambda i: i // 12},
    "betagal_tutorial_accepted": {"label": lambda i: 1},
    "klh_far": {"micrograph": lambda i: i // 12, "label": lambda i: (1, 0, -1)[i % 3],
                "kind": lambda i: ("side", "empty", "ambiguous")[i % 3]},
}  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder of real images like that of the pre-training, 120 of each set."""
    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for name, columns in SETS.items():
        images = np.clip(rng.normal(0, 24, (120, 64, 64)), -127, 127).astype(np.int8)
        mrcfile.write(folder / f"{name}.mrcs", images)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *columns])
            for i in range(120):
                value = [make(i) for make in columns.values()]
                writer.writerow([f"{i + 1:06d}@{name}.mrcs", *value])
    return folder


@pytest.fixture(scope="module")
def filled(real, tmp_path_factory) -> tuple[Path, pool.Pool]:
    """A pool of three small shards of noise, a disc in the middle of good ones."""
    work, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(1)
    y, x = np.indices((64, 64)) - 31.5
    for number, kind in enumerate(("simulated", "composite", "noise") * 2):
        targets = np.arange(90) % 3 / 2 * (kind != "noise")
        boxes = rng.normal(size=(90, 64, 64)) + targets[:, None, None] * (np.hypot(x, y) < 14)
        path = pool.shard_path(work, number > 2, number)
        path.parent.mkdir(exist_ok=True)
        kinds = np.where(targets >= 0.5, "particle", "empty")
        np.savez(
            path, images=pool.encoded(boxes), targets=targets.astype(np.float16), kind=kind,
            kinds=kinds, micrographs=np.arange(90) // 9,
        )  # fmt: skip
    return work, pool.Pool(work, split_real(real)[0], validation=False)


def test_no_micrograph_is_on_both_sides_and_ambiguous_labels_on_none(real):
    train, test = split_real(real)
    assert not set(train.micrographs[train.micrographs != "betagal_tutorial_accepted "]) & set(
        test.micrographs
    )
    assert (train.kinds == "betagal_tutorial_accepted").sum() == 120
    assert not np.isin("ambiguous", [*train.kinds, *test.kinds])
    for kind in ("kind 0", "kind 1", "cracks", "side"):
        assert (test.kinds == kind).any()
        assert (train.kinds == kind).any()
    assert not train.good[np.isin(train.kinds, ["kind 0", "cracks", "empty"])].any()
    assert train.good[np.isin(train.kinds, ["side", "betagal_tutorial_accepted"])].all()


def test_a_batch_depends_on_its_position_alone_and_a_tenth_is_noise(filled):
    _, images = filled
    batches = pool.Batches(images, 64, FourierCrop(48), seed=1)
    small, targets = batches.get(640)
    again = batches.get(640)
    assert torch.equal(small, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(small, batches.get(704)[0])
    assert small.shape == (64, 1, 48, 48)
    assert torch.isfinite(small).all()
    assert {0.0, 0.5, 1.0} == set(targets.tolist())
    assert pool.SHARES["noise"] >= 0.05


def test_random_phases_keep_the_spectrum_and_nothing_else():
    y, x = np.indices((64, 64)) - 31.5
    disc = torch.from_numpy(np.stack([np.hypot(x, y) < 14] * 3)).float()
    noise = pool.random_phases(disc)
    power, kept = (torch.fft.rfft2(images).abs() for images in (disc, noise))
    assert torch.allclose(power, kept, atol=1e-2)
    likeness = torch.nn.functional.cosine_similarity(noise.flatten(1), (disc - 0.15).flatten(1))
    assert likeness.abs().max() < 0.8


def test_images_survive_their_encoding():
    boxes = np.random.default_rng(2).normal(3, 7, (5, 64, 64))
    back = pool.encoded(boxes) / pool.UNIT
    assert np.allclose(back, (boxes - boxes.mean((1, 2), keepdims=True)) / 7, atol=0.15)


def settings(work: Path, **changed) -> argparse.Namespace:
    usual = {
        "seed": 1, "widths": (1, 1, 2), "dim": 48, "learning_rate": 3e-3, "work": work,
        "name": "test", "images": 1280, "hours": 1.0, "bf16": False, "batch_size": 64,
        "init": None, "blend": 1.0,
    }  # fmt: skip
    return argparse.Namespace(**{**usual, **changed})


def test_a_killed_training_goes_on_from_its_checkpoint_with_its_mean(filled):
    work, images = filled
    first = pretrain.Training(settings(work))
    batches = pool.Batches(images, 64, FourierCrop(48), seed=1)
    for _ in range(6):
        first.step(*batches.get(first.images))
    assert first.frozen
    first.save()
    second = pretrain.Training(settings(work))
    assert (second.images, second.frozen, second.averaged.steps) == (384, True, 6)
    for training in (first, second):
        training.step(*batches.get(training.images))
    for name, value in first.averaged_network().state_dict().items():
        assert torch.allclose(value, second.averaged_network().state_dict()[name], atol=1e-6)
    assert not torch.equal(first.averaged.state["head.weight"], first.network.head.weight)


def test_training_ends_with_its_budget_and_goes_on_with_a_larger_one(filled):
    work, images = filled
    options = settings(work, name="budget", images=192)
    training = pretrain.Training(options)
    pretrain.train(training, images, images, work / "budget.log")
    assert training.images == 192
    again = pretrain.Training(settings(work, name="budget", images=320))
    assert again.images == 192
    pretrain.train(again, images, images, work / "budget.log")
    assert again.images == 320


def test_a_stopped_training_gives_a_model_that_accepts_no_noise_and_says_how_it_was_made(
    filled, real, tmp_path
):
    work, images = filled
    options = settings(work, name="export", images=3840, real=real)
    training = pretrain.Training(options)
    pretrain.train(training, images, images, work / "export.log")
    export.export(training, tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    assert model.threshold == 0.5
    assert model.provenance["settings"]["images_seen"] == 3840
    assert model.provenance["data"].startswith("3 shards")
    noise = np.random.default_rng(3).normal(size=(400, 64, 64)).astype(np.float32)
    scores = model.probabilities(model.preprocess(torch.from_numpy(noise)))
    assert (scores >= 0.5).float().mean() <= 0.02
    assert model.curve.n_groups == 10
    # Half of the way back to where it came from.
    start = pretrain.Training(settings(work, name="start", init=BUNDLED_MODEL, widths=(4, 8, 16)))
    moved = {name: value + 1 for name, value in start.averaged.state.items()}
    start.averaged.state, start.options.blend = moved, 0.5
    bias = load_model(BUNDLED_MODEL).network.head.bias
    assert torch.allclose(start.averaged_network().head.bias, bias + 0.5)


def test_whitened_images_of_a_set_have_the_same_power_in_all_rings():
    rng = np.random.default_rng(2)
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
    gain = np.exp(-6 * f)
    boxes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(80, 64, 64))) * gain, s=(64, 64))
    boxes[40:] = rng.normal(size=(40, 64, 64))  # another set, white already
    sets = np.repeat([0, 1], 40)
    white = ablations.Images(pool.encoded(boxes), np.zeros(80, np.float32), sets).whitened()
    power = np.abs(np.fft.rfft2(white.boxes.astype(float))) ** 2
    for one in (0, 1):
        rings = [power[sets == one].mean(0)[(f > low) & (f <= low + 0.1)].mean()
                 for low in (0.05, 0.2, 0.4)]  # fmt: skip
        assert max(rings) < 1.25 * min(rings)


def test_the_second_band_shows_where_48_pixels_leave_power_out():
    y, x = np.mgrid[:64, :64]
    coarse = np.cos(2 * np.pi * 6 * x / 64)
    fine = np.cos(2 * np.pi * 29 * x / 64) * (y < 32)
    boxes = torch.from_numpy((coarse + fine).astype(np.float32))[None]
    first, second = ablations.Crop(48, second=True)(boxes)[0]
    assert abs(float(first[4:20].mean() - first[28:44].mean())) < 0.1
    assert float(second[4:20].mean() - second[28:44].mean()) > 1

"""train from a model: the bundled one by default, never worse than it, pure noise refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from making import Fixed, labelled_blobs, train_words

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.nn.model import BUNDLED_MODEL, START_MODEL, load_model
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.trainer import Settings, Trainer, TrainingData
from relion_cryofilter.particles.splits import split_by_micrograph
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion import job

pytestmark = pytest.mark.usefixtures("without_report")

JOB = Path("External/job009")


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_the_bundled_start_is_fine_tuned_by_default():
    start = load_model(START_MODEL)
    text = (JOB / "run.out").read_text()
    assert f"fine-tuned from the bundled start (hash {start.hash})" in text
    assert "Before any training: AUC" in text
    model = load_model(JOB / "model.safetensors")
    assert model.network.kwargs == start.network.kwargs
    assert model.preprocess == start.preprocess
    bundled = load_model(BUNDLED_MODEL)  # kept where no training beats it
    origin = start if model.provenance["recipe"] else bundled
    assert origin.hash in model.provenance["fine_tuned_from"]
    for name, tensor in origin.network.state_dict().items():
        if name.endswith((".mean", ".variance")):
            assert torch.equal(tensor, model.network.state_dict()[name]), f"{name} is frozen"


@pytest.mark.slow
@pytest.mark.usefixtures("select_project")
@pytest.mark.parametrize(
    ("words", "name"),
    [("--model d4", "d4"), ("--model roberts", "roberts"), ("--img_dim 32", "straight")],
)
def test_a_named_network_is_trained_from_scratch(words, name, capsys):
    assert job.main(train_words(f"--epochs 1 {words}").split()) == 0
    assert "from scratch" in capsys.readouterr().out
    model = load_model(JOB / "model.safetensors")
    assert model.network.name == name
    assert model.provenance["fine_tuned_from"] is None


@pytest.mark.usefixtures("select_project")
def test_options_of_other_networks_are_refused_for_d4(capsys):
    assert job.main(train_words("--model d4 --f 16").split()) == 2
    assert "--f 16 is not for --model d4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("select_project")
def test_an_ensemble_trains_on_different_micrographs_and_scores_as_the_mean(capsys):
    words = train_words("--split 0.7 --epochs 2 --model straight --f 4 --ensemble 2")
    assert job.main(words.split()) == 0
    assert "mean of 2 models: --weights" in capsys.readouterr().out
    paths = [JOB / name for name in ("model.safetensors", "model_2.safetensors")]
    models = [load_model(path) for path in paths]
    assert models[0].hash != models[1].hash
    assert models[0].provenance["seen"] == models[1].provenance["seen"], "one test part"
    for name in ("history_2.csv", "history_2.png", "checkpoint_last_2.pt"):
        assert (JOB / name).exists()
    said = json.loads((JOB / "metrics.json").read_text())
    words = "metrics --o again/ --in_parts Select/job003/particles.star --split 0.7 --seed 0"
    assert job.main([*words.split(), "--weights", *map(str, paths)]) == 0
    again = json.loads(Path("again/metrics.json").read_text())
    assert again["auc"]["value"] == pytest.approx(said["auc"]["value"])
    assert again["threshold"] == said["threshold"]


@pytest.mark.slow
@pytest.mark.usefixtures("select_project")
def test_an_ensemble_of_all_labels_is_measured_out_of_fold_as_the_mean(capsys):
    assert job.main(train_words("--epochs 2 --model straight --f 4 --ensemble 2").split()) == 0
    assert "mean of 2 models: --weights" in capsys.readouterr().out
    models = [load_model(JOB / name) for name in ("model.safetensors", "model_2.safetensors")]
    assert models[0].hash != models[1].hash
    assert (JOB / "history_2.csv").exists()
    said = json.loads((JOB / "metrics.json").read_text())
    assert said["n"] == 96
    thresholds = [model.threshold for model in models]
    assert said["threshold"] == pytest.approx(np.mean(thresholds), abs=1e-6)
    # Another training in the same folder leaves nothing of this one.
    (JOB / "suspicious_labels.star").touch()
    assert job.main(train_words("--epochs 1 --model straight --f 4 --split 0.7").split()) == 0
    left = {path.name for path in JOB.iterdir()}
    assert not left & {"model_2.safetensors", "history_2.csv", "history_2.png"}
    assert "suspicious_labels.star" not in left


def test_members_share_the_test_part_and_rotate_validation(tmp_path):
    particles, labels, _ = labelled_blobs(tmp_path, 240)
    split = split_by_micrograph(particles, labels, 0.7, 0)
    members = split.members(labels, 3, 0)
    assert members[0] is split
    for member in members:
        assert np.array_equal(member.test, split.test)
        parts = [set(split.clusters[rows].tolist()) for rows in member.parts.values()]
        assert len(set.union(*parts)) == sum(map(len, parts)), "no cluster is on two sides"
        assert set(labels[member.validation].tolist()) == {True, False}
    held = [tuple(member.validation) for member in members]
    assert len(set(held)) == 3
    for seed in range(20):  # of few micrographs, some seed's fold is the first split once more
        few = split_by_micrograph(particles.take(np.arange(72)), labels[:72], 0.34, seed)
        held = [tuple(member.validation) for member in few.members(labels[:72], 2, seed)]
        assert len(set(held)) == 2
    labels = np.arange(240) % 60 == 0
    with pytest.raises(CryoFilterError, match="Ask for fewer"):
        split_by_micrograph(particles, labels, 0.5, 0).members(labels, 9, 0)


def noisy_trainer(tmp_path, settings, start=None):
    """Stripes are good and blobs bad; of pure noise nothing is known but from the trainer."""
    particles, labels, _ = labelled_blobs(tmp_path)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28] - 13.5
    images = rng.normal(size=(len(labels), 1, 28, 28))
    images[~labels] += 3 * np.exp(-(x**2 + y**2) / 40)
    images[labels] += 3 * np.sin(x)
    split = split_by_micrograph(particles, labels, 0.6, 0)
    torch.manual_seed(0)
    network = build_network("straight", f=8, dim=28)
    if start:
        network.load_state_dict(start)
    return Trainer(
        network,
        TrainingData(
            Fixed(torch.from_numpy(images.astype(np.float32))),
            labels,
            split,
            torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(1)),
        ),
        settings,
        tmp_path / "checkpoint",
        {},
    )


def test_images_of_pure_noise_teach_to_reject_it(tmp_path):
    unseen = torch.randn(200, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    accepted = {}
    for share in (0.0, 0.2):
        settings = Settings(epochs=8, learning_rate=3e-3, noise_share=share)
        trainer = noisy_trainer(tmp_path, settings)
        history = trainer.run(Progress(1, "steps"))
        assert max(epoch.val_auc for epoch in history) > 0.99
        with torch.no_grad():
            accepted[share] = float((trainer.network(unseen) > 0).float().mean())
    assert accepted[0.2] < 0.05 < accepted[0.0]


def test_weights_before_training_are_kept_if_no_epoch_is_better(tmp_path, caplog):
    trainer = noisy_trainer(tmp_path, Settings(epochs=8, learning_rate=3e-3))
    trainer.run(Progress(1, "steps"))
    start = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    again = noisy_trainer(tmp_path, Settings(epochs=2, learning_rate=10.0, fine_tuning=True), start)
    caplog.set_level(logging.INFO)
    caplog.clear()
    again.run(Progress(1, "steps"))
    assert again.best_number == 0
    assert "Epoch   2" in caplog.text
    assert "(best)" not in caplog.text
    assert torch.equal(again.network.towers[0][0].weight, start["towers.0.0.weight"])

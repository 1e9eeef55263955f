"""Training: honest validation, exact resume, calibrated thresholds, one job end to end."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import making
import numpy as np
import pytest
import torch
from making import (
    PATIENCE_S,
    ROOT,
    TRAIN_JOB,
    Fixed,
    labelled_blobs,
    started,
    train_words,
    wait_until,
)

from relion_cryofilter.errors import Aborted
from relion_cryofilter.images.preprocess import BlurResize, d4_views, turn
from relion_cryofilter.images.small_images import load_small_images
from relion_cryofilter.nn.model import load_model
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.three_parts import fit_temperature
from relion_cryofilter.nn.trainer import Settings, Trainer, TrainingData
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.splits import split_by_micrograph
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion import job

pytestmark = pytest.mark.usefixtures("without_report")


def trainer_of(tmp_path, images, labels, split, **settings):
    torch.manual_seed(0)
    network = build_network("straight", f=8, dim=28)
    return Trainer(
        network,
        TrainingData(images, labels, split),
        Settings(**settings),
        tmp_path / "checkpoint",
        {"a": 1},
    )


def test_validation_knows_nothing_of_the_training_batches(tmp_path):
    """The 2020 program validated on its first training batches: this is what would tell."""
    rng = np.random.default_rng(1)
    particles, _, _ = labelled_blobs(tmp_path, 240)
    labels = rng.random(240) < 0.5
    noise = Fixed(torch.from_numpy(rng.normal(size=(240, 1, 28, 28)).astype(np.float32)))
    split = split_by_micrograph(particles, labels, 0.5, 0)
    trainer = trainer_of(
        tmp_path, noise, labels, split, epochs=40, patience=40, learning_rate=3e-3,
        augmentation=False, batch_size=16,
    )  # fmt: skip
    history = trainer.run(Progress(1, "steps"))
    assert history[-1].train_acc > 0.95, "it has learnt the training labels by heart"
    assert history[-1].val_acc < 0.75
    assert history[-1].val_auc < 0.75


def test_the_best_epochs_weights_are_kept(tmp_path):
    particles, labels, _ = labelled_blobs(tmp_path)
    split = split_by_micrograph(particles, labels, 0.6, 0)
    loaded = load_small_images(
        particles, BlurResize(), Progress(1, "i"), threads=1, max_memory_bytes=1e9
    )
    trainer = trainer_of(tmp_path, loaded.images, labels, split, epochs=6)
    history = trainer.run(Progress(1, "steps"))
    trainer.network.eval()
    auc = trainer._validate()[2]
    assert auc == pytest.approx(max(epoch.val_auc for epoch in history))
    assert auc > 0.8


def test_training_stops_early_when_validation_does_not_improve(tmp_path):
    particles, labels, _ = labelled_blobs(tmp_path, strength=8)
    split = split_by_micrograph(particles, labels, 0.6, 0)
    loaded = load_small_images(
        particles, BlurResize(), Progress(1, "i"), threads=1, max_memory_bytes=1e9
    )
    trainer = trainer_of(tmp_path, loaded.images, labels, split, epochs=50, patience=3)
    history = trainer.run(Progress(1, "steps"))
    assert len(history) == trainer.best.epoch + 3 < 50


def test_a_stop_in_mid_epoch_then_a_restart_gives_the_same_weights(tmp_path):
    torch.set_num_threads(1)
    particles, labels, _ = labelled_blobs(tmp_path)
    split = split_by_micrograph(particles, labels, 0.6, 0)
    loaded = load_small_images(
        particles, BlurResize(), Progress(1, "i"), threads=1, max_memory_bytes=1e9
    )
    settings = {"epochs": 4, "batch_size": 16}
    whole = trainer_of(tmp_path, loaded.images, labels, split, **settings)
    whole.run(Progress(1, "steps"))
    (tmp_path / "checkpoint").unlink()
    steps = iter(range(1000))
    broken = trainer_of(tmp_path, loaded.images, labels, split, **settings)
    with pytest.raises(Aborted):
        broken.run(Progress(1, "steps", lambda: next(steps) > 35))
    assert 0 < len(broken.history) < 4
    resumed = trainer_of(tmp_path, loaded.images, labels, split, **settings)
    resumed.run(Progress(1, "steps"))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    other = trainer_of(tmp_path, loaded.images, labels, split, **{**settings, "seed": 5})
    other._resume()
    assert not other.history, "a checkpoint of another training is not gone on from"


def a_bit(content):
    """Turn a bit over in the largest tensor: it stays a number, and another one."""
    with zipfile.ZipFile(io.BytesIO(content)) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
        start = content.index(parts.read(largest))
    changed = bytearray(content)
    changed[start + largest.file_size // 2] ^= 0x40
    return bytes(changed)


def without_best(content):
    state = torch.load(io.BytesIO(content), weights_only=True)
    del state["best"]
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("damage", [a_bit, without_best, lambda content: b"PK" + content[:99]])
def test_a_damaged_checkpoint_gives_the_model_of_an_undisturbed_training(tmp_path, caplog, damage):
    particles, labels, _ = labelled_blobs(tmp_path, 120)
    split = split_by_micrograph(particles, labels, 0.6, 0)
    loaded = load_small_images(
        particles, BlurResize(), Progress(1, "i"), threads=1, max_memory_bytes=1e9
    )
    settings = {"epochs": 2, "batch_size": 16}
    whole = trainer_of(tmp_path, loaded.images, labels, split, **settings)
    whole.run(Progress(1, "steps"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with caplog.at_level("WARNING", "relion_cryofilter"):
        again = trainer_of(tmp_path, loaded.images, labels, split, **settings)
        again.run(Progress(1, "steps"))
    assert "can't be read" in caplog.text
    assert "starting anew" in caplog.text
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name


@pytest.mark.parametrize(("module", "split"), [("trainer", "--split 0.7"), ("crossfit", "")])
def test_a_training_that_diverges_is_one_sentence(select_project, capsys, module, split):
    words = f"--model straight --f 4 --learning_rate 1 --any_contrast --epochs 3 {split}"
    with pytest.MonkeyPatch.context() as patch:
        name = f"relion_cryofilter.nn.{module}.predict"
        patch.setattr(name, lambda *_: torch.full((9,), np.nan))
        assert job.main(train_words(words).split()) == 1
    said = capsys.readouterr().err
    assert "The training diverged" in said
    assert said.count("ERROR") == 1


@pytest.mark.parametrize(
    ("gigabytes", "where"),
    [(1, "in memory as float32"), (0.0016, "in memory as float16"), (1e-5, "not kept in memory")],
)
def test_streamed_and_float16_images_equal_those_in_memory(tmp_path, gigabytes, where):
    particles, _, images = labelled_blobs(tmp_path)
    loaded = load_small_images(
        particles, BlurResize(), Progress(1, "i"), threads=2, max_memory_bytes=gigabytes * 1e9 / 2
    )
    assert where in loaded.images.where
    rows = np.random.default_rng(0).integers(0, 360, 50)
    expected = BlurResize()(torch.from_numpy(images[rows]))
    assert torch.allclose(loaded.images.get(rows), expected, atol=4e-3)
    assert np.allclose(loaded.statistics["image mean"], images.mean(axis=(1, 2)), atol=1e-5)


def test_every_view_is_one_of_the_eight():
    images = torch.arange(8 * 9.0).reshape(8, 1, 3, 3)
    turned = turn(images, torch.arange(8))
    for number in range(8):
        assert torch.equal(turned[number], list(d4_views(images[number]))[number])


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_of_overconfident_logits_is_found(true):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(logits * true, labels) == pytest.approx(true, rel=0.07)


OUTPUTS = [
    "model.safetensors", "history.csv", "checkpoints", "metrics.json", "predictions.csv",
    "roc.png", "confusion_matrix.png", "precision_recall.png", "reliability.png",
    "score_histogram.png", "history.png", "RELION_JOB_EXIT_SUCCESS",
]  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_of_other_images_is_not_gone_on_from(trained, capsys):
    stack = Path("Extract/job001/Mics/mic0.mrcs")
    os.utime(stack, (1, 1))
    assert job.main(train_words("--epochs 1").split()) == 0
    assert "of another training; starting anew (other: stacks)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_checkpoint_is_started_anew(trained, capsys):
    first = load_model(Path(TRAIN_JOB, "model.safetensors")).hash
    for path in Path(TRAIN_JOB, "checkpoints").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    assert job.main(train_words("--epochs 1").split()) == 0
    assert "can't be read" in capsys.readouterr().out
    assert load_model(Path(TRAIN_JOB, "model.safetensors")).hash == first


@pytest.mark.slow
def test_bad_images_are_left_out_of_the_same_split(select_project, capsys):
    path = Path("Extract/job001/Mics/mic1.mrcs")
    data = np.fromfile(path, "<f4", offset=1024).reshape(-1, 32, 32)
    data[3], data[4] = 5.0, np.nan
    path.write_bytes(path.read_bytes()[:1024] + data.tobytes())
    assert job.main(train_words("--epochs 1").split()) == 1
    assert "--skip_bad leaves them out" in capsys.readouterr().err
    assert job.main(train_words("--epochs 1 --skip_bad --split 0.7").split()) == 0
    with Path(TRAIN_JOB, "predictions.csv").open() as file:
        trained = {row["image"] for row in csv.DictReader(file)}
    words = "metrics --o M/ --in_parts Select/job003/particles.star --skip_bad --split 0.7"
    assert job.main([*words.split(), "--weights", f"{TRAIN_JOB}model.safetensors"]) == 0
    with Path("M/predictions.csv").open() as file:
        assert {row["image"] for row in csv.DictReader(file)} == trained


@pytest.mark.slow
def test_a_stack_that_is_gone_is_left_out_of_a_training(select_project, capsys):
    Path("Extract/job001/Mics/mic1.mrcs").unlink()
    assert job.main(train_words("--epochs 1 --skip_bad").split()) == 0
    assert "24 of 96 images can't be used: 24 in stacks that can't be read" in (
        capsys.readouterr().out
    )
    assert load_model(Path(TRAIN_JOB, "model.safetensors")).provenance["boxes_px"] == [32]


def test_a_model_is_not_trained_over_its_own_start(trained, capsys):
    assert job.main(train_words(f"--epochs 1 --init {TRAIN_JOB}model.safetensors").split()) == 2
    assert "would overwrite the input" in capsys.readouterr().err


def test_recall_is_asked_of_a_model_that_knows_before_images_are_read(select_project, capsys):
    making.tiny_model().save("plain.safetensors")
    for stack in Path("Extract/job001/Mics").iterdir():
        stack.unlink()
    words = "score --o S/ --in_parts Extract/job001/particles.star --weights plain.safetensors"
    assert job.main([*words.split(), "--threshold", "recall=0.9"]) == 2
    assert "has no validation curve" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_job_leaves_model_history_and_figures(select_project, capsys):
    assert job.main(train_words("--epochs 3").split()) == 0
    for name in OUTPUTS:
        assert Path(TRAIN_JOB, name).exists(), name
    with Path(TRAIN_JOB, "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert list(history[0]) == [
        "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_auc", "learning_rate",
        "seconds",
    ]  # fmt: skip
    assert len(history) == 3
    text = capsys.readouterr().out
    for said in ("in memory as float32", "2 folds by micrograph", "Auc:", "Self-tests:",
                 "permuted labels", "pure noise", "background sigma",
                 "file of origin"):  # fmt: skip
        assert said in text
    assert text.splitlines()[-1].startswith("Out of fold, against the labels: AUC ")
    report = json.loads(Path(TRAIN_JOB, "metrics.json").read_text())
    assert {test["name"] for test in report["self_tests"]} >= {"split", "pure noise"}
    model = load_model(Path(TRAIN_JOB, "model.safetensors"))
    assert model.provenance["threshold_request"] == "recall=0.95"
    assert model.provenance["pixel_sizes_angstrom"] == [3.0]
    assert "operating_curve" in model.provenance
    assert report["n"] == 96 == len(Path(TRAIN_JOB, "predictions.csv").read_text().splitlines()) - 1


@pytest.mark.slow
def test_score_tells_what_validation_said_of_its_threshold(trained, capsys):
    base = "score --o S/ --in_parts Extract/job001/particles.star --weights "
    base += f"{TRAIN_JOB}model.safetensors"
    for request, said in (("", "the model's own; out of fold, against the labels, recall"),
                          ("--threshold recall=0.5", "for recall=0.5; by the curve in"),
                          ("--threshold count=10", "for count=10")):  # fmt: skip
        assert job.main([*base.split(), *request.split()]) == 0
        text = capsys.readouterr().out
        assert said in text
        assert "count" not in request or "10 accepted" in text


@pytest.mark.slow
def test_negatives_scaled_differently_raise_a_warning_in_the_log(select_project, capsys):
    for number in (0, 1):
        path = Path(f"Extract/job001/Mics/mic{number}.mrcs")
        data = np.fromfile(path, "<f4", offset=1024)
        path.write_bytes(path.read_bytes()[:1024] + (1.6 * data).tobytes())
    assert job.main(train_words("--epochs 1 --quiet").split()) == 0
    text = capsys.readouterr().out
    assert "WARNING: self-test image sigma: alone it separates the classes with AUC" in text
    assert "normalised or extracted differently" in text


@pytest.mark.slow
def test_a_finished_training_is_not_done_again(select_project, capsys):
    assert job.main(train_words("--epochs 1").split()) == 0
    first = Path(TRAIN_JOB, "model.safetensors").read_bytes()
    assert job.main(train_words("--epochs 1").split()) == 0
    assert "Resuming from" in capsys.readouterr().out
    assert Path(TRAIN_JOB, "model.safetensors").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v31", "v5"])
@pytest.mark.shared("relion_projects")
def test_real_projects_train_from_their_select_job_and_score(
    shared, version, tmp_path, monkeypatch
):
    for path in (shared / "relion_projects" / version).rglob("*"):
        target = tmp_path / path.relative_to(shared / "relion_projects" / version)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    shim = [sys.executable, str(ROOT / "external_job.py")]
    done = subprocess.run([*shim, *train_words("--epochs 2").split()], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    selected = len(read_particles(Path("Select/job003/particles.star")))
    assert f"200 labelled particles: {selected} good, {200 - selected} bad" in done.stdout.decode()
    words = f"--o External/job010/ --in_parts Extract/job001/particles.star --weights {TRAIN_JOB}"
    words += "model.safetensors --threshold keep=0.5"
    done = subprocess.run([*shim, *words.split()], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_particles(Path("External/job010/particles_accepted.star"))) == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "checkpoint"),
    [
        ("--epochs 2", "checkpoints/as_asked_all_0.pt"),
        ("--epochs 2 --j 2", "checkpoints/as_asked_fold2_0.pt"),
        ("--epochs 4 --split 0.7", "checkpoint_last.pt"),
    ],
)
def test_sigkill_in_mid_epoch_then_continue_gives_the_same_weights(
    select_project, capsys, more, checkpoint
):
    words = train_words(f"{more} --batch_size 1").split()
    assert job.main(words) == 0
    whole = load_model(Path(TRAIN_JOB, "model.safetensors"))
    words[words.index(TRAIN_JOB)] = "External/job010/"
    shim = [sys.executable, str(ROOT / "external_job.py")]
    with started([*shim, *words], stdout=subprocess.DEVNULL) as running:
        wait_until(Path("External/job010/", checkpoint).exists, running)
        time.sleep(0.03)
        running.kill()
    assert not Path("External/job010/model.safetensors").exists(), "it was killed too late"
    assert job.main(words) == 0
    assert "Resuming from" in capsys.readouterr().out
    resumed = load_model(Path("External/job010/model.safetensors"))
    assert resumed.hash == whole.hash
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name])


@pytest.mark.slow
def test_fine_tuning_starts_from_a_model_and_checks_it(select_project, capsys):
    assert job.main(train_words("--epochs 1 --f 8").split()) == 0
    words = train_words(f"--epochs 1 --init {TRAIN_JOB}model.safetensors").replace(
        TRAIN_JOB, "External/x/", 1
    )
    assert job.main(words.split()) == 0
    assert load_model("External/x/model.safetensors").network.kwargs == {"f": 8, "dim": 28}
    assert job.main([*words.split(), "--f", "16"]) == 2
    assert "--f is 16, but" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_text", "code"),
    [("count=500", 2), ("keep=0.5", 0), ("balanced", 0), ("0.7", 0), ("2020", 0)],
)
def test_the_threshold_to_store_is_by_request(select_project, request_text, code):
    assert job.main(train_words(f"--epochs 1 --threshold {request_text}").split()) == code
    if code == 0:
        model = load_model(Path(TRAIN_JOB, "model.safetensors"))
        fixed = {"0.7": 0.7, "2020": 0.5}.get(request_text)
        assert fixed is None or model.threshold == fixed


@pytest.mark.slow
def test_names_of_2020_keep_working(select_project):
    words = "train --pos Extract/job001/Mics/mic2.mrcs Extract/job001/Mics/mic3.mrcs --neg "
    words += "Extract/job001/Mics/mic0.mrcs --out_dir a/ --weight_dir b/ --history_dir c/ "
    words += "--model roberts --f 4 --img_dim 32 --epochs 1 --batch_size 8 --augmentation No"
    assert job.main([*words.split(), "--o", "a/"]) == 0
    assert Path("c/history.csv").exists()
    model = load_model("b/model.safetensors")
    assert (model.network.name, model.network.dim) == ("roberts", 32)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--j 2", "--patience 5000 --split 0.7"])
def test_an_abort_in_training_leaves_aborted(select_project, more):
    Path(TRAIN_JOB).mkdir(parents=True)
    shim = [sys.executable, str(ROOT / "external_job.py")]
    words = train_words(f"--epochs 5000 {more}").split()
    with started([*shim, *words], stdout=subprocess.PIPE) as running:
        begun = [
            Path(TRAIN_JOB, name)
            for name in ("checkpoint_last.pt", "checkpoints/as_asked_all_0.pt")
        ]
        wait_until(lambda: any(path.exists() for path in begun), running)
        Path(TRAIN_JOB, "RELION_JOB_ABORT_NOW").touch()
        running.communicate(timeout=PATIENCE_S)
    assert Path(TRAIN_JOB, "RELION_JOB_EXIT_ABORTED").exists()
    assert not Path(TRAIN_JOB, "model.safetensors").exists()


@pytest.fixture
def with_models(select_project):
    making_model = replace(
        making.tiny_model(), provenance={"pixel_sizes_angstrom": [3.0], "boxes_px": [32]}
    )
    making_model.save("model.safetensors")
    making.tiny_model(seed=1).save("other.safetensors")
    return select_project


@pytest.mark.slow
def test_metrics_measures_on_all_or_on_the_test_part(with_models, capsys):
    words = "metrics --o M/ --in_parts Select/job003/particles.star --weights model.safetensors"
    assert job.main(words.split()) == 0
    text = capsys.readouterr().out
    for said in ("Auc:", "CM:", "Acc:", "Specificity:", "Sensitivity:", "FPR at 95 % recall"):
        assert said in text
    for name in ("metrics.json", "predictions.csv", "roc.png", "confusion_matrix.png"):
        assert Path("M", name).exists()
    assert json.loads(Path("M/metrics.json").read_text())["n"] == 96
    assert job.main([*words.split(), "--split", "0.5", "--tta"]) == 0
    assert json.loads(Path("M/metrics.json").read_text())["n"] < 40
    with Path("M/predictions.csv").open() as file:
        assert set(next(csv.DictReader(file))) == {"image", "micrograph", "label", "score"}


@pytest.mark.slow
def test_metrics_on_micrographs_that_the_model_has_seen_warns(select_project, capsys):
    lines = Path("Extract/job001/particles.star").read_text().splitlines(keepends=True)
    for name, first in (("good", True), ("bad", False)):
        kept = [x for x in lines if "@" not in x or (int(x.split("@")[0][-6:]) > 12) == first]
        Path(f"{name}.star").write_text("".join(kept))
    labels = "--pos good.star --neg bad.star"
    assert job.main(f"train --o T/ {labels} --epochs 1 --j 1 --split 0.7".split()) == 0
    assert "Split by micrograph" in capsys.readouterr().out
    words = f"metrics --o M/ {labels} --weights T/model.safetensors"
    assert job.main(words.split()) == 0
    assert "was trained or validated on 3 of these 4 micrographs" in capsys.readouterr().out
    assert job.main([*words.split(), "--split", "0.7"]) == 0
    assert "was trained or validated on" not in capsys.readouterr().out
    assert Path("M/predictions.csv").read_bytes() == Path("T/predictions.csv").read_bytes()
    assert job.main([*words.split(), "--split", "0.7", "--seed", "2"]) == 0
    assert "was trained or validated on" in capsys.readouterr().out


@pytest.mark.slow
def test_several_models_are_averaged(with_models):
    base = "score --in_parts Extract/job001/particles.star --threshold 0.5 --o"
    for folder, weights in (("a", "model"), ("b", "other"), ("c", "model other")):
        words = f"{base} {folder} --weights " + " ".join(
            f"{w}.safetensors" for w in weights.split()
        )
        assert job.main(words.split()) == 0
    scores = [np.loadtxt(f"{folder}/scores.csv", delimiter=",")[:, 1] for folder in "abc"]
    assert np.allclose((scores[0] + scores[1]) / 2, scores[2], atol=1.1e-4)


@pytest.mark.slow
def test_another_pixel_size_is_warned_of(with_models, capsys):
    star = Path("Extract/job001/particles.star")
    words = f"score --o S/ --in_parts {star} --weights model.safetensors"
    assert job.main(words.split()) == 0
    assert "WARNING" not in capsys.readouterr().out
    star.write_text(star.read_text().replace(" 3.000000 ", " 3.400000 "))
    assert job.main(words.split()) == 0
    assert (
        "was trained at 3 Å/px (box 32 px), but optics group 1 has 3.4" in capsys.readouterr().out
    )

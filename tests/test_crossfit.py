"""Cross-fitting: honest scores of all labels, recipes by evidence, exact resume, suspects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import making
import numpy as np
import pytest
import torch
from making import Fixed, labelled_blobs, train_words
from torch.nn.functional import binary_cross_entropy_with_logits

from relion_cryofilter.errors import Aborted, CryoFilterError
from relion_cryofilter.images.bad import BadImages
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.images.small_images import Loaded
from relion_cryofilter.nn.crossfit import cross_fit
from relion_cryofilter.nn.fitting import (
    Fit,
    FitData,
    forgiving_losses,
    interpolated,
    noise_of_spectrum,
    phase_randomised,
)
from relion_cryofilter.nn.model import BUNDLED_MODEL, START_MODEL, load_model
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.recipes import (
    USUAL,
    Recipe,
    clearly_better,
    fold_auc,
    recipe_for,
)
from relion_cryofilter.nn.selftests import noise_test
from relion_cryofilter.nn.suspects import suspects_of
from relion_cryofilter.nn.task import Start, Task
from relion_cryofilter.options import TrainOptions
from relion_cryofilter.particles.labels import LabelledSet, Origin
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.splits import folds_by_micrograph
from relion_cryofilter.progress import Progress
from relion_cryofilter.relion import job

QUICK = Recipe("quick", epochs=4, learning_rate=3e-3, batch_size=16, noise_share=0.1, capped=False)
JOB = Path("External/job009")


def network_of(seed=0):
    torch.manual_seed(seed)
    return build_network("straight", f=4, dim=28)


def stripes(labels, seed=0):
    """Return images (n, 1, 28, 28): the good are stripes, the bad blobs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28] - 13.5
    images = rng.normal(size=(len(labels), 1, 28, 28))
    images[~labels] += 3 * np.exp(-(x**2 + y**2) / 40)
    images[labels] += 3 * np.sin(x)
    return torch.from_numpy(images.astype(np.float32))


def task_of(tmp_path, labels, images, origin="a model", **options):
    """Return a task and its folds, of stacks of twelve images each."""
    particles, _, _ = labelled_blobs(tmp_path, len(labels))
    images = Fixed(images)
    images.precision = "float32"
    nothing = np.zeros(len(labels))
    loaded = Loaded(images, {}, nothing, np.full(len(labels), 28), BadImages(particles))
    start = Start(network_of(), FourierCrop(28), origin)
    chosen = TrainOptions(**{"epochs": 4, "learning_rate": 3e-3, "j": 1, **options})
    task = Task(chosen, LabelledSet(particles, labels), loaded, start, tmp_path)
    return task, folds_by_micrograph(particles, labels, 0)


def fit_of(tmp_path, recipe=QUICK, name="checkpoint"):
    labels = np.arange(120) % 3 == 0
    white = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    data = FitData(Fixed(stripes(labels)), labels, white)
    return Fit(network_of(), data, np.arange(100), recipe, 7, tmp_path / name, {"a": 1})


@pytest.mark.slow
def test_scores_out_of_fold_know_nothing_of_their_labels(tmp_path):
    """Labels that mean nothing are learnt by heart, and not predicted."""
    labels = np.random.default_rng(1).random(120) < 0.5
    images = torch.randn(120, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    task, _ = task_of(tmp_path, labels, images, "", epochs=40, batch_size=8, augmentation=False)
    folds = folds_by_micrograph(task.labelled.particles, labels, 0, count=2)
    found = cross_fit(task, folds, Progress(1, "steps"))
    assert found.history[-1].train_acc > 0.85, "it has learnt the training labels by heart"
    assert abs(found.auc - 0.5) < 0.2
    assert np.isfinite(found.logits).all()


def test_every_particle_is_scored_by_a_model_that_has_not_seen_its_micrograph(
    tmp_path, monkeypatch
):
    labels = np.arange(240) % 2 == 0
    task, folds = task_of(tmp_path, labels, stripes(labels))
    seen = []
    original = Fit.run

    def run(self, *how):
        seen.append(self.rows)
        return original(self, *how)

    monkeypatch.setattr(Fit, "run", run)
    found = cross_fit(task, folds, Progress(1, "steps"))
    assert sorted(map(len, seen)) == [192] * 5 + [240], "five folds, and all labels once"
    for number, held in enumerate(folds.held):
        train = folds.others(number)
        assert not set(folds.clusters[held]) & set(folds.clusters[train])
        assert any(np.array_equal(train, rows) for rows in seen)
    assert found.auc > 0.95


@pytest.mark.slow
def test_a_stopped_cross_fit_goes_on_with_the_same_weights_and_repeats_nothing(tmp_path):
    labels = np.arange(120) % 2 == 0
    whole, folds = task_of(tmp_path, labels, stripes(labels))
    (tmp_path / "other").mkdir()
    broken = replace(whole, folder=tmp_path / "other")
    first = cross_fit(whole, folds, Progress(1, "steps"))
    steps = iter(range(10_000))
    with pytest.raises(Aborted):
        cross_fit(broken, folds, Progress(1, "steps", lambda: next(steps) > 40))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "other/checkpoints").iterdir()}
    assert kept
    second = cross_fit(broken, folds, Progress(1, "steps"))
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name])
    assert np.array_equal(first.logits, second.logits)
    counted = Progress(1, "steps")
    third = cross_fit(broken, folds, counted)
    assert [line.seconds for line in third.history] == [line.seconds for line in second.history]
    parallel = replace(whole, options=replace(whole.options, j=3), folder=tmp_path / "threads")
    (tmp_path / "threads").mkdir()
    fourth = cross_fit(parallel, folds, Progress(1, "steps"))
    assert np.array_equal(first.logits, fourth.logits), "threads change nothing"


def test_a_stop_in_mid_round_then_a_restart_gives_the_same_weights(tmp_path):
    whole, history = fit_of(tmp_path).run(lambda count: None)
    steps = iter(range(1000))

    def stop(count):
        if next(steps) > 17:
            raise Aborted("stop")

    with pytest.raises(Aborted):
        fit_of(tmp_path, name="broken").run(stop)
    known = []
    resumed, again = fit_of(tmp_path, name="broken").run(lambda count: None, resumed=known.append)
    assert known[0] > 0
    assert [line.epoch for line in again] == [1, 2, 3, 4] == [line.epoch for line in history]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    other = replace(fit_of(tmp_path, name="broken"), identity={"a": 2})
    assert not other._resume(network_of(), torch.optim.AdamW(network_of().parameters()))


def test_the_network_before_training_stays_as_it_was(tmp_path):
    fit = fit_of(tmp_path)
    before = {name: tensor.clone() for name, tensor in fit.start.state_dict().items()}
    end, _ = fit.run(lambda count: None)
    assert all(torch.equal(before[name], t) for name, t in fit.start.state_dict().items())
    half = interpolated(fit.start, end, 0.5)
    expected = (fit.start.head.weight + end.head.weight) / 2
    assert torch.allclose(half.head.weight, expected)
    assert interpolated(fit.start, end, 1.0) is end


def test_noise_has_the_spectrum_of_its_images():
    images = stripes(np.ones(64, bool))
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
    for noise in (phase_randomised(images, torch.Generator().manual_seed(0)),
                  noise_of_spectrum(images, 200, 0)):  # fmt: skip
        power = [torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean(0)[0]
                 for x in (images, noise)]  # fmt: skip
        strongest = power[0].flatten().topk(4).indices
        ratio = power[1].flatten()[strongest] / power[0].flatten()[strongest]
        assert torch.all((ratio > 0.6) & (ratio < 1.5))
        assert (
            abs(torch.corrcoef(torch.stack([images[0].flatten(), noise[0].flatten()]))[0, 1]) < 0.4
        )


def test_the_loss_forgives_what_the_network_is_sure_is_labelled_wrongly():
    labels = torch.tensor([1.0, 0, 1, 1])
    given = torch.tensor([0.3, -0.5, -6.0, -200.0], requires_grad=True)
    p = torch.where(labels > 0, given, -given).sigmoid()

    torch.testing.assert_close(forgiving_losses(given, labels, 1.0), 1 - p)
    entropy = binary_cross_entropy_with_logits(given, labels, reduction="none")
    torch.testing.assert_close(forgiving_losses(given, labels, 0.0), entropy)
    nearly = forgiving_losses(given, labels, 1e-5)
    torch.testing.assert_close(nearly, entropy, rtol=1e-2, atol=0)

    (pull,) = torch.autograd.grad(forgiving_losses(given, labels, 0.7).sum(), given)
    assert torch.isfinite(pull).all()
    assert abs(pull[2]) < 0.1 * abs(pull[0])  # surely labelled wrongly
    assert abs(pull[3]) < 1e-6
    (plain,) = torch.autograd.grad(entropy.sum(), given)
    assert abs(plain[2]) > abs(plain[0])


def test_many_labels_cost_a_budget_of_steps():
    assert USUAL.steps(100) == 63
    assert USUAL.steps(2_500) == 400
    assert USUAL.steps(100_000) < 3_000
    assert replace(USUAL, capped=False).steps(100_000) == 20 * 3125


def test_few_micrographs_stay_near_the_start_and_options_are_obeyed():
    plain = TrainOptions()
    assert recipe_for(plain, 30, 0.8) == USUAL
    assert recipe_for(plain, 4, 0.8).way == recipe_for(plain, 30, 0.3).way == 0.5
    scratch = recipe_for(plain, 30, None)
    assert (scratch.epochs, scratch.batch_size, scratch.frozen) == (30, 64, False)
    asked = recipe_for(TrainOptions(epochs=7, batch_size=9, augmentation=False), 30, 0.8)
    assert (asked.epochs, asked.batch_size, asked.capped) == (7, 9, False)
    assert (asked.learning_rate, asked.augmentation) == (3e-3, False)
    for micrographs, way in ((30, 1.0), (4, 0.5)):
        asked = recipe_for(TrainOptions(learning_rate=0.1), micrographs, 0.8)
        assert (asked.learning_rate, asked.way) == (0.1, way)


def test_a_tie_is_not_clearly_better():
    rng = np.random.default_rng(0)
    labels, clusters = rng.random(1000) < 0.5, np.arange(1000) % 25
    good = labels + rng.normal(0, 1, 1000)
    fold_of = clusters % 2
    better = labels + rng.normal(0, 0.5, 1000)

    alike = [labels + rng.normal(0, 1, 1000) for _ in range(10)]
    for micrographs in (clusters, np.zeros(1000, int)):

        def beats(scores, others, micrographs=micrographs):
            return clearly_better(scores, others, labels, fold_of, micrographs, 0)

        assert beats(better, good)
        assert not beats(good, better)
        assert not beats(good, good)
        assert sum(beats(one, good) or beats(good, one) for one in alike) < 10


def test_the_auc_within_folds_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels, scores, weights = rng.random(300) < 0.4, rng.normal(size=300), rng.integers(0, 3, 300)
    fold_of = np.arange(300) % 3
    each = [roc_auc_score(labels[fold_of == k], scores[fold_of == k],
                          sample_weight=weights[fold_of == k]) for k in range(3)]  # fmt: skip
    assert fold_auc(scores, labels, fold_of, weights.astype(float)) == pytest.approx(np.mean(each))


def test_the_start_is_kept_where_nothing_beats_it(tmp_path, caplog):
    labels = np.arange(120) % 2 == 0
    task, folds = task_of(tmp_path, labels, stripes(labels), epochs=8)
    good, _ = fit_of(tmp_path, replace(QUICK, epochs=8)).run(lambda count: None)
    start = replace(task.start, network=good)
    spoilt = replace(task, start=start, options=TrainOptions(epochs=1, learning_rate=1.0, j=1))
    found = cross_fit(spoilt, folds, Progress(1, "steps"))
    assert found.recipe is None
    assert "its weights are kept" in caplog.text
    assert found.auc == found.start_auc
    for name, tensor in good.state_dict().items():
        assert torch.equal(tensor, found.network.state_dict()[name])


def test_the_bundled_model_is_kept_where_a_training_from_the_start_does_not_beat_it(
    tmp_path, caplog
):
    labels = np.arange(120) % 2 == 0
    task, folds = task_of(tmp_path, labels, stripes(labels), epochs=8)
    good, _ = fit_of(tmp_path, replace(QUICK, epochs=8)).run(lambda count: None)
    start = replace(task.start, rival=(good, "the bundled model"))
    spoilt = replace(task, start=start, options=TrainOptions(epochs=1, learning_rate=1.0, j=1))
    found = cross_fit(spoilt, folds, Progress(1, "steps"))
    assert found.recipe is None
    assert "than the bundled model did before" in caplog.text
    for name, tensor in good.state_dict().items():
        assert torch.equal(tensor, found.network.state_dict()[name])


def test_the_bundled_model_and_the_bundled_start_see_the_same_images():
    scores, start = load_model(BUNDLED_MODEL), load_model(START_MODEL)
    assert scores.preprocess == start.preprocess
    assert scores.network.kwargs == start.network.kwargs


def test_labels_that_contradict_the_start_are_warned_of(tmp_path, caplog):
    labels = np.arange(120) % 2 == 0
    task, folds = task_of(tmp_path, labels, stripes(labels))
    good, _ = fit_of(tmp_path, replace(QUICK, epochs=8)).run(lambda count: None)
    turned = LabelledSet(task.labelled.particles, ~labels)
    contrary = replace(task, start=replace(task.start, network=good), labelled=turned)
    found = cross_fit(contrary, folds, Progress(1, "steps"))
    assert "The labels contradict a model" in caplog.text
    assert found.start_auc < 0.5
    assert found.recipe is None or found.recipe.way == 0.5


def test_suspects_are_the_most_contradicted_of_both_kinds():
    labels = np.arange(1000) % 2 == 0
    scores = np.where(labels, 0.9, 0.1)
    scores[:20:2] = np.linspace(0.1, 0.4, 10)  # labelled good
    scores[1:400:2] = np.linspace(0.6, 0.99, 200)  # labelled bad
    found = suspects_of(LabelledSet(None, labels), scores)
    assert len(found.rows) == 10 + 150
    contradiction = np.where(labels, 1 - scores, scores)[found.rows]
    assert np.all(np.diff(contradiction) <= 0)
    assert found.rows[0] == 399
    assert not found.table()


def test_classes_that_look_mislabelled_are_named():
    labels, classes = np.arange(300) < 200, np.repeat([4, 7, 9], 100)
    scores = np.repeat([0.9, 0.2, 0.1], 100)
    origin = Origin(None, np.arange(300), classes, 300)
    found = suspects_of(LabelledSet(None, labels, (), origin), scores)
    assert [(c.number, c.good, c.mislabelled) for c in found.classes] == [
        (4, True, False), (7, True, True), (9, False, False)
    ]  # fmt: skip
    assert "looks mislabelled" in found.table()[2]


@pytest.mark.usefixtures("trained")
def test_suspicious_labels_are_rows_of_the_classification():
    found = read_particles(JOB / "suspicious_labels.star")
    there = Path("Class2D/job002/run_it012_data.star").read_text()
    rows = [
        line for line in (JOB / "suspicious_labels.star").read_text().splitlines() if "@" in line
    ]
    assert 0 < len(rows) == len(found) < 96
    for row in rows:
        assert row.rsplit(maxsplit=1)[0] in there, "as it was, with one more column"
    scores = making.scores_of(JOB / "suspicious_labels.star")
    good = found.table.classes() == 3
    assert np.all(scores[good] < 0.5)
    assert np.all(scores[~good] > 0.5)
    text = (JOB / "run.out").read_text()
    assert "class  particles  labelled  estimated good" in text
    assert "suspicious_labels.star  the " in text
    galleries = making.data_of(JOB / "report.html")["galleries"]
    assert galleries[0][0].startswith("Labels that scores contradict most")


@pytest.mark.slow
@pytest.mark.usefixtures("select_project")
def test_suspicious_labels_of_files_are_named():
    lines = Path("Extract/job001/particles.star").read_text().splitlines(keepends=True)
    for name, first in (("good", True), ("bad", False)):
        kept = [x for x in lines if "@" not in x or (int(x.split("@")[0][-6:]) > 12) == first]
        Path(f"{name}.star").write_text("".join(kept))
    words = "train --o T/ --pos good.star --neg bad.star --epochs 1 --j 1"
    assert job.main(words.split()) == 0
    found = read_particles("T/suspicious_labels.star")
    assert found.has_micrographs
    assert found.image_name(0).endswith(".mrcs")
    model = load_model("T/model.safetensors")
    assert model.provenance["label_noise"]["reason"]
    metrics = json.loads(Path("T/metrics.json").read_text())
    assert metrics["label_noise"]["junk_among_good"] == [0.0, 0.0, 0.0]


def test_a_noise_that_passes_says_which_recall_would_stop_it():
    model = load_model(BUNDLED_MODEL)
    scores = np.linspace(0, 0.9, 1000)
    test = noise_test(scores, 0.5, "noise of the set's spectrum", (model,))
    assert not test.passed
    assert "at a recall of 0." in test.finding
    assert "(threshold 0.8" in test.finding
    assert noise_test(scores * 0.5, 0.5, models=(model,)).passed


def test_one_of_a_kind_can_not_be_cross_fitted(tmp_path):
    particles, _, _ = labelled_blobs(tmp_path, 24)
    with pytest.raises(CryoFilterError, match="Only 1 positive particle"):
        folds_by_micrograph(particles, np.arange(24) == 3, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("select_project")
def test_the_threads_of_a_training_change_nothing():
    hashes = []
    for threads in (1, 2):
        words = train_words("--epochs 3").replace("--j 1", f"--j {threads}")
        assert job.main(words.replace("job009", f"job01{threads}").split()) == 0
        hashes.append(load_model(f"External/job01{threads}/model.safetensors").hash)
    assert hashes[0] == hashes[1]

"""Tables in, values and tables out: the functions for scripts and notebooks, and their examples."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from making import ROOT, half_star, run_to_end

from relion_cryofilter import (
    CryoFilterError,
    ScoreOptions,
    evaluate_model,
    load_model,
    read_particles,
    score,
    score_images,
    train_model,
)
from relion_cryofilter.errors import ImageError, StarError, UsageError
from relion_cryofilter.simulate import simulate_project

STAR, MODEL = "Extract/job001/particles.star", "model.safetensors"
PLAIN = {"any_contrast": True, "j": 1}


def tables():
    return starfile.read(STAR, always_dict=True)


def test_a_star_file_its_table_and_its_set_give_the_scores_of_the_job(project):
    score(ScoreOptions(in_parts=STAR, o="out/", weights=MODEL, threshold="keep=0.5", **PLAIN))
    written = starfile.read("out/particles.star", always_dict=True)["particles"]
    for source in (STAR, tables(), tables()["particles"], read_particles(STAR)):
        scores = score_images(source, MODEL, threshold="keep=0.5", **PLAIN)
        assert (scores.values == written["rlnParticleFigureOfMerit"]).all()
        assert len(scores) == 48
        assert scores.accepted.sum() == 24
        frame = scores.to_frame()
        assert (frame["rlnParticleFigureOfMerit"] == scores.values).all()
        assert (frame["rlnMicrographName"] == written["rlnMicrographName"]).all()


def test_a_table_keeps_its_index_order_and_columns_and_is_not_changed(project):
    table = tables()["particles"].sample(frac=1, random_state=0)
    before = table.copy()
    scores = score_images(table, MODEL, **PLAIN)
    pd.testing.assert_frame_equal(table, before)
    result = scores.to_frame()
    pd.testing.assert_frame_equal(result.drop(columns="rlnParticleFigureOfMerit"), before)
    in_order = score_images(tables(), MODEL, **PLAIN)
    assert (result["rlnParticleFigureOfMerit"].sort_index() == in_order.values).all()
    assert result[scores.accepted]["rlnParticleFigureOfMerit"].min() >= scores.threshold


def test_models_are_files_or_in_memory_and_several_are_averaged(project):
    model = load_model(MODEL)
    one = score_images(STAR, model, **PLAIN)
    assert (score_images(STAR, [model, MODEL], **PLAIN).values == one.values).all()


def test_models_are_used_in_the_precision_that_is_asked_for(project):
    score(ScoreOptions(in_parts=STAR, o="out/", weights=MODEL, precision="bf16", **PLAIN))
    written = starfile.read("out/particles.star")["particles"]["rlnParticleFigureOfMerit"]
    model = load_model(MODEL)
    reduced = dataclasses.replace(model, precision=torch.bfloat16)
    for given in (MODEL, model, reduced):
        assert (score_images(STAR, given, precision="bf16", **PLAIN).values == written).all()
    assert (score_images(STAR, reduced, **PLAIN).values == written).all()
    assert (score_images(STAR, model, **PLAIN).values != written).any()


def test_image_paths_of_a_table_start_from_a_folder(project, tmp_path_factory, monkeypatch):
    table, here = tables(), score_images(STAR, MODEL, **PLAIN)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    there = score_images(table, project / MODEL, folder=project, **PLAIN)
    assert (there.values == here.values).all()
    with pytest.raises(ImageError, match="48 of 48 images can't be used"):
        score_images(table, project / MODEL, **PLAIN)


def test_progress_is_told_of_every_batch_and_may_end_the_work(project):
    told = []
    score_images(STAR, MODEL, batch_size=12, progress=lambda *step: told.append(step), **PLAIN)
    assert [done for _, done, _ in told] == [12, 24, 36, 48]
    assert {(what, total) for what, _, total in told} == {("particles scored", 48)}

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_images(STAR, MODEL, progress=stop, **PLAIN)
    score_images(STAR, MODEL, **PLAIN)
    assert len(told) == 4, "the listener is forgotten afterwards"


def test_bad_images_are_refused_or_named(project):
    Path("Extract/job001/Mics/mic0.mrcs").unlink()
    with pytest.raises(ImageError, match="12 of 48 images can't be used"):
        score_images(tables(), MODEL, **PLAIN)
    scores = score_images(tables(), MODEL, skip_bad=True, threshold=0, **PLAIN)
    names = tables()["particles"]["rlnImageName"]
    assert names.str.contains("mic0").to_numpy()[scores.bad].all()
    assert len(scores.bad) == 12
    assert not scores.accepted[scores.bad].any()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"rlnClassNumber": [1]}), "no column rlnImageName"),
        ({"optics": pd.DataFrame()}, "expected one named particles"),
        (pd.DataFrame({"rlnImageName": ["x@y.mrcs"]}), "Row 0 of the table: the image name"),
    ],
)
def test_a_table_that_can_not_be_read_is_refused_in_one_sentence(project, table, message):
    with pytest.raises(StarError, match=message):
        score_images(table, MODEL)


def test_a_mistyped_option_is_named_with_what_it_may_mean(project):
    with pytest.raises(UsageError, match=r"no option treshold\. Did you mean threshold\?"):
        score_images(STAR, MODEL, treshold=0.5)
    with pytest.raises(UsageError, match=r"no option max\. Did you mean max_memory\?"):
        train_model(STAR, STAR, max=3)
    assert len(repr(score_images(STAR, MODEL, **PLAIN))) < 2000


def test_an_option_that_makes_no_sense_is_refused(project):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        score_images(STAR, MODEL, threshold="recall=2")
    with pytest.raises(UsageError, match="no option epochs"):
        score_images(STAR, MODEL, epochs=2)
    with pytest.raises(TypeError, match="weights is an option of the jobs"):
        score_images(STAR, weights=MODEL)
    with pytest.raises(TypeError, match="in_parts is an option of the jobs"):
        train_model(STAR, STAR, in_parts=STAR)


def halves():
    """Return the particles with the strongest and the weakest blobs."""
    table = tables()["particles"]
    strong = table["rlnImageName"].str.slice(0, 6).astype(int) > 6
    return table[strong], table[~strong]


TRAINING = {"model": "straight", "f": 4, "epochs": 3, "seed": 1, "j": 1, "any_contrast": True}


@pytest.mark.slow
def test_training_on_tables_gives_the_model_of_the_job_on_files(project):
    good, bad = halves()
    told = []
    training = train_model(good, bad, progress=lambda *step: told.append(step), **TRAINING)
    strong = re.compile(r" 0000(?:0[7-9]|1\d)@")
    files = [half_star(project, "good.star", strong.search),
             half_star(project, "bad.star", lambda line: not strong.search(line))]  # fmt: skip
    again = train_model(*files, o="kept/", **TRAINING)
    assert training.models[0].hash == again.models[0].hash == load_model("kept/" + MODEL).hash
    assert {what for what, _, _ in told} == {"images read", "image steps"}
    assert list(training.history()["epoch"]) == [1, 2, 3]
    predictions = training.predictions()
    assert len(predictions) == training.figures["n"]
    assert set(predictions["label"]) == {0, 1}
    measured = evaluate_model(good, bad, training.models, **PLAIN)
    assert (measured.n, measured.n_groups) == (48, 4)
    assert 0.5 < measured.auc.value <= 1


def test_one_kind_of_particles_can_not_be_learnt_or_measured(project):
    good, _ = halves()
    for use in (train_model, evaluate_model):
        with pytest.raises(CryoFilterError, match="No positive particles are left"):
            use(good, good)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "project"
    simulate_project(folder, n_micrographs=9, particles_per_micrograph=16, snr=0.2, seed=3)
    return folder


def run_example(folder, name, *words):
    script = [sys.executable, "-W", "error", ROOT / f"examples/{name}.py"]
    done = run_to_end([*script, *words], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_that_scores_a_table_writes_the_accepted_particles(simulated):
    assert re.search(
        r"\d+ of 144 accepted", run_example(simulated, "score_table", STAR, "out.star")
    )
    particles = read_particles(simulated / "out.star")
    assert 86 <= len(particles) < 144
    assert particles.optics[0].pixel_size_angstrom == 3.0


@pytest.mark.slow
def test_the_example_that_trains_on_a_table_measures_on_new_micrographs(simulated):
    said = run_example(simulated, "train_table", STAR, "truth.csv", "trained.safetensors")
    auc = float(re.search(r"AUC (\d\.\d+) .* on 48 particles of 3 new micrographs", said)[1])
    assert auc > 0.7
    assert load_model(simulated / "trained.safetensors").provenance["n_good"] > 10


@pytest.mark.slow
def test_the_example_that_compares_thresholds_tells_its_progress(simulated):
    said = run_example(simulated, "compare_thresholds", STAR)
    assert "144 of 144 particles scored" in said
    kept = [int(n) for n in re.findall(r"^0\.\d: +(\d+) particles", said, re.M)]
    assert kept == sorted(kept, reverse=True)
    assert np.ptp(kept) > 0

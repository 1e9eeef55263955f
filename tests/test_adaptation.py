"""A model for the set at hand, without labels."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import project_with_model, scores_of, write_project
from sklearn.metrics import roc_auc_score

from relion_cryofilter.errors import Aborted
from relion_cryofilter.files import ADAPTED_MODEL
from relion_cryofilter.images.bad import BadImages
from relion_cryofilter.nn import adaptation
from relion_cryofilter.nn.adaptation import FEWEST, LEAST_SHARE, SUREST_BAD, SUREST_GOOD, surest
from relion_cryofilter.nn.model import read_models
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.relion import job
from relion_cryofilter.results import report
from relion_cryofilter.simulate import simulate_project

STAR = "Extract/job001/particles.star"
PER_MICROGRAPH = 50

pytestmark = pytest.mark.usefixtures("without_report")


def score(*words, out="External/job004/"):
    return job.main(["score", "--in_parts", STAR, "--o", out, "--j", "1", *words])


def adapted_project():
    simulate_project(
        Path(), n_micrographs=4, particles_per_micrograph=PER_MICROGRAPH, snr=0.06, seed=5
    )
    assert score(out="External/job003/") == 0
    assert score("--adapt") == 0


@pytest.fixture
def project(made_once, tmp_path, monkeypatch):
    shutil.copytree(made_once(adapted_project), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def first_lines(star, n_rows):
    """Leave only so many particles in a STAR file."""
    lines = Path(star).read_text().splitlines(keepends=True)
    rows = [number for number, line in enumerate(lines) if "@" in line]
    Path(star).write_text("".join(lines[: rows[n_rows - 1] + 1]))


@given(st.lists(st.integers(0, 40), min_size=FEWEST, max_size=400), st.integers(1, 39))
def test_the_surest_of_both_kinds_are_those_with_the_highest_and_lowest_scores(scores, threshold):
    values = np.array(scores) / 40
    sure, good = surest(values, threshold / 40)
    assert np.all(np.diff(sure) > 0)
    assert 0 < good.sum() < len(good)
    share = np.clip((values >= threshold / 40).mean(), LEAST_SHARE, 1 - LEAST_SHARE)
    assert good.sum() == pytest.approx(SUREST_GOOD * share * len(values), abs=1)
    assert (~good).sum() == pytest.approx(SUREST_BAD * (1 - share) * len(values), abs=1)
    others = np.setdiff1d(np.arange(len(values)), sure)
    assert values[sure[good]].min() >= values[others].max(initial=0)
    assert values[sure[~good]].max() <= values[others].min(initial=1)


def test_an_adapted_model_sorts_better_than_the_bundled_one(project):
    particles = read_particles(Path(STAR))
    names = [particles.image_name(row) for row in range(len(particles))]
    truth = pd.read_csv("truth.csv", index_col="image")["real"].loc[names]
    before, after = (
        roc_auc_score(truth, scores_of(f"External/job{number}/particles.star"))
        for number in ("003", "004")
    )
    assert after > before + 0.005


def test_a_continued_job_keeps_its_model_though_the_set_changes(project, capsys):
    model = Path("External/job004", ADAPTED_MODEL)
    known = model.read_bytes()
    whole = scores_of("External/job004/particles.star")
    assert score("--adapt") == 0
    assert "adapted by an earlier run" in capsys.readouterr().out
    first_lines(STAR, 3 * PER_MICROGRAPH)
    assert score("--adapt") == 0
    assert model.read_bytes() == known
    assert np.array_equal(scores_of("External/job004/particles.star"), whole[: 3 * PER_MICROGRAPH])
    assert score("--adapt", "--rescore") == 0
    assert model.read_bytes() != known


def test_a_set_that_has_grown_to_twice_the_few_that_were_seen_is_adapted_to_anew(project, capsys):
    whole = Path(STAR).read_text()
    first_lines(STAR, FEWEST)
    assert score("--adapt", out="grown/") == 0
    known = Path("grown", ADAPTED_MODEL).read_bytes()
    Path(STAR).write_text(whole)
    first_lines(STAR, 2 * FEWEST - 1)
    assert score("--adapt", out="grown/") == 0
    assert Path("grown", ADAPTED_MODEL).read_bytes() == known
    Path(STAR).write_text(whole)
    assert score("--adapt", out="grown/") == 0
    assert f"was adapted to {FEWEST} particles only" in capsys.readouterr().out
    assert Path("grown", ADAPTED_MODEL).read_bytes() != known


def test_images_of_another_pixel_size_are_adapted_to_anew(project):
    with_size = Path(STAR).read_text()
    (size,) = read_particles(Path(STAR)).optics
    assert size.pixel_size_angstrom is not None
    Path(STAR).write_text(with_size.replace(f"{size.pixel_size_angstrom:.6f}", "1.200000"))
    assert read_particles(Path(STAR)).optics[0].pixel_size_angstrom == 1.2
    before = Path("External/job004", ADAPTED_MODEL).read_bytes()
    assert score("--adapt") == 0
    assert Path("External/job004", ADAPTED_MODEL).read_bytes() != before


def test_a_damaged_model_is_made_anew(project, capsys):
    model = Path("External/job004", ADAPTED_MODEL)
    known = model.read_bytes()
    model.write_bytes(known[:1000])
    assert score("--adapt") == 0
    assert "So the bundled model is adapted anew" in capsys.readouterr().out
    assert model.read_bytes() == known


def test_a_stop_leaves_the_model_of_the_run_before(project, monkeypatch):
    model = Path("External/job004", ADAPTED_MODEL)
    known = model.read_bytes()

    def stopped(*arguments, **named):
        raise Aborted("stopped")

    monkeypatch.setattr(adaptation.Fit, "run", stopped)
    assert score("--adapt", "--rescore") == 3
    assert model.read_bytes() == known


def test_what_adapting_leaves_unknown_is_said(project):
    particles = read_particles(Path(STAR))
    models = read_models([Path("External/job004", ADAPTED_MODEL)])
    chosen = models.choose(scores_of("External/job004/particles.star"), None)
    (lost,) = report._lost(particles, models, chosen)
    assert "adapted without labels" in lost
    scores = Scores(chosen.values, BadImages(particles), 1.0, 0, *[np.empty(0)] * 2, 0.0)
    notes = list(report._score_notes(models, particles, scores, chosen, None))
    assert re.search(r"would accept .*\d\.\d% of white noise", notes[0])
    assert not any("bundled" in note for note in notes)


def test_the_adapted_model_scores_elsewhere_and_does_not_outlive_a_run_without_it(project):
    model = Path("External/job004", ADAPTED_MODEL)
    assert score("--weights", str(model), out="other/") == 0
    for name in ("particles.star", "scores.csv"):
        assert Path("other", name).read_bytes() == Path("External/job004", name).read_bytes()
    assert score("--weights", str(model)) == 2  # it would be removed as what an earlier run left
    assert score() == 0
    assert not model.exists()


def test_to_too_few_particles_nothing_is_adapted(project, capsys):
    first_lines(STAR, FEWEST - 1)
    assert score("--adapt", out="few/") == 0
    assert f"needs {FEWEST} particles" in capsys.readouterr().out
    assert not Path("few", ADAPTED_MODEL).exists()
    bundled = scores_of("External/job003/particles.star")
    assert np.array_equal(scores_of("few/particles.star"), bundled[: FEWEST - 1])


@pytest.mark.parametrize("words", [["--weights", "model.safetensors"], []])
def test_adapting_is_of_the_bundled_model_and_needs_a_folder(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    project_with_model()
    place = ["--o", "out/"] if words else ["--out_file", "scores.csv"]
    assert job.main(["score", "--in_parts", STAR, "--adapt", *place, *words]) == 2
    assert "--adapt is of the bundled model" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["recall=0.95", "precision=0.9", "balanced"])
def test_an_adapted_model_is_not_asked_what_labels_would_tell(tmp_path, monkeypatch, capsys, asked):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    assert score("--adapt", "--threshold", asked) == 2
    assert f"--threshold {asked} is for models" in capsys.readouterr().err


def test_bad_images_teach_nothing_and_are_told_as_without_adapting(project, capsys):
    stack = next(Path("Extract/job001/Micrographs").glob("*.mrcs"))
    with mrcfile.open(stack, "r+") as file:
        file.data[3] = np.nan
    assert score("--adapt", out="bad/") == 1
    assert "1 of 200 images can't be used" in capsys.readouterr().err
    assert score("--adapt", "--skip_bad", out="bad/") == 0
    row = Path("bad/bad_images.csv").read_text().splitlines()[1].split(",")
    assert row[1].endswith(f"4@{stack}")
    assert scores_of("bad/particles.star")[int(row[0])] == 0

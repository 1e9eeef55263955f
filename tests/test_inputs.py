"""What is read may change under us: then nothing is made of it, and nothing is kept of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import making
import numpy as np
import pytest
from making import JOB, TRAIN_JOB, scores_of, train_words

from relion_cryofilter import score_images
from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.relion import job

STAR, STACK = "Extract/job001/particles.star", "Extract/job001/Mics/mic3.mrcs"
SCORE = f"score --o {JOB} --in_parts {STAR} --weights model.safetensors --j 1 --any_contrast"
RESULTS = ("particles.star", "scores.csv", "model.safetensors", "metrics.json")


def replaced(path):
    """Put another file of the same size there."""
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


def rewritten_with_its_old_time(path):
    """Write other bytes into the same file and put its time back."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-100:-60] = content[-60:-20]
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def appended(path):
    with path.open("ab") as file:
        file.write(b"\n")


CHANGES = {
    "replaced": replaced,
    "rewritten": rewritten_with_its_old_time,
    "appended": appended,
    "removed": Path.unlink,
}


@pytest.fixture
def changing(monkeypatch):
    """Return what has a change made at the given question whether to stop: once, in mid-run."""

    def when_asked(change, path, at):
        asked = []

        def requested(self):
            asked.append(0)
            if len(asked) == at:
                change(Path(path))
            return False

        monkeypatch.setattr(job.JobFolder, "abort_requested", requested)

    return when_asked


def refused(path, capsys, folder=JOB):
    """Tell whether the job failed in one sentence that names the file, and left no result."""
    said = capsys.readouterr().err
    assert said.count("ERROR") == 1
    assert f"{path} was replaced, changed or removed while this job read it" in said
    assert Path(folder, job.FAILURE).exists()
    return not any(Path(folder, name).exists() for name in RESULTS)


@pytest.mark.parametrize(
    ("path", "how"),
    [(STACK, how) for how in CHANGES if how != "removed"]
    + [(STAR, "replaced"), (STAR, "removed"), ("model.safetensors", "rewritten")],
)
def test_an_input_that_changes_while_it_is_scored_gives_no_result(
    project, changing, capsys, path, how
):
    changing(CHANGES[how], path, at=3)
    assert job.main([*SCORE.split(), "--batch_size", "5"]) == 1
    assert refused(path, capsys)


@pytest.mark.parametrize("path", [STACK, "Select/job003/class_averages.star",
                                  "Class2D/job002/run_it012_data.star"])  # fmt: skip
def test_an_input_that_changes_while_it_is_trained_on_gives_no_model(
    select_project, changing, capsys, path
):
    changing(appended, path, at=4)
    assert job.main(train_words("--epochs 1 --model straight --f 4 --any_contrast").split()) == 1
    assert refused(path, capsys, TRAIN_JOB)


def test_an_input_that_changes_while_it_is_measured_gives_no_figures(
    select_project, changing, capsys
):
    making.tiny_model().save("model.safetensors")
    changing(appended, STACK, at=2)
    words = "metrics --in_parts Select/job003/particles.star --weights model.safetensors --j 1"
    assert job.main([*words.split(), "--any_contrast", "--o", JOB]) == 1
    assert refused(STACK, capsys)


def test_a_file_that_changes_while_it_is_sorted_gives_no_subsets(scored, monkeypatch, capsys):
    path = Path(JOB, "particles.star")

    def changed(*given):
        appended(path)
        return 0.5, "so many"

    monkeypatch.setattr("relion_cryofilter.commands.select.threshold_and_reason", changed)
    assert job.main(f"select --in_parts {path} --threshold keep=0.5 --o External/a".split()) == 1
    assert refused(path, capsys, "External/a")
    assert not list(Path("External/a").glob("particles*"))


@pytest.mark.slow
def test_a_stack_that_was_put_back_leaves_no_score_of_the_other_in_the_journal(
    project, changing, capsys
):
    """Its size and time are those of before, so the journal's records of it would be believed."""
    assert job.main([*SCORE.replace(JOB, "unbroken").split()]) == 0
    shutil.copy2(STACK, "kept.mrcs")
    changing(replaced, STACK, at=2)
    assert job.main([*SCORE.split(), "--batch_size", "5"]) == 1
    assert refused(STACK, capsys)
    shutil.copy2("kept.mrcs", STACK)
    assert job.main(SCORE.split()) == 0
    again, unbroken = scores_of(f"{JOB}particles.star"), scores_of("unbroken/particles.star")
    assert np.array_equal(again, unbroken)


def test_a_file_that_changed_since_it_was_read_is_refused_to_scripts_too(project):
    particles = read_particles(Path(STAR))
    appended(Path(STAR))
    with pytest.raises(CryoFilterError, match="replaced, changed or removed"):
        list(particles.table.columns(["rlnImageName"]))
    assert len(score_images(STAR, "model.safetensors", any_contrast=True)) == 48

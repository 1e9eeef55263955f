"""The quality benchmark at the smallest scale: it runs, and its table holds what was measured."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys

import mrcfile
import numpy as np
import pytest
from making import ROOT

sys.path.insert(0, str(ROOT / "benchmarks/quality"))

import classes as quality_classes
import sets
import table
from runs import FINE_TUNED, Run
from runs import test_part as kept_for_test


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A set of 40 micrographs of 20 images; junk of all kinds."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    kinds = rng.choice(["particle", "broken", "empty"], 800, p=[0.5, 0.25, 0.25])
    mrcfile.write(folder / "sim.mrcs", rng.normal(size=(800, 16, 16)).astype(np.float32))
    names = np.repeat([f"{number:02d}.mrc" for number in range(40)], 20)
    return sets.LabelledImages(
        "sim of nothing", folder / "sim.mrcs", names, kinds == "particle", kinds
    )


def test_wrong_labels_are_as_many_and_of_the_kinds_that_are_said(data):
    labels = data.noisy_labels(0.1, 0)
    wrong = labels != data.good
    assert set(data.kinds[wrong & ~data.good]) == {"broken"}
    assert (wrong & ~data.good).sum() == round(0.1 * (data.kinds == "broken").sum())
    assert (wrong & data.good).sum() == round(0.1 * data.good.sum())
    assert np.array_equal(data.noisy_labels(0, 0), data.good)
    flipped = data.noisy_labels(0.1, 0, sets.FLIPS) != data.good
    assert flipped.sum() == 80
    assert {"particle", "broken", "empty"} == set(data.kinds[flipped])


def test_whole_micrographs_are_kept_for_the_test(data):
    test = kept_for_test(data, 3)
    assert not set(data.micrographs[test]) & set(data.micrographs[~test])
    assert abs(test[data.good].mean() - 0.3) < 0.1


def test_intervals_hold_the_truth_and_differences_are_paired(data, tmp_path):
    """Scores of known AUC (0.76): the table's mean and interval are right."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "runs" / "sim"
    folder.mkdir(parents=True)
    for seed in range(3):
        rows = np.flatnonzero(kept_for_test(data, seed))
        scores = data.good[rows] + rng.normal(size=len(rows))
        for model in ("a", "b"):
            stem = folder / Run(model, None, seed, 0.1).stem
            stem.with_suffix(stem.suffix + ".json").write_text("{}")
            np.savez(f"{stem}.npz", rows=rows, scores=scores)
    results = table.Results(data, tmp_path, 3)
    found = [results.runs(model, None, 0.1) for model in ("a", "b")]
    assert all(len(paths) == 3 for paths in found)
    one, two = (results.auc_draws(paths) for paths in found)
    value, low, high = results.interval(one)
    assert low < 0.76 < high
    assert abs(value - 0.76) < 0.05
    assert high - low < 0.15
    assert results.interval(one - two) == (0.0, 0.0, 0.0)
    assert results.runs("a", 300) == []


def test_classes_are_kept_by_what_they_hold_or_by_mistake(data, tmp_path, monkeypatch):
    """Class 1: mostly good; class 2: junk only; class 3: all of the second molecule."""
    kinds = np.array(["particle", "particle", "empty", "empty", "broken", "other", "other"])
    classes = [1, 1, 1, 2, 2, 3, 3]
    known = dataclasses.replace(data, name="classified a", kinds=kinds, good=kinds == "particle")
    rows = "".join(f"{n + 1:06d}@a.mrcs {classes[n]}\n" for n in (3, 1, 0, 2, 6, 5, 4))
    head = "data_optics\n\nloop_\n_rlnOpticsGroup\n1\n\ndata_particles\n\nloop_\n"
    with gzip.open(tmp_path / "classified_a_data.star.gz", "wt") as file:
        file.write(f"{head}_rlnImageName\n_rlnClassNumber\n{rows}\n")
    monkeypatch.setattr(quality_classes, "KEPT", tmp_path)
    assert quality_classes.class_numbers(known).tolist() == classes
    assert quality_classes.class_labels(known).tolist() == [True] * 3 + [False] * 4
    with_mistake = quality_classes.class_labels(known, mistake=True)
    assert with_mistake.tolist() == [True] * 3 + [False] * 2 + [True] * 2


def test_what_was_asked_of_thresholds_is_compared_with_what_was_got(data, tmp_path):
    folder = tmp_path / "runs" / "sim"
    folder.mkdir(parents=True)
    further = dataclasses.replace(data, name="sim further")
    known = dataclasses.replace(data, further=further)
    rows, scores = np.arange(800), np.where(data.good, 0.9, 0.1)
    scores[np.flatnonzero(data.good)[: round(0.02 * data.good.sum())]] = 0.2  # recall .98
    for seed in range(3):
        stem = folder / Run(FINE_TUNED, None, seed, 0.1).stem
        facts = {"threshold": 0.5, "precise": 0.5}
        stem.with_suffix(stem.suffix + ".json").write_text(json.dumps(facts))
        np.savez(f"{stem}.npz", rows=rows, scores=scores, further=scores)
    more = 100 * (scores[data.good] >= 0.5).mean() - 95
    found = table._thresholds([table.Results(known, tmp_path, 3)]).splitlines()
    cells = [cell.strip() for cell in found[-1].strip("|").split("|")]
    assert cells[:5] == ["a tenth wrong, look-alikes", "3", "0", "3", f"{more:+.1f} ± 0.0"]
    assert cells[6:] == ["0", "0", "0", "+10.0 ± 0.0"]


@pytest.mark.slow
def test_the_benchmark_explains_itself():
    command = [sys.executable, str(ROOT / "benchmarks/quality"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

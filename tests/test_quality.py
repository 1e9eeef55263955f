"""The quality benchmark at the smallest scale: it runs, and its table holds what was measured."""

from __future__ import annotations

import subprocess
import sys

import mrcfile
import numpy as np
import pytest
from making import ROOT

sys.path.insert(0, str(ROOT / "benchmarks/quality"))

import sets
import table
from runs import Run
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


@pytest.mark.slow
def test_the_benchmark_explains_itself():
    command = [sys.executable, str(ROOT / "benchmarks/quality"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

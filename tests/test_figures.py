"""Figures are drawn in full, for large and for poor sets, and are never left half written."""

from __future__ import annotations

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from making import made_set

from relion_cryofilter.results import figures
from relion_cryofilter.results.metrics import curves, evaluate


def made_history(epochs, auc=0.9):
    return [
        {
            "epoch": epoch, "train_loss": 1 / epoch, "train_acc": 1 - 0.3 / epoch,
            "val_loss": 1 / epoch + 0.1, "val_acc": 1 - 0.4 / epoch,
            "val_auc": auc - 0.001 * abs(epoch - 3), "learning_rate": 1e-3, "seconds": 12.0,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def written(tmp_path, monkeypatch, draw, *arguments):
    """Draw; return the figure's texts and the picture's shape."""
    drawn = []
    save = figures._save
    monkeypatch.setattr(
        figures, "_save", lambda figure, path: drawn.append(save(figure, path) or figure)
    )
    draw(tmp_path / "a.png", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    texts = [text.get_text() for text in drawn[0].findobj(matplotlib.text.Text)]
    return texts, matplotlib.image.imread(tmp_path / "a.png").shape


@pytest.fixture(scope="module", params=["two classes", "one class", "one image"])
def measured(request):
    labels, scores, groups = made_set(3000)
    if request.param == "one class":
        labels = np.ones_like(labels)
    rows = slice(0, 1 if request.param == "one image" else 3000)
    labelled = labels[rows], scores[rows]
    return curves(*labelled), evaluate(*labelled, groups[rows], 0.412345, resamples=20)


@pytest.mark.parametrize("name", ["roc", "precision_recall", "reliability"])
def test_each_curve_is_drawn_with_its_figure_and_threshold(tmp_path, monkeypatch, measured, name):
    points, evaluation = measured
    draw = getattr(figures, f"save_{name}")
    texts, shape = written(tmp_path, monkeypatch, draw, points, evaluation)
    assert shape == (600, 750, 4)
    metric = {"roc": "auc", "precision_recall": "average_precision", "reliability": "ece"}[name]
    assert any(text.endswith(f" {getattr(evaluation, metric)}") for text in texts)
    two_classes = 0 < evaluation.n_positive < evaluation.n
    if name != "reliability":
        assert ("undefined: one class only" in texts) != two_classes
        assert "threshold 0.412345" in texts or not two_classes


def test_the_confusion_matrix_shows_counts_and_shares(tmp_path, monkeypatch, measured):
    texts, shape = written(tmp_path, monkeypatch, figures.save_confusion_matrix, measured[1])
    assert shape == (600, 750, 4)
    counts = [f"{count:,}" for row in measured[1].confusion for count in row]
    assert [text.split("\n")[0] for text in texts if "%" in text] == counts
    assert {"good", "bad", "accepted", "rejected"} <= set(texts)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_histogram_counts_classes_and_accepted_images(tmp_path, monkeypatch, labelled):
    labels, scores, _ = made_set(3000)
    texts, shape = written(
        tmp_path,
        monkeypatch,
        figures.save_score_histogram,
        labels if labelled else None,
        scores,
        0.6,
    )
    assert shape == (600, 750, 4)
    assert f"threshold 0.6: {np.sum(scores >= 0.6):,} accepted" in texts
    expected = (
        [f"{labels.sum():,} good", f"{np.sum(~labels):,} bad"] if labelled else ["3,000 images"]
    )
    assert set(expected) <= set(texts)


@pytest.mark.parametrize(("epochs", "best"), [(1, 1), (25, 3)])
def test_the_history_marks_the_epoch_that_is_kept(tmp_path, monkeypatch, epochs, best):
    history = made_history(epochs)
    texts, shape = written(tmp_path, monkeypatch, figures.save_history, history, best)
    assert shape == (600, 750, 4)
    assert f"Best epoch {best}: validation AUC {history[best - 1]['val_auc']:.3f}" in texts


def test_the_history_says_that_no_epoch_helped(tmp_path, monkeypatch):
    texts, _ = written(tmp_path, monkeypatch, figures.save_history, made_history(4), 0)
    assert "No epoch did better than the start" in texts


def test_a_drawing_that_fails_leaves_the_old_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    figure, _ = figures._new_figure()
    figure.savefig = lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        figures._save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_figures_do_without_pyplot():
    code = (
        "import sys; import relion_cryofilter.results.figures;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

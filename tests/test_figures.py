"""Charts are drawn in full, for large and for poor sets, and are never left half written."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from making import made_set
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from relion_cryofilter.evaluation import curves, evaluate
from relion_cryofilter.files import write_text
from relion_cryofilter.results import charts
from relion_cryofilter.results.summaries import cuts_of, histogram_of


def made_history(epochs, auc=0.9):
    return [
        {
            "epoch": epoch, "train_loss": 1 / epoch, "train_acc": 1 - 0.3 / epoch,
            "val_loss": 1 / epoch + 0.1, "val_acc": 1 - 0.4 / epoch,
            "val_auc": auc - 0.001 * abs(epoch - 3), "learning_rate": 1e-3, "seconds": 12.0,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def texts_of(chart):
    """Draw; return the figure's texts."""
    figure = Figure()
    chart.draw(figure.add_subplot())
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.fixture(scope="module", params=["two classes", "one class", "one image"])
def measured(request):
    labels, scores, groups = made_set(3000)
    if request.param == "one class":
        labels = np.ones_like(labels)
    rows = slice(0, 1 if request.param == "one image" else 3000)
    labelled = labels[rows], scores[rows]
    return curves(*labelled), evaluate(*labelled, groups[rows], 0.412345, resamples=20)


def test_each_chart_is_saved_under_its_name(tmp_path, measured):
    for chart in (*charts.evaluation_charts(*measured), *charts.history_charts(made_history(3), 1)):
        chart.save(tmp_path)
    names = {"roc", "precision_recall", "reliability", "confusion_matrix", "history"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    for path in tmp_path.iterdir():
        assert matplotlib.image.imread(path).shape == (600, 750, 4)


@pytest.mark.parametrize("name", ["roc", "precision_recall", "reliability"])
def test_each_curve_is_drawn_with_its_figure_and_threshold(measured, name):
    found = {chart.name: chart for chart in charts.evaluation_charts(*measured)}
    texts, evaluation = texts_of(found[name]), measured[1]
    metric = {"roc": "auc", "precision_recall": "average_precision", "reliability": "ece"}[name]
    assert any(text.endswith(f" {getattr(evaluation, metric)}") for text in texts)
    two_classes = 0 < evaluation.n_positive < evaluation.n
    if name != "reliability":
        assert ("undefined: one class only" in texts) != two_classes
        assert "threshold 0.412345" in texts or not two_classes


def test_the_confusion_matrix_shows_counts_and_shares(measured):
    texts = texts_of(charts.EVALUATION[-1].of(*measured))
    counts = [f"{count:,}" for row in measured[1].confusion for count in row]
    assert [text.split("\n")[0] for text in texts if "%" in text] == counts
    assert {"good", "bad", "accepted", "rejected"} <= set(texts)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_histogram_counts_classes_and_accepted_images(labelled):
    labels, scores, _ = made_set(3000)
    n = int(np.sum(scores >= 0.6))
    asked = (scores, 0.6, n, labels if labelled else None)
    histogram, retention = charts.score_charts(histogram_of(*asked), cuts_of(*asked))
    expected = {"threshold 0.6", f"{n:,} accepted", f"{3000 - n:,} rejected"}
    if labelled:
        expected = {f"{labels.sum():,} good", f"{np.sum(~labels):,} bad"}
        expected.add(f"threshold 0.6: {n:,} accepted")
    assert expected <= set(texts_of(histogram))
    assert f"threshold 0.6 keeps {n / 30:.1f} %" in texts_of(retention)
    assert histogram.moves
    assert retention.moves


@pytest.mark.parametrize(("epochs", "best"), [(1, 1), (25, 3)])
def test_the_history_marks_the_epoch_that_is_kept(epochs, best):
    history = made_history(epochs)
    (chart,) = charts.history_charts(history, best)
    auc = history[best - 1]["val_auc"]
    assert f"Best epoch {best}: validation AUC {auc:.3f}" in texts_of(chart)
    assert "dashed line" in chart.note


def test_the_history_says_that_no_epoch_helped():
    (chart,) = charts.history_charts(made_history(4), 0)
    assert "No epoch did better than the start" in texts_of(chart)
    assert "those weights are kept" in chart.note


def test_the_history_of_a_training_on_all_labels_has_no_best_epoch():
    nothing = {"val_loss": np.nan, "val_acc": np.nan, "val_auc": np.nan}
    (chart,) = charts.history_charts([{**line, **nothing} for line in made_history(4)], 4)
    assert "The training on all labels" in texts_of(chart)
    assert not [text for text in texts_of(chart) if "validation" in text or "did better" in text]


def test_a_drawing_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="disk full"):
        charts.Chart("a", "", "", "", lambda axes: None).save(tmp_path)
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_figures_do_without_pyplot_and_names_without_matplotlib(tmp_path):
    code = (
        "import sys; from pathlib import Path; import relion_cryofilter.results.report_files;"
        "import relion_cryofilter.results.charts as charts;"
        "assert 'matplotlib' not in sys.modules;"
        "charts.Chart('a', '', '', '', lambda axes: None).save(Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_a_broken_matplotlib_costs_the_report_and_nothing_else(tmp_path, monkeypatch, caplog):
    from relion_cryofilter.results.report_files import write_report

    write_text(tmp_path / "report.html", "of an earlier run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        assert write_report(tmp_path, lambda: SimpleNamespace(charts=[])) == ()
    assert "No report (logfile.pdf, report.html) could be made: ModuleNotFoundError" in caplog.text
    assert not list(tmp_path.iterdir())

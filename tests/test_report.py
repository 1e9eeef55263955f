"""logfile.pdf and report.html: they say what the files say, whatever the input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import making
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import JOB, ROOT, any_score, data_of, rows_of, score_project, unhurried
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.decomposition import PCA

from relion_cryofilter.evaluation import curves, evaluate
from relion_cryofilter.images.thumbnails import THUMBNAIL_PX, sprite, thumbnails
from relion_cryofilter.options import ScoreOptions
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.progress import counted
from relion_cryofilter.relion import job
from relion_cryofilter.results import charts
from relion_cryofilter.results import report as reporting
from relion_cryofilter.results.charts import distinct_names
from relion_cryofilter.results.report import options_text, select_command
from relion_cryofilter.results.summaries import (
    Cuts,
    cuts_of,
    feature_map,
    histogram_edges,
    histogram_of,
    micrographs_of,
    trend_of,
)


def pages_of(path=Path(JOB, "logfile.pdf")):
    return len(re.findall(rb"/Type /Page\b", path.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize("job_star", ["", "_rlnJobTypeLabel relion.external\n"])
def test_the_pdf_is_registered_for_relions_display_menu(project, job_star):
    Path(JOB).mkdir(parents=True)
    Path(JOB, "job.star").write_text(job_star)
    score_project()
    nodes = Path(JOB, "RELION_OUTPUT_NODES.star").read_text()
    assert f"{JOB}logfile.pdf 13 LogFile.pdf.relion\n" in nodes
    assert Path(JOB, "logfile.pdf").read_bytes().startswith(b"%PDF")


def test_counts_of_the_report_and_of_runout_are_the_rows_written(project, capsys):
    score_project()
    said = capsys.readouterr().out
    data = data_of()
    kept, lost = (rows_of(f"particles_{side}.star") for side in ("accepted", "rejected"))
    assert data["accepted"][data["start"]] == kept
    assert data["n"] == kept + lost == 48
    assert "Read Extract/job001/particles.star: 48 particles in 4 stacks, 4 micrographs, 1" in said
    assert "To do: score every particle and accept at the model's threshold" in said
    *_, threshold, scored = said.splitlines()
    assert threshold.startswith("Threshold ")
    assert scored.endswith(f": {kept} accepted ({100 * kept / 48:.1f} %), {lost} rejected.")
    listed = dict(re.findall(r"^  (\S+) +(.*)$", said[said.index("Results are in") :], re.M))
    assert listed["particles.star"] == "48 particles with scores"
    assert listed["particles_accepted.star"] == counted(kept, "particle")
    assert listed["particles_rejected.star"] == counted(lost, "particle")
    assert set(listed) == {
        path.name for path in Path(JOB).iterdir() if not path.name.startswith("RELION")
    }


def test_the_page_holds_everything_and_asks_nobody(scored):
    text = Path(JOB, "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert set(re.findall(r'(?:src|href)="([^",]*)', text)) <= {"data:image/png;base64", "data:"}
    assert "default-src 'none'" in text
    for said in ("Model", "hash ", "Options", "Versions", "particles/s", "matplotlib"):
        assert said in text


def test_odd_names_stay_names(project):
    star = Path("Extract/job001/particles.star")
    Path("<b>&$x^$.star").write_text(star.read_text().replace("Mics/mic0.mrc ", "Mics/</s$1$.mrc "))
    score_project(source="--in_parts <b>&$x^$.star")
    assert "<h1>Scores of &lt;b&gt;&amp;$x^$.star</h1>" in Path(JOB, "report.html").read_text()
    assert any(name.endswith("Mics/</s$1$.mrc") for name in data_of()["names"])


STAR_WITHOUT = {
    "micrograph names": ("_rlnMicrographName", "_rlnSomethingElse"),
    "defocus": ("_rlnDefocus", "_rlnElse"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lacking", STAR_WITHOUT)
def test_what_the_table_lacks_is_left_out(project, lacking):
    star = Path("Extract/job001/particles.star")
    star.write_text(star.read_text().replace(*STAR_WITHOUT[lacking]))
    score_project()
    text = Path(JOB, "report.html").read_text()
    assert "Acceptance by micrograph" in text
    assert ("The input names no micrographs" in text) == (lacking == "micrograph names")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--threshold 0", "All particles are accepted"),
        ("--threshold 1", "No particles are accepted"),
        ("--threshold count=7", ""),
        ("--tta --features", ""),
    ],
)
def test_a_cut_at_either_end_is_reported(project, more, said):
    score_project(more)
    data = data_of()
    assert data["accepted"][data["start"]] == rows_of("particles_accepted.star")
    assert said in Path(JOB, "report.html").read_text()
    assert pages_of() >= 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_particle_or_two_are_reported(project, n):
    star = Path("Extract/job001/particles.star")
    lines = star.read_text().splitlines(keepends=True)
    rows = [line for line in lines if "@" in line]
    star.write_text("".join(line for line in lines if "@" not in line or line in rows[:n]))
    score_project()
    data = data_of()
    assert data["n"] == len(data["names"]) == n
    assert pages_of() >= 2


def test_equal_scores_are_reported(project):
    making.write_stack(Path("same.mrcs"), np.repeat(making.blobs(8, 32)[7:], 5, axis=0))
    score_project(source="--mrc same.mrcs", more="--any_contrast")
    text = Path(JOB, "report.html").read_text()
    assert "All scores are equal" in text
    assert data_of()["command"] == ""
    assert "no STAR" not in text


def test_plain_stacks_are_reported_and_files_without_a_folder_get_no_report(project):
    stack = "Extract/job001/Mics/mic0.mrcs"
    score_project(source=f"--mrc {stack}", more="--any_contrast")
    assert data_of()["n"] == 12
    words = f"score --mrc {stack} --out_file x/scores.csv --weights model.safetensors"
    assert job.main([*words.split(), "--any_contrast"]) == 0
    assert [path.name for path in Path("x").iterdir()] == ["scores.csv"]


@pytest.mark.slow
def test_bad_images_are_counted_and_not_shown(project):
    stack = making.blobs(12, 32)
    stack[3] = 0
    making.write_stack(Path("Extract/job001/Mics/mic0.mrcs"), stack)
    score_project("--skip_bad --threshold 0")
    data = data_of()
    assert data["accepted"][data["start"]] == rows_of("particles_accepted.star") == 47
    assert len(data["names"]) == 47
    assert "1 of 48 images can&#x27;t be used" in Path(JOB, "report.html").read_text()


def test_a_report_that_fails_is_a_loud_warning_and_loses_nothing(project, monkeypatch, capsys):
    score_project()
    capsys.readouterr()

    def fail(*_):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(reporting, "score_report", fail)
    score_project()
    said = capsys.readouterr().out
    assert (
        "WARNING: No report (logfile.pdf, report.html) could be made: RuntimeError: no fonts"
        in (said)
    )
    assert rows_of("particles.star") == 48
    assert Path(JOB, "RELION_JOB_EXIT_SUCCESS").exists()
    assert "logfile" not in Path(JOB, "RELION_OUTPUT_NODES.star").read_text()
    assert not Path(JOB, "report.html").exists()


@given(st.lists(any_score, min_size=1, max_size=60), any_score, st.data())
@unhurried
def test_each_cut_counts_what_select_would_accept(raw, threshold, data):
    scores, threshold = np.round(raw, 6), round(threshold, 6)
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=len(raw), max_size=len(raw))))
    cuts = cuts_of(scores, threshold, int((scores >= threshold).sum()), labels)
    assert cuts.thresholds[cuts.default] == threshold
    for text, accepted, good in zip(cuts.thresholds, cuts.accepted, cuts.good):
        kept = scores >= float(f"{text:.6f}")
        assert (accepted, good) == (kept.sum(), (kept & labels).sum())


def test_the_cuts_of_many_particles_are_few():
    scores = np.round(np.random.default_rng(0).beta(0.3, 0.3, 300_000), 6)
    assert isinstance(cuts := cuts_of(scores, 0.5, int((scores >= 0.5).sum())), Cuts)
    assert len(cuts.thresholds) < 1100


def test_narrow_scores_are_seen_from_near():
    assert histogram_edges(np.array([0.0, 1.0]), 0.5)[[0, -1]].tolist() == [0, 1]
    low, high = histogram_edges(np.array([0.41, 0.43]), 0.42)[[0, -1]]
    assert 0.39 < low < 0.41
    assert 0.43 < high < 0.45
    assert histogram_of(np.array([0.41, 0.43]), 0.42, 1).counts.sum() == 2
    assert histogram_of(np.repeat([0.01, 0.3, 0.6, 0.9], [9000, 10, 20, 30]), 0.5, 50).steep


def test_micrographs_that_accept_far_less_are_named():
    rng = np.random.default_rng(0)
    names = [f"mic{number}.mrc" for number in range(40)]
    of = np.repeat(np.arange(40), 100)
    accepted = rng.random(4000) < np.where(of == 7, 0.05, 0.6)
    table = micrographs_of(names, of, accepted)
    assert table.outliers()[0] == [7]
    (chart,) = charts.set_charts(table)
    chart.draw(axes := Figure().subplots())
    assert axes.texts[0].get_text().startswith("Lowest:\n")
    assert axes.texts[0].get_text().endswith("mic7")
    title, (line,) = table.in_words()[0]
    assert title == "Lowest acceptance: outlying micrographs"
    assert line.startswith("mic7.mrc: ")
    assert charts.set_charts(micrographs_of(["one"], of * 0, accepted)) == []


def test_names_are_shortened_by_what_all_share():
    names = ["a/Hole_0012_fractions.mrc", "b/Hole_0022_fractions.mrc"]
    assert distinct_names(names) == ["Hole_0012", "Hole_0022"]
    assert distinct_names(["a/1.mrc"]) == ["1.mrc"]
    assert distinct_names(["x.mrc", "x.mrc"]) == ["x", "x"]


def test_the_interval_of_a_trend_is_wilsons():
    values = np.repeat([1.0, 2.0], [40, 60])
    accepted = np.arange(100) % 4 == 0
    trend = trend_of("Defocus (µm)", values, accepted)
    expected = binomtest(15, 60).proportion_ci(0.95, "wilson")
    assert trend.low[-1] == pytest.approx(expected.low)
    assert trend.high[-1] == pytest.approx(expected.high)
    assert trend_of("Defocus (µm)", np.ones(5), accepted[:5]) is None
    assert trend_of("Defocus (µm)", np.full(5, np.nan), accepted[:5]) is None


def test_the_map_of_features_is_scikit_learns_pca():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 8)) * np.array([5, 3, 1, 1, 1, 1, 1, 1])
    found = feature_map(features, np.zeros(200), 200)
    pca = PCA(2).fit(features)
    assert np.allclose(np.abs(found.xy), np.abs(pca.transform(features)))
    assert found.variance == pytest.approx(pca.explained_variance_ratio_)
    assert feature_map(np.ones((9, 4)), np.zeros(9), 9) is None
    assert feature_map(np.full((9, 4), np.nan), np.zeros(9), 9) is None


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 127, 127), (1, 200, 180)])
def test_pictures_have_one_size_and_one_contrast(shape):
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape) * np.arange(1, shape[0] + 1)[:, None, None] * 7 + 1000
    made = thumbnails(images, 1.5)
    assert made.shape == (shape[0], THUMBNAIL_PX, THUMBNAIL_PX)
    assert np.allclose(made.mean(axis=(1, 2)), 127.5, atol=2)
    assert np.allclose(made.std(axis=(1, 2)), 127.5 / 3, rtol=0.05)
    for blank in (1.0, 0.1, 1000.1):
        assert (thumbnails(np.full(shape, blank), None) == 128).all()


def test_the_picture_of_a_turned_particle_is_the_picture_turned():
    image = np.random.default_rng(0).normal(size=(1, 100, 100))
    for turn in (np.fliplr, np.rot90):
        made, expected = thumbnails(turn(image[0])[None], 1.5)[0], turn(thumbnails(image, 1.5)[0])
        assert np.abs(made.astype(int) - expected).max() <= 1


def test_a_picture_is_the_image_in_small():
    image = np.zeros((1, 128, 128))
    image[0, 20:40, 70:100] = 1
    y, x = np.unravel_index(thumbnails(image, 1.0)[0].argmax(), (64, 64))
    assert abs(y - 14.5) < 5
    assert abs(x - 42) < 7


def test_pictures_stand_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8)
    assert sprite(images, 2).shape == (6, 6)
    assert sprite(images, 2)[::2, ::3].tolist() == [[0, 1], [2, 3], [4, 0]]


def test_columns_are_read_as_numbers_whatever_the_text(tmp_path):
    star = tmp_path / "a.star"
    star.write_text(
        "data_\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n_rlnCoordinateX #3\n"
        '1@a.mrcs 1.5e4 "3"\n2@a.mrcs nonsense 4 # 5\n3@a.mrcs nan 5\n\n'
    )
    particles = read_particles(star)
    table = particles.table.numbers(["rlnCoordinateX", "rlnDefocusU", "x"])
    assert list(table) == ["rlnCoordinateX", "rlnDefocusU"]
    assert table["rlnCoordinateX"].tolist() == [3, 4, 5]
    assert np.array_equal(table["rlnDefocusU"], np.float32([15000, np.nan, np.nan]), equal_nan=True)


def test_options_are_told_as_they_were_typed():
    options = ScoreOptions(in_parts="my file.star", o="x/", tta=True, threshold="keep=0.6")
    text = options_text("score", options)
    assert shlex.split(text)[0] == "score"
    assert "--in_parts 'my file.star'" in text
    assert "--tta" in text.split()
    assert "--threshold keep=0.6" in text
    words = shlex.split(select_command(Path("a b"), "particles.star", "cryofilterScore"))
    assert words[3] == "a b/particles.star"
    assert words[-2:] == ["--score_label", "cryofilterScore"]


def test_one_is_not_many():
    assert [counted(n, "micrograph") for n in (0, 1, 2000)] == [
        "0 micrographs", "1 micrograph", "2,000 micrographs",
    ]  # fmt: skip


def test_a_single_bin_of_the_reliability_is_a_point_and_said_to_be_one():
    labels, scores = [True, False, True], [0.5, 0.5, 0.5]
    found = charts.evaluation_charts(
        curves(labels, scores), evaluate(labels, scores, [0, 1, 2], 0.5)
    )
    {chart.name: chart for chart in found}["reliability"].draw(axes := Figure().subplots())
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "the only bin that holds images" in texts


@pytest.fixture
def labelled(project):
    lines = Path("Extract/job001/particles.star").read_text().splitlines(keepends=True)
    for name, first in (("good", False), ("bad", True)):
        kept = [x for x in lines if "@" not in x or (int(x.split("@")[0][-6:]) < 7) == first]
        Path(f"{name}.star").write_text("".join(kept))
    return "--pos good.star --neg bad.star --any_contrast"


@pytest.mark.slow
def test_a_training_reports_its_test_part_its_epochs_and_its_doubts(labelled):
    words = f"train --o {JOB} {labelled} --epochs 2 --model straight --f 4 --split 0.7"
    assert job.main(words.split()) == 0
    text = Path(JOB, "report.html").read_text()
    for said in ("ROC", "Precision and recall", "Reliability", "Confusion matrix", "Loss",
                 "Self-tests", "pure noise", "Labels", "False positives", "False negatives",
                 "training 2"):  # fmt: skip
        assert said in text, said
    figures_ = json.loads(Path(JOB, "metrics.json").read_text())
    data = data_of()
    (tn, fp), (fn, tp) = figures_["confusion"]
    assert data["accepted"][data["start"]] == fp + tp
    assert data["good"][data["start"]] == tp
    assert (data["n"], data["nGood"]) == (tn + fp + fn + tp, tp + fn)
    galleries = {title.split(":")[0]: members for title, members, _ in data["galleries"]}
    assert len(galleries["False positives"]) == fp
    assert len(galleries["False negatives"]) == fn
    assert "logfile.pdf 13" in Path(JOB, "RELION_OUTPUT_NODES.star").read_text()


@pytest.mark.slow
def test_a_measurement_reports_the_whole_labelled_set(labelled, capsys):
    assert job.main(f"metrics --o {JOB} {labelled} --weights model.safetensors".split()) == 0
    data = data_of()
    assert (data["n"], data["nGood"], data["command"]) == (48, 24, "")
    text = Path(JOB, "report.html").read_text()
    assert "Features: mean score" in text
    assert "Loss" not in text
    assert "report.html" in capsys.readouterr().out


@pytest.mark.slow
def test_the_report_of_a_large_set_is_quick_and_small():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/report.py", "--n", "100000"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    processor = float(re.search(r"\(([\d.]+) s of the processor\)", done.stdout)[1])
    sizes = [float(size) for size in re.findall(r": ([\d.]+) MB$", done.stdout, re.M)]
    assert processor < 10
    assert len(sizes) == 2
    assert max(sizes) < 5


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="needs pdftoppm (poppler-utils)")
def test_the_pdf_opens_in_another_program_and_no_page_is_empty(scored, tmp_path):
    done = subprocess.run(
        ["pdftoppm", "-r", "30", "-gray", f"{JOB}logfile.pdf", tmp_path / "page"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    pages = sorted(tmp_path.glob("page*.pgm"))
    assert len(pages) == pages_of() >= 4
    for page in pages:
        assert np.frombuffer(page.read_bytes()[15:], np.uint8).std() > 5

"""Scores kept in the job's folder: nothing is scored twice, nothing stale is used."""

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from making import blobs, started, tiny_model, write_project, write_stack

from relion_cryofilter.nn.score_cache import ScoreCache, _Record, _whole_records
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.splits import short_hash
from relion_cryofilter.relion import job

pytestmark = pytest.mark.usefixtures("without_report")

OUT = "External/job002/"
JOURNAL = Path(OUT) / "score_cache.journal"


def project_of_120():
    tiny_model().save("model.safetensors")
    return write_project(Path(), n_micrographs=6, per_micrograph=20)


def project_scored_by_sevens():
    project_of_120()
    assert score("--batch_size", "7") == 0


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return project_of_120()


@pytest.fixture
def scored(made_once, tmp_path, monkeypatch):
    """The same, scored once in batches of seven."""
    shutil.copytree(made_once(project_scored_by_sevens), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def score(*words):
    line = ["score", "--in_parts", "Extract/job001/particles.star", "--o", OUT]
    return job.main([*line, "--weights", "model.safetensors", "--any_contrast", "--j", "2", *words])


def scored_now(capsys):
    """Return how many particles the last run scored by itself."""
    last = capsys.readouterr().out.splitlines()[-1]
    scored = re.match(r"Scored ([\d,]+) particle", last)
    assert scored or "were known: " in last
    return int(scored[1].replace(",", "")) if scored else 0


def outputs():
    names = ("particles.star", "particles_accepted.star", "particles_rejected.star", "scores.csv")
    return [(Path(OUT) / name).read_bytes() for name in names]


def records():
    with JOURNAL.open("rb") as file:
        file.readline()
        return list(_whole_records(file))


def size_of_journal():
    return JOURNAL.stat().st_size if JOURNAL.exists() else 0


@pytest.mark.slow
def test_a_second_run_scores_nothing_and_writes_the_same(project, capsys):
    assert score() == 0
    first = outputs()
    assert scored_now(capsys) == 120
    assert score() == 0
    assert scored_now(capsys) == 0
    assert outputs() == first


@pytest.mark.slow
def test_a_grown_star_file_scores_only_what_is_new(project, tmp_path, capsys):
    text = project.read_bytes()
    head, rows = text.split(b"_rlnDefocusAngle #7\n")
    lines = rows.splitlines(keepends=True)
    project.write_bytes(head + b"_rlnDefocusAngle #7\n" + b"".join(lines[:50]) + b" \n")
    assert score() == 0
    assert scored_now(capsys) == 50
    project.write_bytes(text)
    assert score() == 0
    assert scored_now(capsys) == 70
    grown = outputs()
    assert score("--rescore") == 0
    assert scored_now(capsys) == 120
    assert outputs() == grown


def test_a_changed_stack_is_scored_again(scored, tmp_path, capsys):
    write_stack(tmp_path / "Extract/job001/Mics/mic2.mrcs", blobs(20, 32, 99))
    assert score() == 0
    assert scored_now(capsys) == 20


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--tta"], ["--precision", "bf16"], "other model"])
def test_other_models_and_options_score_all_again(scored, words, capsys):
    if words == "other model":
        tiny_model(seed=5).save("model.safetensors")
        words = []
    assert score(*words) == 0
    assert scored_now(capsys) == 120


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 7, 300])
def test_a_cut_off_journal_is_used_as_far_as_it_is_whole(scored, cut, capsys):
    first = outputs()
    os.truncate(JOURNAL, JOURNAL.stat().st_size - cut)
    kept = sum(len(record.places) for record in records())
    assert kept < 120
    assert score("--batch_size", "7") == 0
    assert scored_now(capsys) == 120 - kept
    assert outputs() == first
    assert sum(len(record.places) for record in records()) == 120


def test_a_damaged_journal_is_noticed_and_rebuilt(scored, capsys):
    first = outputs()
    content = bytearray(JOURNAL.read_bytes())
    content[len(content) // 2] ^= 0xFF
    JOURNAL.write_bytes(content)
    assert score("--batch_size", "7") == 0
    assert "can't be read; those images are scored again" in capsys.readouterr().out
    assert outputs() == first
    assert sum(len(record.places) for record in records()) == 120


@pytest.mark.slow
def test_what_is_not_a_journal_is_replaced(project, capsys):
    Path(OUT).mkdir(parents=True)
    JOURNAL.write_bytes(os.urandom(5000))
    assert score() == 0
    assert scored_now(capsys) == 120
    assert score() == 0
    assert scored_now(capsys) == 0


@pytest.mark.slow
def test_bad_images_are_not_kept(project, tmp_path, capsys):
    images = blobs(20, 32)
    images[3] = 0
    write_stack(tmp_path / "Extract/job001/Mics/mic2.mrcs", images)
    assert score("--skip_bad") == 0
    first = outputs()
    assert score("--skip_bad") == 0
    assert outputs() == first
    assert sum(len(record.places) for record in records()) == 119


def test_two_rows_of_one_image_have_one_score(tmp_path):
    star = write_project(tmp_path)
    particles = read_particles(star)
    rows = np.array([4, 7, 4])
    twice = particles.take(rows)
    ScoreCache(tmp_path, "k", particles).add(rows[:2], np.array([0.25, 0.75]))
    assert ScoreCache(tmp_path, "k", twice).values.tolist() == [0.25, 0.75, 0.25]
    assert np.isnan(ScoreCache(tmp_path, "another", twice).values).all()


@pytest.mark.slow
def test_a_job_that_is_killed_ten_times_scores_each_image_once(project, tmp_path):
    """The kills come at random moments of scoring; Continue ends with the unbroken result."""
    for number in range(6):  # enough work to be killed in
        write_stack(tmp_path / f"Extract/job001/Mics/mic{number}.mrcs", blobs(2000, 32, number))
    head = project.read_text().split("_rlnDefocusAngle #7\n")[0] + "_rlnDefocusAngle #7\n"
    rows = "".join(
        f"1 {image + 1:06d}@Extract/job001/Mics/mic{number}.mrcs Mics/mic{number}.mrc 1 1 1 0 \n"
        for image in range(2000)
        for number in range(6)
    )
    project.write_text(head + rows)
    line = [
        sys.executable, "-m", "relion_cryofilter", "score", "--in_parts", str(project), "--o", OUT,
        "--weights", "model.safetensors", "--any_contrast", "--j", "2", "--batch_size", "16",
    ]  # fmt: skip
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        before = size_of_journal()
        with started(line, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and size_of_journal() == before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        assert process.returncode == -signal.SIGKILL, "the job ended before it was killed"
        assert not Path(OUT, "particles.star").exists()
    subprocess.run(line, check=True)
    resumed = outputs()
    found = [(record.stack, place) for record in records() for place in record.places.tolist()]
    assert len(found) == len(set(found)) == 12_000
    subprocess.run([*line, "--rescore"], check=True)
    assert outputs() == resumed


def record_of(scores, key="k", **about):
    """Return a whole record, with a right checksum, of scores that may be wrong."""
    record = _Record(short_hash(key), "s.mrcs", (1, 2), np.arange(len(scores)), np.array(scores))
    line, _, values = record.to_bytes()[8:].partition(b"\n")
    body = json.dumps({**json.loads(line), **about}).encode() + b"\n" + values
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


@pytest.mark.parametrize(
    "record",
    [
        lambda about: record_of([7.5, 0.5], **about),
        lambda about: record_of([np.inf, 0.5], **about),
        lambda about: record_of([np.nan], **about),
        lambda about: record_of([-1e-9], **about),
        lambda about: record_of([0.5], key="another model", **about),
        lambda about: record_of([0.5], **{**about, "n": 10**9}),
        lambda about: record_of([0.5], **{**about, "n": -1}),
        lambda about: record_of([0.5], **{**about, "n": None}),
        lambda about: record_of([0.5], **{**about, "identity": 3}),
        lambda about: record_of([0.5], **{**about, "stack": []}),
        lambda about: struct.pack("<II", 3, zlib.crc32(b"[]\n")) + b"[]\n",
        lambda about: struct.pack("<II", 9000, zlib.crc32(b"[" * 9000)) + b"[" * 9000,
    ],
)
def test_a_record_that_holds_no_scores_of_these_models_is_dropped_and_counted(
    tmp_path, caplog, record
):
    particles = read_particles(write_project(tmp_path))
    path = tmp_path / "score_cache.journal"
    ScoreCache(tmp_path, "k", particles).add(np.array([3]), np.array([0.25]))
    sound = path.read_bytes()
    status = particles.stacks[0].stat()
    identity = [status.st_size, status.st_mtime_ns]
    about = {"stack": particles.stack_names[0], "identity": identity}
    path.write_bytes(sound + record(about) + sound.partition(b"\n")[2])
    with caplog.at_level("WARNING", "relion_cryofilter"):
        values = ScoreCache(tmp_path, "k", particles).values
    assert np.flatnonzero(np.isfinite(values)).tolist() == [3]
    assert "1 record without scores from 0 to 1 by these models" in caplog.text


def test_places_beyond_the_set_take_no_memory(tmp_path):
    particles = read_particles(write_project(tmp_path))
    cache = ScoreCache(tmp_path, "k", particles)
    cache.add(np.array([3]), np.array([0.25]))
    status = particles.stacks[0].stat()
    identity, place = (status.st_size, status.st_mtime_ns), np.array([2**32 - 1])
    name = particles.stack_names[0]
    record = _Record(short_hash("k"), name, identity, place, np.array([0.5]))
    with cache.path.open("ab") as file:
        file.write(record.to_bytes())
    again = ScoreCache(tmp_path, "k", particles).values
    assert np.flatnonzero(np.isfinite(again)).tolist() == [3]


def test_scores_that_were_added_under_another_models_head_are_not_taken_for_its_own(tmp_path):
    """As two programs did that wrote into one folder."""
    particles = read_particles(write_project(tmp_path))
    first, second = (ScoreCache(tmp_path, key, particles) for key in ("a", "b"))
    first.add(np.array([0]), np.array([0.25]))
    second.add(np.array([1]), np.array([0.75]))
    values = ScoreCache(tmp_path, "a", particles).values
    assert np.flatnonzero(np.isfinite(values)).tolist() == [0]

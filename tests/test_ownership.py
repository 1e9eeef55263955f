"""A results folder has one owner at a time, and nothing is written over that is not ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import making
import pytest
from making import JOB, ROOT, score_project, started, wait_until

from relion_cryofilter import locks
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import is_ours, replacing, require_ours
from relion_cryofilter.relion import job

STAR = "Extract/job001/particles.star"
SCORE = f"--in_parts {STAR} --weights model.safetensors --j 1 --any_contrast"
LOCK = Path(JOB, locks.NAME)
OWNER = "import sys, time; from pathlib import Path; from relion_cryofilter.locks import own\n"
OWNER += "own(Path(sys.argv[1])); print('mine', flush=True); time.sleep(600)"


@pytest.fixture
def owner(project):
    """Another program that owns the job's folder."""
    line = [sys.executable, "-c", OWNER, JOB]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with started(line, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"mine\n"
        yield process


def content(folder):
    """Return all that is in a folder, links as links."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_symlink() or path.is_file()
    }


# One owner.


@pytest.mark.parametrize("mode", ["score", "train", "metrics", "select"])
def test_a_folder_in_use_is_refused_to_every_mode_and_stays_as_it_is(owner, capsys, mode):
    Path(JOB, job.SUCCESS).touch()  # whatever the owner leaves
    Path(JOB, ".particles.star.abcd1234.part").touch()
    before = content(JOB)
    more = {"select": "--threshold 0.5"}.get(mode, "")
    assert job.main(f"{mode} --in_parts {STAR} --o {JOB} {more}".split()) == 2
    said = capsys.readouterr().err
    assert f"{Path(JOB)} is in use by another job of this program (process {owner.pid}" in said
    assert content(JOB) == before


def test_the_2020_names_of_folders_are_locked_too(owner, capsys):
    for name in ("--out_dir", "--o elsewhere --weight_dir", "--o elsewhere --history_dir"):
        assert job.main(f"train --in_parts {STAR} {name} {JOB}".split()) == 2
        assert "is in use by another job" in capsys.readouterr().err


def test_a_folder_is_the_same_by_any_name(owner, capsys):
    Path("link").symlink_to(JOB)
    assert job.main(f"score {SCORE} --o link".split()) == 2
    assert "is in use by another job" in capsys.readouterr().err
    assert not Path(JOB, job.FAILURE).exists()


def test_a_dead_owner_blocks_nobody(owner):
    owner.kill()
    owner.wait()
    assert LOCK.exists()
    score_project("--any_contrast")
    assert Path(JOB, job.SUCCESS).exists()
    assert not LOCK.exists()


def test_a_stopped_owner_is_not_dead(owner, capsys):
    owner.send_signal(signal.SIGSTOP)
    assert job.main(f"score {SCORE} --o {JOB}".split()) == 2
    assert "is in use by another job" in capsys.readouterr().err


def written_lock(**changed):
    Path(JOB).mkdir(parents=True)
    LOCK.write_text(json.dumps({**locks._myself(), **changed}))


@pytest.mark.parametrize(
    "changed",
    [{"pid": 999_999_999}, {"start": "1"}, {"boot": "of before"}, {"host": "elsewhere"}],
    ids=str,
)
def test_a_lock_that_a_dead_process_left_is_taken_over(project, monkeypatch, changed):
    """Of no process, of a number given again, of before the last start, of another machine."""
    monkeypatch.setattr(locks, "PATIENCE_S", 0.3)
    monkeypatch.setattr(locks, "BEAT_S", 0.3)
    written_lock(**{"pid": 1, **changed})
    locks.own(Path(JOB))
    assert json.loads(LOCK.read_text()) == locks._myself()
    locks.release(Path(JOB))
    assert not LOCK.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 4000, "null", '{"pid": {}}', "\0" * 9])
def test_a_lock_that_says_nothing_is_taken_over(project, text):
    Path(JOB).mkdir(parents=True)
    LOCK.write_text(text)
    locks.own(Path(JOB))
    locks.release(Path(JOB))
    assert not LOCK.exists()


def test_an_owner_on_another_machine_whose_file_moves_is_alive(project, monkeypatch, capsys):
    """Where locks don't reach other machines the time of the file tells."""
    times = iter(range(100))
    monkeypatch.setattr(locks, "BEAT_S", 0.06)
    monkeypatch.setattr(locks, "_time_of", lambda path: next(times))
    written_lock(host="n012")
    assert job.main(f"score {SCORE} --o {JOB}".split()) == 2
    assert "on n012" in capsys.readouterr().err


def test_the_owner_moves_its_files_time(project, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    locks.own(Path(JOB))
    before = LOCK.stat().st_mtime_ns
    wait_until(lambda: LOCK.stat().st_mtime_ns > before)
    locks.release(Path(JOB))


def test_where_nothing_can_be_locked_the_process_tells(project, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    parent = os.getppid()
    written_lock(pid=parent, start=locks._start_of(parent))
    assert job.main(f"score {SCORE} --o {JOB}".split()) == 2
    assert f"process {parent}" in capsys.readouterr().err
    written = json.loads(LOCK.read_text())
    assert written["pid"] == parent
    LOCK.write_text(json.dumps({**written, "pid": 999_999_999}))
    locks.own(Path(JOB))
    locks.release(Path(JOB))


def test_a_lock_through_a_link_touches_nothing_else(project):
    Path(JOB).mkdir(parents=True)
    for make in (Path.symlink_to, Path.hardlink_to):
        Path("mine").write_text("mine")
        make(LOCK, Path("mine").resolve())
        locks.own(Path(JOB))
        locks.release(Path(JOB))
        assert Path("mine").read_text() == "mine"
        assert not LOCK.exists()


# Only what is ours.


def refused(words, capsys, *kept):
    """Check that words are refused in one sentence and that the folders `kept` stay as they are."""
    before = [content(folder) for folder in kept]
    assert job.main(words.split()) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("ERROR") == 1
    assert "Traceback" not in said
    assert before == [content(folder) for folder in kept]
    return said


JOB_STAR = "data_job\n\n_rlnJobType             {}\n_rlnJobIsContinue       0\n"
FOREIGN = {
    "Select": {"job.star": JOB_STAR.format(7)},
    "Extract of RELION 5": {"job.star": "data_job\n\n_rlnJobTypeLabel relion.extract\n"},
    "Class2D of RELION 3.0": {"run.job": "job_type == 8\n"},
    "External of another program": {"job.star": JOB_STAR.format(99) + "fn_exe pick.py\n"},
    "a user's own": {},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("mode", ["score", "train", "metrics", "select"])
def test_the_folder_of_another_job_is_refused_to_every_mode(project, capsys, kind, mode):
    folder = Path("Some/job005")
    folder.mkdir(parents=True)
    files = {"particles.star": "mine", "metrics.json": "mine", "model.safetensors": "mine"}
    for name, text in {**FOREIGN[kind], **files}.items():
        (folder / name).write_text(text)
    words = {
        "score": SCORE,
        "select": f"--in_parts {STAR} --threshold 0.5",
        "train": f"--in_parts {STAR} --pos_classes 1",
        "metrics": f"--in_parts {STAR} --pos_classes 1",
    }[mode]
    for _ in range(2):  # a refusal leaves nothing that would make the folder ours
        said = refused(f"{mode} {words} --o {folder}/", capsys, folder)
        assert "another RELION job" in said or "this program" in said


@pytest.mark.parametrize(
    "name",
    ["Extract/job001/Mics/mic2.mrcs", "model.safetensors", "notes.txt", "External", STAR,
     "other/run.out", "linked/particles.star", "default_pipeline.star", "metrics.json"],
)  # fmt: skip
def test_out_file_replaces_scores_only(project, capsys, name):
    Path("other").mkdir()
    Path("External").mkdir()
    Path("linked").symlink_to("Extract/job001")
    for other in ("notes.txt", "other/run.out", "0.csv"):
        Path(other).write_text("mine\n")
    Path("metrics.json").write_text('{\n  "data": "ours, but no scores"}')
    refused(f"score {SCORE} --out_file {name}", capsys, ".")


def test_out_file_may_be_new_empty_a_link_or_old_scores(project):
    Path("mine").write_text("mine")
    Path("link.csv").symlink_to("mine")
    Path("empty.csv").touch()
    for name in ("new.csv", "new.csv", "empty.csv", "link.csv"):
        assert job.main(f"score {SCORE} --out_file {name}".split()) == 0
        assert Path(name).read_text().startswith("0, ")
        assert not Path(name).is_symlink()
    assert Path("mine").read_text() == "mine"


def test_a_device_is_not_replaced(project, capsys):
    os.mkfifo("pipe.csv")
    refused(f"score {SCORE} --out_file pipe.csv", capsys, ".")
    assert Path("pipe.csv").is_fifo()


@pytest.mark.parametrize("name", ["Select/job003/", STAR, "Extract/job001/Mics/mic2.mrcs",
                                  "External/job009/", "External/job009/job.star",
                                  "notes.txt", "Select/job003/job.star"])  # fmt: skip
def test_a_template_replaces_templates_only(project, capsys, name):
    for folder, kind in (("Select/job003", 7), ("External/job009", 99)):
        Path(folder).mkdir(parents=True)
        Path(folder, "job.star").write_text(JOB_STAR.format(kind))
        Path(folder, "job_pipeline.star").touch()
    Path("notes.txt").write_text("mine")
    refused(f"job --mode score --in_parts {STAR} --o {name}", capsys, ".")


def test_a_template_is_written_again(project):
    Path(".gui_externaljob.star").write_text(JOB_STAR.format(99))
    for _ in range(2):
        assert job.main(["job", "--mode", "score", "--in_parts", STAR]) == 0
        assert job.main(["job", "--mode", "score", "--in_parts", STAR, "--o", "mine/"]) == 0
    assert "fn_exe" in Path(".gui_externaljob.star").read_text()


def test_convert_replaces_models_only(project, capsys):
    making.write_keras(Path("a.h5"), making.tiny_model().network)
    Path("notes").write_text("mine")
    refused("convert a.h5 --o notes", capsys, ".")
    for name in ("new.safetensors", "new.safetensors", "model.safetensors"):
        assert job.main(["convert", "a.h5", "--o", name]) == 0


def test_unfinished_files_are_ours_only_by_our_pattern(project):
    """And no folder of such a name makes the job fail."""
    Path(JOB).mkdir(parents=True)
    Path(JOB, ".report.html.folder.part").mkdir()
    mine = [".something.part", ".particles.star.part", ".notes.txt.abcd1234.part"]
    ours = [".particles.star.abcd1234.part", ".checkpoint_last_2.pt.x_y.part"]
    for name in (*mine, *ours):
        Path(JOB, name).touch()
    Path("kept").write_text("mine")
    Path(JOB, ".scores.csv.abcd1234.part").symlink_to("../../kept")
    score_project("--any_contrast")
    assert all(Path(JOB, name).exists() for name in mine)
    assert not any(Path(JOB, name).exists() for name in ours)
    assert Path(JOB, ".report.html.folder.part").is_dir()
    assert Path("kept").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to], ids=["soft", "hard"])
def test_links_in_the_results_folder_are_replaced_and_never_followed(scored, make):
    """Of a user who keeps results elsewhere, or whose backup has hard links."""
    results = [path for path in Path(JOB).iterdir() if not path.name.startswith("RELION_JOB")]
    for path in results:
        kept = Path(f"kept_{path.name}")
        path.replace(kept)
        make(path, kept.resolve())
    before = content(".")
    more = "--any_contrast --threshold 0.9 --batch_size 5"
    making.write_stack(Path("Extract/job001/Mics/mic3.mrcs"), making.blobs(12, 32, 99))
    score_project(more)
    score_project(f"{more} --rescore")
    after = content(".")
    assert all(after[p] == text for p, text in before.items() if p.name.startswith("kept"))
    assert not any(path.is_symlink() for path in results)


def test_a_results_folder_may_be_a_link(project):
    Path("disk").mkdir()
    Path("External").mkdir()
    Path("External/job002").symlink_to("../disk")
    score_project("--any_contrast")
    assert Path("disk", job.SUCCESS).exists()


def test_what_every_writer_asks_is_one_rule(tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n")
    with (
        pytest.raises(UsageError, match="not written by this program"),
        replacing(tmp_path / "mine.csv") as file,
    ):
        file.write(b"0, 0.5000\n")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.csv"]
    for _ in range(2):  # what this process wrote is ours
        with replacing(tmp_path / "ours.csv") as file:
            file.write(b"anything")
    require_ours(tmp_path / "new")


def test_results_of_before_are_ours_wherever_they_are(scored):
    """Without an exit file or a journal, as after `--out_dir`, the results tell by themselves."""
    for path in Path(JOB).iterdir():
        if path.name.startswith("RELION") or path.suffix == ".journal":
            path.unlink()
    assert is_ours(Path(JOB))
    Path(JOB, "scores.csv").write_text("not ours")
    assert not is_ours(Path(JOB))

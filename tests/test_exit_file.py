"""Whatever ends a job, and however: exactly one exit file is left, and the words come after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import making
import numpy as np
import pytest
from making import ROOT, run_to_end, started

from relion_cryofilter import processes
from relion_cryofilter.options import TrainOptions, available_cores
from relion_cryofilter.relion import job

JOB = making.JOB
HEAD = f"""
import ctypes, os, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored under nohup, and behind "&"
    signal.signal(number, signal.SIG_DFL)
sys.path.insert(0, {str(ROOT)!r})
from relion_cryofilter import commands
from relion_cryofilter.relion import job
sys.argv = ["relion_cryofilter", "score", "--o", {JOB!r}]
def run(*_):
    print("working", flush=True)
"""
TAIL = """
    return ()
commands.run = run
job._GRACE_S = {grace_s}
sys.exit(job.main())
"""
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SIGNALS = ("TERM", "HUP", "INT", "QUIT", "USR1", "USR2", "XCPU", "ALRM", "VTALRM", "PROF", "RTMIN")


def program(work: str, grace_s: float = job._GRACE_S) -> list[str]:
    """Return a command line that does `work` as a job, guarded like one, without loading torch."""
    lines = "\n".join(f"    {line}" for line in work.splitlines())
    return [sys.executable, "-c", f"{HEAD}{lines}{TAIL.format(grace_s=grace_s)}"]


def exits() -> list[str]:
    """Return the outcomes that the job's folder tells, and whatever else is in it."""
    return sorted(path.name.removeprefix("RELION_JOB_EXIT_") for path in Path(JOB).iterdir())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(JOB).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("name", SIGNALS)
def test_any_signal_that_a_queue_may_send_leaves_failure_however_often_it_comes(folder, name):
    number = getattr(signal, f"SIG{name}")
    with started(program("time.sleep(60)"), **PIPES) as running:
        assert "working" in running.stdout.readline()
        for _ in range(6):
            running.send_signal(number)
        _, err = running.communicate(timeout=making.PATIENCE_S)
    assert running.returncode == 143
    assert exits() == ["FAILURE"]
    assert err.count("\n") == 1
    assert f"Ended by {number.name} before the job was done" in err


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("ctypes.string_at(0)", "SIGSEGV: a library crashed"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "SIGBUS: a library crashed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL), as the system does when the memory"),
        ("os._exit(1)", "A library ended the program (exit code 1)"),
        ("os._exit(0)", "A library ended the program (exit code 0)"),
        ("sys.exit(0)", "Nothing was done"),
        ("raise MemoryError", "out of memory (MemoryError)"),
    ],
)
def test_a_job_that_is_ended_by_a_crash_or_a_library_leaves_failure(folder, work, said):
    done = run_to_end(program(work))
    assert done.returncode != 0
    assert exits() == ["FAILURE"]
    assert said in done.stderr
    assert done.stderr.count("ERROR: ") == 1


def test_a_job_that_spins_in_a_library_is_ended_after_a_while(folder):
    work = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "print(flush=True)\nwhile True: pass"
    )
    words = program(work, grace_s=0.5)
    with started(words, **PIPES) as running:
        running.stdout.readline()
        running.stdout.readline()
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=making.PATIENCE_S)
    assert running.returncode == 143
    assert exits() == ["FAILURE"]
    assert "Ended by SIGTERM" in err


def test_a_queue_that_signals_all_processes_is_told_once_though_threads_end_late(folder):
    work = "import atexit; atexit.register(time.sleep, 20); print(flush=True); time.sleep(60)"
    words = program(work, grace_s=0.5)
    with started(words, **PIPES) as running:
        running.stdout.readline()
        running.stdout.readline()
        os.killpg(running.pid, signal.SIGTERM)
        _, err = running.communicate(timeout=making.PATIENCE_S)
    assert running.returncode == 143
    assert exits() == ["FAILURE"]
    assert err.count("Ended by SIGTERM") == 1


def test_work_does_not_go_on_without_its_guard(folder):
    words = program("time.sleep(20)\nopen('went on', 'w')")
    with started(words, stdout=subprocess.PIPE, text=True) as running:
        assert "working" in running.stdout.readline()
        running.kill()
        assert running.stdout.read() == ""  # until nobody is left who could say something
    assert not Path("went on").exists()


@pytest.mark.parametrize("outcome", ["return ()", "raise ValueError('oh')"])
@pytest.mark.parametrize("streams", [">/dev/full 2>&1", ">&- 2>&-", "2>&1 | true"])
def test_the_exit_file_needs_no_words(folder, streams, outcome):
    if "full" in streams and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    Path("job.py").write_text(program(outcome)[2].replace("print", "#"))
    subprocess.run(["sh", "-c", f"{sys.executable} job.py {streams}"], check=False)
    assert exits() == ["SUCCESS" if "return" in outcome else "FAILURE"]


def test_files_do_not_become_the_standard_output_that_was_closed(folder):
    work = "open('data', 'w').write('x' * 10)\nos.write(1, b'words of a library')"
    Path("job.py").write_text(program(work)[2])
    subprocess.run(["sh", "-c", f"{sys.executable} job.py >&- 2>&-"], check=False)
    assert exits() == ["SUCCESS"]
    assert Path("data").read_text() == "x" * 10


@pytest.fixture
def full_disk(folder):
    """A job's folder on a small disk that is full."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=20", "none", JOB], capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", JOB], check=True)


def test_a_disk_that_fills_up_while_a_job_works_leaves_failure(full_disk):
    work = (
        f"for k in range(30): open('{JOB}' + str(k), 'wb').write(b'x' * 5000)"  # bytes, then inodes
    )
    done = run_to_end(program(work))
    assert [name for name in exits() if not name.isdigit()] == ["FAILURE"]
    assert "No space left on device" in done.stderr


@pytest.mark.slow
def test_features_on_a_full_disk_are_a_failure_and_no_crash(full_disk, monkeypatch):
    making.project_with_model()
    words = f"score --o {JOB} --in_parts Extract/job001/particles.star --features --j 1 --weights "
    for options in ("size=64k", "size=12k"):
        subprocess.run(["mount", "-o", f"remount,{options}", JOB], check=False)
    making.tiny_model(dim=200).save("large.safetensors")  # 2,500 features a particle
    command = [sys.executable, str(ROOT / "external_job.py"), *words.split(), "large.safetensors"]
    done = run_to_end(command)
    assert "No space left on device" in done.stderr
    assert exits() == ["FAILURE"]


@pytest.mark.parametrize(("early", "left", "code"), [(True, "FAILURE", 143), (False, "SUCCESS", 0)])
def test_a_signal_after_success_changes_nothing_and_one_before_it_decides(
    folder, early, left, code
):
    words = program("pass")
    words[2] = words[2].replace("sys.argv", f"""
close = job.JobFolder.close
def closed(folder, outcome):
    if {early} and outcome == job.SUCCESS:
        signal.raise_signal(signal.SIGTERM)
    decided = close(folder, outcome)
    if decided and not {early}:
        signal.raise_signal(signal.SIGTERM)
    return decided
job.JobFolder.close = closed
sys.argv""")  # fmt: skip
    assert run_to_end(words).returncode == code
    assert exits() == [left]


def test_an_exit_file_is_made_though_somebody_removed_what_becomes_it(folder):
    done = run_to_end(program(f"os.unlink({JOB + '.RELION_JOB_EXIT'!r})"))
    assert done.returncode == 0, done.stderr
    assert exits() == ["SUCCESS"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "4"}, "RANK is 'abc'; expected a whole number from 0 to 3"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4; expected a whole number from 0 to 3"),
        ({"RANK": "0", "WORLD_SIZE": "1e9"}, "WORLD_SIZE is '1e9'"),
        ({"SLURM_PROCID": "-1", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_PROCID is '-1'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0"),
    ],
)
def test_variables_that_announce_nonsense_are_one_sentence(
    project, monkeypatch, capsys, variables, said
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Path(JOB).mkdir(parents=True)
    Path(JOB, job.SUCCESS).touch()  # of an earlier run
    assert job.main(f"score --o {JOB} --in_parts Extract/job001/particles.star".split()) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
    assert exits() == ["FAILURE"]


@pytest.mark.parametrize("mode", ["score", "select"])
@pytest.mark.parametrize("number", [0, 2])
def test_processes_that_never_come_are_named_and_waited_for_a_while(
    scored, monkeypatch, capsys, number, mode
):
    monkeypatch.setattr(processes, "WAIT_S", 1)
    monkeypatch.setattr(processes, "_SILENCE_S", 0.1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in {"RANK": str(number), "WORLD_SIZE": "4", **place}.items():
        monkeypatch.setenv(name, value)
    words = f"{mode} --o new/ --in_parts {JOB}particles.star --threshold 0.5"
    assert job.main(words.split()) == 2
    said = capsys.readouterr()
    assert f"Process {number + 1} of 4 (by RANK and WORLD_SIZE) waits up to 1 s for" in said.out
    assert f"did not meet the others at localhost:{port}" in said.err
    assert "unset RANK and WORLD_SIZE" in said.err
    assert [path.name for path in Path("new").glob("RELION_JOB_EXIT_*")] == [job.FAILURE]


def test_threads_are_no_more_than_cores():
    assert TrainOptions(j=20_000).threads == available_cores()
    assert TrainOptions(j=1).threads == 1


def test_a_report_that_has_no_memory_costs_a_warning(scored, monkeypatch, capsys):
    monkeypatch.setattr(processes, "memory_left", lambda: 0.65e9)
    making.score_project()
    said = capsys.readouterr().out
    assert "No report (logfile.pdf, report.html) could be made: MemoryError" in said
    assert "leaves 0.7 GB, and the report needs about" in said
    assert not Path(JOB, "report.html").exists()
    words = "train --o new/ --in_parts Extract/job001/particles.star"
    assert job.main(words.split()) == 1
    assert "train needs about 1.8 GB" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [800, 1150, 1195])
def test_a_queues_memory_limit_never_costs_the_results(project, megabytes):
    command = f"ulimit -v {megabytes * 1000}; exec {sys.executable} {ROOT}/external_job.py"
    words = f"--o {JOB} --in_parts Extract/job001/particles.star --weights model.safetensors --j 2"
    done = run_to_end(["bash", "-c", f"{command} {words}"])
    if "score needs about" in done.stderr:
        pytest.skip("this torch needs more memory for the scoring itself")
    assert done.returncode == 0, done.stderr
    assert Path(JOB, job.SUCCESS).exists()
    assert len(np.loadtxt(Path(JOB, "scores.csv"), delimiter=",")) == 48


def test_a_job_star_that_is_a_pipe_holds_nobody_up(folder):
    os.mkfifo(Path(JOB, "job.star"))
    done = run_to_end(program("pass"))
    assert done.returncode == 0, done.stderr
    assert exits() == ["SUCCESS", "job.star"]

"""Two processes that share one job, as torchrun and srun start them (gloo, on one machine)."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from making import make_select_job, tiny_model, write_project

from relion_cryofilter.nn.model import load_model
from relion_cryofilter.processes import Ranks, _first_node, process_count, process_number
from relion_cryofilter.relion import job

NAMES = ("particles.star", "particles_accepted.star", "particles_rejected.star", "scores.csv")


def torchrun(*words, processes=2):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*line, str(processes), "-m", "relion_cryofilter", *words], capture_output=True, text=True
    )


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save("model.safetensors")
    star = write_project(tmp_path, n_micrographs=5, per_micrograph=21)
    return [
        "score", "--in_parts", str(star), "--weights", "model.safetensors", "--any_contrast",
        "--j", "1", "--threshold", "keep=0.5",
    ]  # fmt: skip


def averages(folder):
    """Return the averages of rejected and other particles in a report."""
    return re.findall(r"<h2>Averages of .*?</figure>", Path(folder, "report.html").read_text())


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_use_all_scores_again(scoring):
    assert job.main([*scoring, "--o", "one"]) == 0
    two = torchrun(*scoring, "--o", "two")
    assert two.returncode == 0, two.stderr
    assert "in each of 2 processes" in two.stdout
    assert two.stdout.count("Results are in two/") == 1
    for name in NAMES:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name
    assert averages("one") == averages("two")
    assert len(averages("one")) == 2
    assert Path("two/RELION_JOB_EXIT_SUCCESS").exists()
    assert sorted(path.name for path in Path("two").glob("*.journal")) == [
        "score_cache.journal", "score_cache_1.journal",
    ]  # fmt: skip
    first = Path("two/particles.star").read_bytes()
    again = torchrun(*scoring, "--o", "two")
    assert "were known: " in again.stdout
    assert "Scored" not in again.stdout
    assert Path("two/particles.star").read_bytes() == first
    assert averages("two") == averages("one")


@pytest.mark.slow
def test_a_fault_in_any_process_leaves_a_failed_job(scoring, tmp_path):
    stacks = sorted(tmp_path.glob("Extract/job001/Mics/*.mrcs"))
    content = bytearray(stacks[-1].read_bytes())
    content[-4:] = np.array([np.nan], "<f4").tobytes()
    stacks[-1].write_bytes(content)
    done = torchrun(*scoring, "--o", "two")
    assert done.returncode != 0
    assert "1 with NaN or infinite values" in done.stderr
    assert Path("two/RELION_JOB_EXIT_FAILURE").exists()
    assert not Path("two/particles.star").exists()


@pytest.mark.slow
def test_a_training_started_as_two_processes_is_done_by_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, n_micrographs=4, per_micrograph=24)
    make_select_job(tmp_path)
    words = ["train", "--in_parts", "Select/job003/particles.star", "--epochs", "3", "--j", "1"]
    words += ["--any_contrast", "--model", "straight", "--learning_rate", "0.01", "--o"]
    assert job.main([*words, "one"]) == 0
    two = torchrun(*words, "two")
    assert two.returncode == 0, two.stderr
    assert load_model("one/model.safetensors").hash == load_model("two/model.safetensors").hash
    assert two.stdout.count("Fold 1 of ") == 1


def test_shares_are_whole_and_disjoint():
    rows = np.arange(10, 27)
    shares = [Ranks(number, 4).share(rows) for number in range(4)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n012", "n012"), ("n[012-014,020],m1", "n012"), ("gpu-3,gpu-4", "gpu-3"), ("", "")],
)
def test_the_first_node_of_slurms_list_is_the_meeting_point(nodes, first):
    assert _first_node(nodes) == first


def test_a_batch_script_with_many_tasks_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert (process_number(), process_count()) == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert (process_number(), process_count()) == (3, 8)

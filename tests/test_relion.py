"""The real RELION 3.1.3 starts our job, reads its end, and works on with its results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from making import JOB, PATIENCE_S, ROOT, run_to_end, started, wait_until

from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.relion import job

pytestmark = pytest.mark.relion
STATUS = {0: "running", 1: "scheduled", 2: "success", 3: "failure", 4: "aborted"}


def relion(program, *words):
    """Run one of RELION's programs in the project."""
    done = run_to_end([f"relion_{program}", *words])
    assert done.returncode == 0, done.stdout + done.stderr


def add_job(monkeypatch, words, executable=f"{sys.executable} {ROOT / 'external_job.py'}"):
    """Write a job.star with our `job` command and give it to the pipeliner."""
    monkeypatch.setattr("relion_cryofilter.relion.templates.executable", lambda: executable)
    assert job.main(f"job --mode score --o job.star {words}".split()) == 0
    relion("pipeliner", "--addJobFromStar", "job.star")


RUN_JOB = ["relion_pipeliner", "--RunJobs", JOB, "--sec_wait_after", "1"]
"""The pipeliner starts the job, looks for its exit files once a second, and ends with it."""


def run_job():
    run_to_end(RUN_JOB)


def status():
    """Return what RELION's pipeline says of our job."""
    text = Path("default_pipeline.star").read_text()
    return STATUS[int(re.search(rf"{JOB}\s+None\s+99\s+(\d)", text)[1])]


PARTICLES = "--in_parts Extract/job001/particles.star --weights model.safetensors"


@pytest.mark.slow
def test_a_job_succeeds_and_its_nodes_are_registered(project, monkeypatch):
    add_job(monkeypatch, f"{PARTICLES} --tta --gpu 0 --j 2")
    run_job()
    assert status() == "success"
    pipeline = Path("default_pipeline.star").read_text()
    for name in ("particles_accepted", "particles_rejected", "particles"):
        assert re.search(rf"{JOB}{name}\.star\s+3\s", pipeline)
        assert f"{JOB} {JOB}{name}.star" in pipeline
    assert "accepted" in Path(JOB, "run.out").read_text()
    errors = Path(JOB, "run.err").read_text().splitlines()
    assert errors in ([], [" + WARNING: will ignore (but maintain) values for the unknown label: "
                           "rlnPipeLineNodeTypeLabel"])  # fmt: skip


@pytest.mark.slow
def test_labels_typed_with_dashes_empty_values_and_several_words_arrive(project, monkeypatch):
    monkeypatch.setattr("relion_cryofilter.relion.templates.write_text", with_odd_parameters)
    add_job(monkeypatch, PARTICLES)
    run_job()
    command = Path(JOB, "note.txt").read_text()
    assert "----threshold 0.25 --features  --gpu 0 1 " in command
    assert status() == "success"
    assert "Threshold 0.25 (as asked)" in Path(JOB, "run.out").read_text()
    assert Path(JOB, "features.npy").exists()


def with_odd_parameters(path, text):
    """Write a job.star with what users type into RELION's boxes."""
    extra = "param3_label --threshold\nparam3_value 0.25\nparam4_label features\n"
    extra += 'param4_value ""\nparam5_label gpu\nparam5_value "0 1"\n'
    Path(path).write_text(text.replace("other_args", f"{extra}other_args"))


@pytest.mark.slow
def test_a_sub_command_in_the_executable_box_works(project, monkeypatch):
    add_job(monkeypatch, PARTICLES, f"{sys.executable} {ROOT / 'external_job.py'} score")
    run_job()
    assert status() == "success"


def test_a_bad_option_is_a_failed_job(project, monkeypatch):
    add_job(monkeypatch, PARTICLES)
    text = Path(JOB, "job.star").read_text()
    Path(JOB, "job.star").write_text(text.replace(" weights ", " wieghts "))
    run_job()
    assert status() == "failure"
    assert "Did you mean --weights?" in Path(JOB, "run.err").read_text()


@pytest.mark.slow
def test_a_missing_stack_is_a_failed_job_and_continue_mends_it(project, monkeypatch):
    stack = Path("Extract/job001/Mics/mic0.mrcs")
    data = stack.read_bytes()
    stack.unlink()
    add_job(monkeypatch, PARTICLES)
    run_job()
    assert status() == "failure"
    assert "12 of 48 images can't be used" in Path(JOB, "run.err").read_text()
    assert not Path(JOB, "particles.star").exists()
    stack.write_bytes(data)
    run_job()
    assert status() == "success"
    assert len(read_particles(Path(JOB, "particles.star"))) == 48


ONE_BATCH = f"""
import sys
import time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})

from relion_cryofilter.relion.job import main
from relion_cryofilter.progress import Progress

step = Progress.step


def wait_and_step(progress, count):
    while not Path({JOB!r}, "RELION_JOB_ABORT_NOW").exists():
        time.sleep(0.01)
    step(progress, count)


Progress.step = wait_and_step
sys.exit(main())
"""
"""Our job, but after its first batch it waits for an abort: no clock decides who is first."""


@pytest.mark.slow
def test_abort_in_mid_run_then_continue(project, monkeypatch):
    Path("job.py").write_text(ONE_BATCH)
    add_job(monkeypatch, f"{PARTICLES} --tta --batch_size 2 --j 1", f"{sys.executable} job.py")
    with started(RUN_JOB, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pipeliner:
        wait_until(Path(JOB, "score_cache.journal").exists, pipeliner)
        assert status() == "running"
        Path(JOB, "RELION_JOB_ABORT_NOW").touch()
        pipeliner.communicate(timeout=PATIENCE_S)
    assert status() == "aborted"
    assert "Stopped on request after 2 of 48 particles" in Path(JOB, "run.out").read_text()
    assert not Path(JOB, "particles.star").exists()
    Path("job.py").write_bytes((ROOT / "external_job.py").read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_job()
    assert status() == "success"
    assert "of 48 particles were scored by an earlier run" in Path(JOB, "run.out").read_text()
    assert len(read_particles(Path(JOB, "particles.star"))) == 48


def values_of(path):
    particles = read_particles(Path(path))
    label = ["rlnParticleFigureOfMerit"]
    return [value for (value,) in particles.table.columns(label)]


def test_star_handler_selects_the_particles_that_we_accepted(scored):
    relion(
        "star_handler", "--i", f"{JOB}particles.star", "--o", "selected.star",
        "--select", "rlnParticleFigureOfMerit", "--minval", "0.5", "--maxval", "1",
    )  # fmt: skip
    assert values_of("selected.star") == values_of(f"{JOB}particles_accepted.star")
    assert 0 < len(values_of("selected.star")) < 48


def test_star_handler_reads_our_scores_to_six_decimals(scored):
    relion("star_handler", "--i", f"{JOB}particles.star", "--o", "copy.star",
           "--operate", "rlnCoordinateX", "--multiply_by", "1")  # fmt: skip
    ours = values_of(f"{JOB}particles.star")
    assert all(re.fullmatch(r"[01]\.\d{6}", value) for value in ours)
    assert len(set(ours)) > 40
    assert values_of("copy.star") == ours


def test_our_column_is_byte_for_byte_what_relion_itself_would_add(scored):
    source = "Extract/job001/particles.star"
    relion("star_handler", "--i", source, "--o", "a.star", "--add_column",
           "rlnParticleFigureOfMerit", "--add_column_value", "0.5")  # fmt: skip
    theirs = Path("a.star").read_text()
    ours = re.sub(
        r"[01]\.\d{6} $", "0.500000 ", Path(JOB, "particles.star").read_text(), flags=re.M
    )
    assert ours.split("data_particles")[1].split() == theirs.split("data_particles")[1].split()


def test_stack_create_and_a_2d_classification_run_on_the_accepted_file(scored):
    relion("stack_create", "--i", f"{JOB}particles_accepted.star", "--o", "stack")
    n = len(values_of(f"{JOB}particles_accepted.star"))
    header = np.fromfile("stack.mrcs", "<i4", 3)
    assert header.tolist() == [32, 32, n]
    Path("Class2D").mkdir()
    relion(
        "refine", "--i", f"{JOB}particles_accepted.star", "--o", "Class2D/run", "--iter", "1",
        "--K", "1", "--particle_diameter", "80", "--oversampling", "0", "--psi_step", "45",
        "--offset_range", "2", "--offset_step", "2", "--dont_check_norm", "--norm", "--scale",
        "--pad", "1",
    )  # fmt: skip
    assert sorted(values_of("Class2D/run_it001_data.star")) == sorted(
        values_of(f"{JOB}particles_accepted.star")
    )


@pytest.mark.shared("star_corpus")
def test_star_handler_reads_back_what_we_wrote_for_the_corpus(shared, tmp_path):
    checked = 0
    for path in sorted((shared / "star_corpus").glob("*.star")):
        text = path.read_bytes()
        if b"data_optics" not in text or b"rlnImageName" not in text:
            continue
        from relion_cryofilter.particles.star import particle_loop, read_star

        star = read_star(path)
        loop = particle_loop(star)
        scores = np.round(np.random.default_rng(1).random(loop.n_rows), 6)
        out = tmp_path / path.name
        loop.write({out: scores >= 0}, scores)
        relion("star_handler", "--i", str(out), "--o", str(tmp_path / "b.star"),
               "--operate", "rlnParticleFigureOfMerit", "--multiply_by", "1")  # fmt: skip
        assert [float(v) for v in values_of(tmp_path / "b.star")] == scores.tolist()
        checked += 1
    assert checked >= 3

"""The real ccpem-pipeliner finds our job types, runs them, and works on with their results."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import making
import numpy as np
import pytest
from making import PATIENCE_S, half_star, wait_until

from relion_cryofilter.options import MODES, MetricsOptions, ScoreOptions, TrainOptions

pytest.importorskip("pipeliner", reason="needs the pipeliner: pip install ccpem-pipeliner")

from pipeliner.api.manage_project import PipelinerProject
from pipeliner.job_factory import get_job_types, new_job_of_type
from pipeliner.metadata_tools import make_job_parameters_schema
from pipeliner.results_display_objects import ResultsDisplayPending

from relion_cryofilter.doppio import job_options

TYPES = {f"cryofilter.{mode}.particles": mode for mode in ("metrics", "score", "train")}
STAR = "Extract/job001/particles.star"
JOB_STAR = """data_job

_rlnJobTypeLabel  {kind}
_rlnJobIsContinue 0
_rlnJobIsTomo     0

data_joboptions_values

loop_
_rlnJobOptionVariable #1
_rlnJobOptionValue #2
"""
"""What `pipeliner --default_jobstar` writes; options that are not named keep their defaults."""


def pipeliner(*words, program="pipeliner"):
    """Run the pipeliner's own command line."""
    program = shutil.which(program, path=str(Path(sys.executable).parent)) or program
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_job(kind, **values):
    rows = "".join(f"{name} {value}\n" for name, value in values.items())
    Path("job.star").write_text(JOB_STAR.format(kind=kind) + rows)
    return "job.star"


def run_from_the_command_line(kind, **values):
    """Run a job in the background, as users do, and return its folder when it has ended."""
    said = pipeliner("--run_job", write_job(kind, **values))
    folder = Path(re.search(r"Ran job as: (\S+)", said)[1])
    wait_until(lambda: ended(folder))
    return folder


def ended(folder):
    return list(folder.glob("PIPELINER_JOB_EXIT_*"))


def run(kind, **values):
    """Run a job through the job runner in this process."""
    return PipelinerProject().run_job({"_rlnJobTypeLabel": kind, **values}, run_in_foreground=True)


def status_of(folder):
    pipeline = Path("default_pipeline.star").read_text()
    return re.search(rf"^{folder}/?\s+\S+\s+\S+\s+(\S+)", pipeline, re.M)[1]


def nodes():
    """Return the pipeline's nodes and their types."""
    text = Path("default_pipeline.star").read_text()
    section = text.split("data_pipeline_nodes")[1].split("data_pipeline_input")[0]
    return dict(line.split() for line in section.splitlines() if re.match(r"\S+/|\S+\.\S+ ", line))


def labelled_files(project):
    """Write STAR files of the particles with the strongest and the weakest blobs."""
    strong = re.compile(r" 0000(?:0[7-9]|1\d)@")
    good = half_star(project, "good.star", strong.search)
    bad = half_star(project, "bad.star", lambda line: not strong.search(line))
    return good.name, bad.name


def kinds_shown(job):
    shown = job.create_results_display()
    faults = [item.reason for item in shown if isinstance(item, ResultsDisplayPending)]
    assert not faults, faults
    return [item.dobj_type for item in shown]


@pytest.fixture
def pipeline(project):
    """The small project, as one of the pipeliner."""
    Path("default_pipeline.star").unlink()
    pipeliner("--new_project")
    return project


@pytest.mark.slow
def test_the_pipeliner_finds_the_three_job_types_and_can_run_them():
    said = pipeliner("--check_jobs", "cryofilter")
    assert "Unavailable" not in said
    assert "version: 0." in said
    found = {job.PROCESS_NAME: job for job in get_job_types("cryofilter")}
    assert sorted(found) == sorted(TYPES)
    assert all(job.jobinfo.is_available for job in found.values())


@pytest.mark.slow
def test_the_pipeliners_check_of_its_setup_names_our_jobs_as_ready():
    said = pipeliner(program="pipeliner.check_setup")
    assert all(re.search(rf"{kind}\.+\S*Success", said) for kind in TYPES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_the_pipeliner_writes_default_jobs_information_and_schemas(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeliner("--default_jobstar", kind)
    assert len(list(tmp_path.glob("*job.star"))) == 1
    assert (MODES[TYPES[kind]].__doc__ or "").split(".")[0] in pipeliner("--job_info", kind)
    schema = make_job_parameters_schema(kind)
    assert set(schema["properties"]) >= set(job_options.job_options(MODES[TYPES[kind]]))


@pytest.mark.parametrize("kind", TYPES)
def test_every_option_is_shown_with_its_help_limits_and_default_or_left_out_for_a_reason(kind):
    job, mode = new_job_of_type(kind), MODES[TYPES[kind]]
    for item in fields(mode):
        if item.name in job_options.LEFT_OUT:
            assert item.name not in job.joboptions
            continue
        shown = job.joboptions[item.name]
        assert shown.help_text.startswith(item.metadata["help"])
        assert getattr(shown, "hard_min", None) == item.metadata.get("low")
        assert getattr(shown, "hard_max", None) == item.metadata.get("high")
    assert job_options.words_of(mode, job.joboptions) == []
    labels = [option.label for option in job.joboptions.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("mode", "name", "value", "words"),
    [
        (ScoreOptions, "tta", True, ["Yes"]),
        (TrainOptions, "augmentation", False, ["No"]),
        (TrainOptions, "epochs", 7, ["7"]),
        (TrainOptions, "learning_rate", 0.01, ["0.01"]),
        (TrainOptions, "model", "straight", ["straight"]),
        (TrainOptions, "threshold", "precision=0.9", ["precision=0.9"]),
        (ScoreOptions, "weights", ["a b.h5", "c.h5"], ["a b.h5", "c.h5"]),
        (MetricsOptions, "pos_classes", "1,4", ["1,4"]),
        (ScoreOptions, "gpu", "all", ["all"]),
    ],
)
def test_a_value_becomes_the_words_of_the_command_line(mode, name, value, words):
    options = job_options.job_options(mode)
    options[name].value = value
    assert job_options.words_of(mode, options) == [f"--{name}", *words]
    assert job_options.problems(mode, options) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("cryofilter.score.particles", "threshold", "recall=2", "above 0 and at most 1"),
        ("cryofilter.score.particles", "gpu", "first", "expected GPU numbers"),
        ("cryofilter.train.particles", "ensemble", 11, "cannot be greater than 10"),
        ("cryofilter.train.particles", "pos_classes", "a", "whole numbers such as 1,4,7"),
    ],
)
def test_a_value_that_the_program_refuses_never_becomes_a_job(pipeline, kind, name, value, message):
    with pytest.raises(ValueError, match=message):
        run(kind, in_parts=STAR, **{name: value})
    assert not Path("CryoFilter").exists()


@pytest.mark.slow
def test_score_needs_particles_and_train_needs_particles_or_files(pipeline):
    with pytest.raises(ValueError, match="required"):
        run("cryofilter.score.particles")
    with pytest.raises(ValueError, match="File  not found"):
        run("cryofilter.train.particles")


@pytest.mark.slow
def test_score_runs_from_the_command_line_and_its_nodes_are_registered(pipeline):
    folder = run_from_the_command_line(
        "cryofilter.score.particles", in_parts=STAR, weights="model.safetensors",
        threshold="keep=0.5", any_contrast="Yes",
    )  # fmt: skip
    assert (folder / "PIPELINER_JOB_EXIT_SUCCESS").exists()
    assert "24 accepted (50.0 %), 24 rejected" in (folder / "run.out").read_text()
    pipeliner("--set_alias", str(folder), "filtered")  # any command looks for ended jobs
    assert status_of(folder) == "Succeeded"
    for name, keyword in (("_accepted", "accepted"), ("_rejected", "rejected"), ("", "scored")):
        kind = f"ParticleGroupMetadata.star.relion.{keyword}.cryofilter"
        assert nodes()[f"{folder}/particles{name}.star"] == kind
    assert nodes()["model.safetensors"] == "MlModel.safetensors.cryofilter"


@pytest.mark.slow
def test_the_results_tab_shows_histogram_counts_galleries_and_reports(pipeline):
    job = run("cryofilter.score.particles", in_parts=STAR, weights=["model.safetensors"],
              threshold="keep=0.5", any_contrast=True)  # fmt: skip
    Path(job.output_dir, "report.html").write_text("<p>Report</p>")
    Path(job.output_dir, "logfile.pdf").write_bytes(b"%PDF-1.4")
    shown = job.create_results_display()
    assert kinds_shown(job)[:4] == ["histogram", "table", "montage", "montage"]
    assert kinds_shown(job)[-2:] == ["pdffile", "html"]
    assert sum(shown[0].bins) == 48
    assert shown[1].table_data[0] == ["accepted", "24", "50.0 %"]
    assert {path.suffix for path in Path(job.output_dir, "Thumbnails").iterdir()} == {".png"}


@pytest.mark.slow
def test_an_empty_subset_has_no_node_and_no_gallery(pipeline):
    job = run("cryofilter.score.particles", in_parts=STAR, weights=["model.safetensors"],
              threshold="0", any_contrast=True)  # fmt: skip
    assert status_of(job.output_dir.rstrip("/")) == "Succeeded"
    assert kinds_shown(job)[:3] == ["histogram", "table", "montage"]
    assert not [name for name in nodes() if "rejected" in name]


@pytest.mark.slow
def test_a_job_with_bad_input_fails_with_one_sentence_and_leaves_no_particles(pipeline):
    Path("Extract/job001/Mics/mic0.mrcs").unlink()
    folder = run_from_the_command_line(
        "cryofilter.score.particles", in_parts=STAR, weights="model.safetensors"
    )
    assert (folder / "PIPELINER_JOB_EXIT_FAILED").exists()
    assert "12 of 48 images can't be used" in (folder / "run.err").read_text()
    assert not list(folder.glob("particles*.star"))


@pytest.mark.slow
def test_an_aborted_job_ends_as_aborted(pipeline):
    rows = Path(STAR).read_text()
    for number in range(4):
        making.write_stack(Path(f"Extract/job001/Mics/mic{number}.mrcs"), making.blobs(3000, 32))
    first = next(line for line in rows.splitlines() if "@" in line)
    head = rows[: rows.index(first)]
    many = [re.sub(r"\d+@(\S+)\d\.mrcs", rf"{i + 1}@\g<1>{m}.mrcs", first)
            for m in range(4) for i in range(3000)]  # fmt: skip
    Path(STAR).write_text(head + "\n".join(many) + "\n \n")
    said = pipeliner("--run_job", write_job(
        "cryofilter.score.particles", in_parts=STAR, weights="model.safetensors", tta="Yes",
        any_contrast="Yes", batch_size=2,
    ))  # fmt: skip
    folder = Path(re.search(r"Ran job as: (\S+)", said)[1])
    wait_until(lambda: (folder / "score_cache.journal").exists() or ended(folder))
    pipeliner("--abort_job", str(folder))
    wait_until(lambda: ended(folder))
    assert (folder / "PIPELINER_JOB_EXIT_ABORTED").exists()
    assert not list(folder.glob("particles*.star"))
    assert not list(folder.glob(".*.part"))


@pytest.mark.slow
def test_a_continued_job_runs_again_in_its_folder(pipeline):
    job = run("cryofilter.score.particles", in_parts=STAR, weights=["model.safetensors"],
              any_contrast=True)  # fmt: skip
    scores = np.loadtxt(Path(job.output_dir, "scores.csv"), delimiter=",")
    again = PipelinerProject().continue_job(job.output_dir, run_in_foreground=True)
    assert again.output_dir == job.output_dir
    assert status_of(job.output_dir.rstrip("/")) == "Succeeded"
    assert (np.loadtxt(Path(job.output_dir, "scores.csv"), delimiter=",") == scores).all()


@pytest.mark.slow
def test_train_score_and_metrics_chain_by_their_nodes(pipeline):
    good, bad = labelled_files(pipeline)
    trained = run("cryofilter.train.particles", pos=[good], neg=[bad], model="straight", f=4,
                  epochs=2, seed=1)  # fmt: skip
    assert kinds_shown(trained)[:2] == ["graph", "table"]
    model = f"{trained.output_dir}model.safetensors"
    assert nodes()[model] == "MlModel.safetensors.cryofilter"
    measured = run("cryofilter.metrics.particles", pos=[good], neg=[bad], weights=[model],
                   any_contrast=True)  # fmt: skip
    assert nodes()[f"{measured.output_dir}metrics.json"] == "EvaluationMetric.json.cryofilter"
    shown = kinds_shown(measured)
    assert shown[:6] == ["table", *["image"] * 5]
    assert "pdffile" in shown[6:]
    run("cryofilter.score.particles", in_parts=good, weights=[model], any_contrast=True)
    edges = Path("default_pipeline.star").read_text().split("data_pipeline_input_edges")[1]
    assert edges.split("data_pipeline_output_edges")[0].count(model) == 2
    PipelinerProject().run_cleanup([trained.output_dir])
    assert not list(Path(trained.output_dir).glob("checkpoint*"))


@pytest.mark.slow
@pytest.mark.relion
def test_relions_own_select_job_of_the_pipeliner_works_on_with_the_accepted_particles(pipeline):
    job = run("cryofilter.score.particles", in_parts=STAR, weights=["model.safetensors"],
              threshold="keep=0.5", any_contrast=True)  # fmt: skip
    accepted = f"{job.output_dir}particles_accepted.star"
    split = run("relion.select.split", fn_data=accepted, do_split=True, split_size=12)
    assert status_of(split.output_dir.rstrip("/")) == "Succeeded"
    assert [node.name for node in split.input_nodes] == [accepted]
    parts = sorted(Path(split.output_dir).glob("particles_split*.star"))
    assert [path.read_text().count("@") for path in parts] == [12, 12]
    chosen = run(
        "relion.select.onvalue", fn_data=f"{job.output_dir}particles.star",
        select_label="rlnParticleFigureOfMerit", select_minval=0.5, select_maxval=1.0,
    )  # fmt: skip
    assert status_of(chosen.output_dir.rstrip("/")) == "Succeeded"
    scores = np.loadtxt(Path(job.output_dir, "scores.csv"), delimiter=",")[:, 1]
    kept = Path(chosen.output_dir, "particles.star").read_text().count("@")
    assert 0 < kept == (scores >= 0.5).sum()

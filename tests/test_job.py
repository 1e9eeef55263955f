"""The External-job guard, without RELION: whatever happens, an exit file tells how it ended."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import making
import mrcfile
import numpy as np
import pytest
from making import PATIENCE_S, ROOT, started

from relion_cryofilter.errors import UsageError
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.relion import job, nodes, templates
from relion_cryofilter.relion.templates import job_star

SHIM = ROOT / "external_job.py"
JOB = "External/job002/"
RESULTS = ["particles.star", "particles_accepted.star", "particles_rejected.star", "scores.csv"]


def run(words, python=sys.executable, **options):
    """Start external_job.py as RELION would, with the words typed into its window."""
    command = [str(python), str(SHIM), *words.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, **options)


def outcome(folder=JOB):
    """Return the names of the exit files in the job's folder."""
    return sorted(path.name.rpartition("_")[2] for path in Path(folder).glob("RELION_JOB_EXIT_*"))


def score_words(more=""):
    return (
        f"--o {JOB} --in_parts Extract/job001/particles.star --mode score --weights "
        f"model.safetensors --j 2 {more} --pipeline_control {JOB}"
    )


@pytest.mark.slow
def test_a_job_leaves_results_nodes_and_success(project):
    Path(JOB).mkdir(parents=True)
    done = run(score_words())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert outcome() == ["SUCCESS"]
    accepted, rejected, everything = (
        read_particles(Path(JOB, f"particles{part}.star"))
        for part in ("_accepted", "_rejected", "")
    )
    assert len(accepted) + len(rejected) == len(everything) == 48
    assert f"{len(accepted)} accepted" in done.stdout
    assert f"{len(rejected)} rejected" in done.stdout
    text = Path(JOB, "RELION_OUTPUT_NODES.star").read_text()
    assert f"{JOB}particles_accepted.star 3 ParticleGroupMetadata.star.relion" in text
    assert Path(".pipeline_has_changed").exists()


def test_scores_in_star_and_csv_agree_and_decide(project):
    assert job.main(score_words("--threshold 0.3").split()) == 0
    particles = read_particles(Path(JOB, "particles.star"))
    label = ["rlnParticleFigureOfMerit"]
    values = np.array([float(v) for (v,) in particles.table.columns(label)])
    lines = Path(JOB, "scores.csv").read_text().splitlines()
    assert [int(line.split(", ")[0]) for line in lines] == list(range(48))
    assert np.allclose([float(line.split(", ")[1]) for line in lines], values, atol=5.1e-5)
    accepted = read_particles(Path(JOB, "particles_accepted.star"))
    kept = [float(v) for (v,) in accepted.table.columns(label)]
    assert kept == [value for value in values if value >= 0.3]


@pytest.mark.slow
def test_nothing_to_accept_is_neither_written_nor_registered(scored, capsys):
    assert Path(JOB, "particles_accepted.star").exists()
    assert job.main(score_words("--threshold 1").split()) == 0
    said = capsys.readouterr().out
    assert "No particles for particles_accepted.star, so it is not written." in said
    assert not Path(JOB, "particles_accepted.star").exists()
    assert "accepted" not in Path(JOB, "RELION_OUTPUT_NODES.star").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--thresold 0.5", "Did you mean --threshold?"),
        ("--mode", None),
        ("--tta perhaps", "--tta is 'perhaps'"),
        ("--weights nowhere.h5", "nowhere.h5"),
        ("--model roberts", "--model is roberts, but model.safetensors has straight"),
        ("--img_dim 64", "--img_dim is 64, but model.safetensors has 28"),
        ("--score_label rlnMicrographName", "RELION keeps something else in columns"),
        ("--score_label loop_", "expected a label like rlnParticleFigureOfMerit"),
        ("--out_file External", "is a folder or another result"),
        ("-j 1", "options begin with two dashes: --j"),
        ("--o Extract/job001/", "would overwrite the input"),
    ],
)
def test_a_bad_option_leaves_failure_and_one_sentence(project, capsys, more, message):
    before = {path: path.read_bytes() for path in Path("Extract").rglob("*") if path.is_file()}
    code = job.main(score_words(more).split())
    if message is None:
        assert outcome() == ["SUCCESS"]
        return
    assert code != 0
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("ERROR: ")
    assert "Traceback" not in said
    assert outcome() == ([] if "Extract" in more else ["FAILURE"])
    assert not list(Path("Extract").rglob("RELION_JOB_EXIT_*"))
    assert not any(Path(JOB, name).exists() for name in RESULTS)
    assert before == {path: path.read_bytes() for path in before}


def test_a_missing_stack_fails_before_anything_is_written(project, capsys):
    Path("Extract/job001/Mics/mic1.mrcs").unlink()
    assert job.main(score_words().split()) == 1
    assert outcome() == ["FAILURE"]
    said = capsys.readouterr().err
    assert "12 of 48 images can't be used: 12 in stacks that can't be read" in said
    assert not any(Path(JOB, name).exists() for name in RESULTS)
    assert job.main(score_words("--skip_bad").split()) == 0
    assert outcome() == ["SUCCESS"]
    assert len(Path(JOB, "bad_images.csv").read_text().splitlines()) == 13
    assert job.main(score_words("--skip_bad --threshold 0").split()) == 0
    assert len(read_particles(Path(JOB, "particles_rejected.star"))) == 12


def test_of_stacks_too_nothing_of_an_earlier_run_is_left(project, capsys):
    Path("bad.mrcs").write_bytes(Path("Extract/job001/Mics/mic1.mrcs").read_bytes())
    with mrcfile.open("bad.mrcs", "r+") as file:
        file.data[3] = np.nan
    words = f"score --mrc bad.mrcs --o {JOB} --weights model.safetensors"
    assert job.main(f"{words} --skip_bad --features".split()) == 0
    assert Path(JOB, "bad_images.csv").exists()
    Path("bad.mrcs").write_bytes(Path("Extract/job001/Mics/mic1.mrcs").read_bytes())
    capsys.readouterr()
    assert job.main(words.split()) == 0
    assert not any(Path(JOB, name).exists() for name in ("bad_images.csv", "features.npy"))
    assert "bad_images" not in capsys.readouterr().out


def test_nothing_but_bad_images_is_a_failure(project):
    for stack in Path("Extract/job001/Mics").iterdir():
        stack.unlink()
    done = run(score_words("--skip_bad --features"))
    assert outcome() == ["FAILURE"]
    assert "No image is left. Check the working directory" in done.stderr
    assert not any(Path(JOB, name).exists() for name in [*RESULTS, "features.npy"])


@pytest.mark.slow
def test_what_an_earlier_run_left_is_removed(project):
    Path(JOB).mkdir(parents=True)
    Path(JOB, ".features.npy.abc.part").touch()
    assert job.main(score_words("--features").split()) == 0
    assert Path(JOB, "features.npy").exists()
    assert job.main(score_words().split()) == 0
    assert not Path(JOB, "features.npy").exists()
    assert not list(Path(JOB).glob(".*.part"))


def raising(error):
    def broken(*_):
        raise error

    return broken


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("numpy: wrong version", name="numpy"),
            "PYTHONPATH=/opt/relion/lib may bring in",
        ),
        (OSError("libcudart.so.12: cannot open shared object"), "-E external_job.py"),
        (OSError(28, "No space left on device"), "Check the disk, the memory"),
        (KeyboardInterrupt(), "Ended by the keyboard"),
    ],
)
def test_a_broken_environment_is_told_from_a_bug(project, monkeypatch, capsys, error, message):
    monkeypatch.setenv("PYTHONPATH", "/opt/relion/lib")
    monkeypatch.setattr("relion_cryofilter.commands.run", raising(error))
    assert job.main(score_words().split()) != 0
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert outcome() == ["FAILURE"]


def test_a_shim_that_lost_its_package_leaves_failure(project, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copy(SHIM, alone)
    Path(JOB).mkdir(parents=True)
    Path(JOB, job.SUCCESS).touch()  # of an earlier run
    command = [sys.executable, "-S", "-E", str(alone / "external_job.py"), "--o", JOB]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert outcome() == ["FAILURE"]
    assert "relion_cryofilter can't be loaded" in done.stderr


@pytest.mark.slow
def test_a_shim_found_through_a_link_finds_its_package(project, tmp_path_factory):
    link = tmp_path_factory.mktemp("link") / "job.py"
    link.symlink_to(SHIM)
    command = [sys.executable, str(link), *score_words().split()]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_folder_that_cannot_be_made_is_one_sentence(project, capsys):
    Path("afile").touch()
    assert job.main(score_words("--o afile/sub/").split()) == 1
    text = capsys.readouterr().err
    assert text.count("ERROR") == 1
    assert "Traceback" not in text


def test_the_folder_of_another_relion_job_is_not_touched(project):
    other = Path("Class2D/job005")
    other.mkdir(parents=True)
    (other / "job.star").write_text("data_job\n\n_rlnJobType     8\n")
    (other / job.SUCCESS).touch()
    job.main(["score", "--thresold", "1", "--o", "Class2D/job005/"])
    assert sorted(path.name for path in other.iterdir()) == [job.SUCCESS, "job.star"]


def test_a_bug_leaves_failure_and_a_traceback(project, monkeypatch, capsys):
    monkeypatch.setattr("relion_cryofilter.commands.run", raising(ZeroDivisionError("oh")))
    assert job.main(score_words().split()) == 1
    error = capsys.readouterr().err
    assert "This is a bug in relion_cryofilter" in error
    assert "Traceback" in error
    assert outcome() == ["FAILURE"]


def test_a_python_without_torch_leaves_failure_and_one_sentence(project, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    Path(JOB).mkdir(parents=True)
    done = run(score_words(), python=bare / "bin/python", env={"PATH": os.environ["PATH"]})
    assert outcome() == ["FAILURE"]
    assert done.stderr.count("ERROR:") == 1
    assert "has no " in done.stderr
    assert "pip install ." in done.stderr
    assert "Traceback" not in done.stderr


def old_pythons():
    """Return interpreters older than 3.10: on the PATH, or installed by pyenv."""
    names = ("python2", "python3.6", "python3.7", "python3.8", "python3.9")
    found = [shutil.which(name) for name in names]
    found += Path.home().glob(".pyenv/versions/2.7*/bin/python")
    found += Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")
    works = [
        p for p in found if p and not subprocess.run([p, "-c", ""], capture_output=True).returncode
    ]
    return [str(python) for python in works] or [None]


@pytest.mark.parametrize("python", old_pythons())
def test_an_old_python_leaves_failure_too(project, python):
    if python is None:
        pytest.skip("no Python older than 3.10 is installed here")
    Path(JOB).mkdir(parents=True)
    done = run(score_words(), python=python)
    assert "needs Python 3.10 or newer" in done.stderr
    assert outcome() == ["FAILURE"]


def test_the_shim_parses_as_old_python():
    ast.parse(SHIM.read_text(), feature_version=(3, 4))


def test_an_abort_before_the_start_is_honoured_once(project):
    Path(JOB).mkdir(parents=True)
    Path(JOB, job.ABORT_NOW).touch()
    assert job.main(score_words().split()) == 3
    assert outcome() == ["ABORTED"]
    assert not any(Path(JOB, name).exists() for name in RESULTS)
    assert job.main(score_words().split()) == 0
    assert outcome() == ["SUCCESS"]


@contextmanager
def long_job(project):
    """Make 40,000 particles and start a job that takes minutes; give it once it scores."""
    stack = making.blobs(500, 32)
    for number in range(80):
        making.write_stack(project / f"Big/{number}.mrcs", stack)
    rows = [f"{i + 1}@Big/{n}.mrcs\n" for n in range(80) for i in range(500)]
    (project / "big.star").write_text("data_\nloop_\n_rlnImageName\n" + "".join(rows))
    words = f"--o {JOB} --in_parts big.star --weights model.safetensors --tta --batch_size 4 --j 1"
    command, pipe = [sys.executable, str(SHIM), *words.split()], subprocess.PIPE
    with started(command, stdout=pipe, stderr=pipe) as running:
        assert any(b"particles scored (" in line for line in running.stdout)
        yield running


@pytest.mark.slow
def test_an_abort_in_mid_run_stops_and_continue_finishes(project):
    with long_job(project) as running:
        Path(JOB, job.ABORT_NOW).touch()
        out, err = running.communicate(timeout=PATIENCE_S)
    assert outcome() == ["ABORTED"]
    stopped = re.search(rb"Stopped on request after ([\d,]+) of 40,000 particles", out)
    assert int(stopped[1].replace(b",", b"")) < 20_000
    assert err == b""
    assert not any(Path(JOB, name).exists() for name in RESULTS)
    assert not list(Path(JOB).glob(".*part"))
    assert job.main(score_words().split()) == 0
    assert outcome() == ["SUCCESS"]


@pytest.mark.slow
def test_a_queues_sigterm_becomes_failure(project):
    with long_job(project) as running:
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 143
    assert outcome() == ["FAILURE"]
    assert b"Ended by SIGTERM" in err
    assert not list(Path(JOB).glob(".*part"))


def test_a_rerun_gives_the_same_bytes(scored):
    first = {name: Path(JOB, name).read_bytes() for name in RESULTS}
    assert job.main(score_words().split()) == 0
    assert first == {name: Path(JOB, name).read_bytes() for name in RESULTS}


def test_scoring_a_scored_file_overwrites_the_column(scored):
    words = f"score --o again --in_parts {JOB}particles.star --weights model.safetensors"
    assert job.main(words.split()) == 0
    assert Path("again/particles.star").read_bytes() == Path(JOB, "particles.star").read_bytes()


def test_plain_stacks_are_scored_as_in_2020(project, capsys):
    stacks = "Extract/job001/Mics/mic0.mrcs Extract/job001/Mics/mic1.mrcs"
    words = f"score --mrc {stacks} --out_file out/scores.csv --weights model.safetensors --features"
    assert job.main(words.split()) == 0
    lines = Path("out/scores.csv").read_text().splitlines()
    assert [line.split(", ")[0] for line in lines] == [str(row) for row in range(24)]
    assert np.load("out/features.npy").shape[0] == 24
    assert not list(Path("out").glob("RELION*"))


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("--o External/job012/ --j 1", "External/job012/"),
        ("score ----o External/job012/", "External/job012/"),
        ("--mode score --o=out", "out/"),
        ("convert w.h5 --o model.safetensors", None),
        ("job --mode score --o job.star", None),
        ("--in_parts a.star", None),
        ("--in_parts Extract/job001/particles.star --o Extract/job001", None),
        ("--o my out/ --j 1", "my out/"),
        ("--o", None),
        ("scoer --o External/job012/", "External/job012/"),
    ],
)
def test_the_folder_is_found_in_unparsed_words(words, folder):
    found = job.output_folder(words.split())
    assert (found.name if found else None) == folder


@pytest.mark.parametrize(
    ("job_star_text", "version", "label"),
    [
        ("# version 30001\n_rlnJobType 99\n", "3.1", "ParticleGroupMetadata.star.relion"),
        ("# version 30001\n_rlnJobTypeLabel relion.external\n", "4.0", "ParticlesData.star.relion"),
        (
            "# version 50001\n_rlnJobTypeLabel relion.external\n",
            "5.0",
            "ParticleGroupMetadata.star.relion",
        ),
        (None, "5.0", "ParticleGroupMetadata.star.relion"),
    ],
)
def test_nodes_carry_the_label_of_the_relion_that_asks(tmp_path, job_star_text, version, label):
    if job_star_text:
        (tmp_path / "job.star").write_text(job_star_text)
    assert nodes.relion_version(tmp_path / "job.star") == version
    nodes.write_output_nodes(tmp_path, [nodes.Node("E/a.star", "particles")])
    assert f"E/a.star 3 {label}\n" in (tmp_path / "RELION_OUTPUT_NODES.star").read_text()
    nodes.write_output_nodes(tmp_path, [])
    assert not (tmp_path / "RELION_OUTPUT_NODES.star").exists()


def test_the_bundled_model_scores_with_its_own_threshold_and_a_warning(project, capsys):
    assert job.main(f"--o {JOB} --in_parts Extract/job001/particles.star --j 1".split()) == 0
    said = capsys.readouterr().out
    assert "WARNING: The bundled model knows simulated particles and few real ones." in said


def test_job_says_where_it_should_be_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert job.main(["job", "--mode", "score", "--in_parts", "nowhere.star"]) == 0
    text = capsys.readouterr().out
    assert "WARNING: No default_pipeline.star here" in text
    assert "WARNING: --in_parts nowhere.star does not exist here" in text
    assert job.main(["job", "--help"]) == 0
    assert "usage: relion_cryofilter job --mode MODE" in capsys.readouterr().out


def test_job_writes_templates_with_ten_parameters_and_the_rest_as_arguments(project):
    more = "--threshold 0.4 --tta --gpu 0,1 --skip_bad --batch_size 64 --model straight --f 4"
    words = f"job --mode score --in_parts Extract/job001/particles.star --j 4 {more} --img_dim 28"
    assert job.main([*words.split(), "--score_label", "rlnX", "--weights", "w x.h5"]) == 0
    text = Path("job.star").read_text()
    assert Path(".gui_externaljob.star").read_text() == text
    assert "in_part Extract/job001/particles.star\n" in text
    assert "param1_label mode\nparam1_value score\n" in text
    assert re.search(r"param(\d)_label threshold\nparam\1_value 0.4\n", text)
    assert re.search(r"param(\d)_label tta\nparam\1_value Yes\n", text)
    assert "nr_threads 4\n" in text
    assert 'other_args "--' in text


def test_a_model_that_is_not_there_is_named(project, capsys):
    words = "score --in_parts Extract/job001/particles.star --weights no.safetensors --o out/"
    assert job.main(words.split()) == 1
    assert "Model file no.safetensors doesn't exist. Check the path" in capsys.readouterr().err


def test_a_template_empties_the_boxes_that_it_does_not_fill():
    """RELION's "Load job settings" leaves a box as it was if the file does not name it."""
    text = job_star({"mode": ["score"], "tta": []})
    for number in range(3, 11):
        assert f'param{number}_label ""\nparam{number}_value ""\n' in text
    for name in ("in_part", "in_mov", "in_mic", "in_coords", "in_3dref", "in_mask", "other_args"):
        assert f'{name} ""\n' in text
    assert text.count("param1_label") == text.count("param10_label") == 1


def test_a_template_is_checked_like_a_job(project, capsys):
    assert job.main(["job", "--mode", "score", "--thresold", "1"]) == 2
    assert "Did you mean --threshold?" in capsys.readouterr().err
    assert not Path("job.star").exists()


def test_a_template_goes_where_it_is_told(project):
    assert job.main(["job", "score", "--o", "sub/", "--weights", "--tta"]) == 0
    text = Path("sub/job.star").read_text()
    assert "weights" not in text
    assert "param2_label tta\nparam2_value Yes\n" in text
    assert not Path(".gui_externaljob.star").exists()


def test_a_template_cannot_hold_quotes(project, capsys):
    assert job.main(["job", "--mode", "score", "--weights", 'a"b']) == 2
    assert "can't hold a quote" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sign", [*";$`&|<>()*?[]{}!#'\\\t\r\0\x7f", "a\nb", "~/x", "a ~/x", "$(touch x)", "a;b"]
)
def test_a_template_refuses_what_a_shell_would_act_on(project, capsys, sign):
    for option in ("--in_parts", "--weights", "--score_label"):
        assert job.main(["job", "--mode", "score", option, f"{sign}x"]) == 2
        said = capsys.readouterr().err
        assert "RELION gives the values of a job.star to a shell" in said
        assert "Rename the file or its folder" in said
    assert not Path("job.star").exists()


@pytest.mark.parametrize("name", ["a b.star", "Ω/µ–é.star", "a~1.star", "x,y=1:2@3+4%^-_.star"])
def test_a_template_takes_names_that_mean_nothing_to_a_shell(project, name):
    star = Path(name)
    star.parent.mkdir(exist_ok=True)
    star.touch()
    assert job.main(["job", "--mode", "score", "--in_parts", name]) == 0
    text = Path("job.star").read_text()
    value = re.search(r'^in_part "?(.*?)"?$', text, re.M)[1]
    done = subprocess.run(f"echo {value}", shell=True, capture_output=True, text=True)
    assert done.stdout == f"{name}\n"


def test_a_template_refuses_an_interpreter_whose_path_a_shell_would_act_on(project, monkeypatch):
    monkeypatch.setattr(templates, "executable", lambda: "/opt/$HOME/relion_cryofilter")
    with pytest.raises(UsageError, match="to a shell"):
        job_star({"mode": ["score"]})


def test_a_template_quotes_what_has_spaces():
    text = job_star({"mode": ["score"], "in_parts": ["my", "file.star"], "tta": []})
    assert 'in_part "my file.star"\n' in text
    assert "param2_value Yes\n" in text


def test_the_counts_of_a_run_with_missing_images_add_up(project, capsys):
    """Missing ones were neither scored nor known."""
    Path("Extract/job001/Mics/mic1.mrcs").unlink()
    assert job.main(score_words("--skip_bad --any_contrast").split()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"Scored 36 particles in .*, 12 can't be used: ", last)
    assert "known" not in last
    assert job.main(score_words("--skip_bad --any_contrast").split()) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("36 were known, 12 can't be used: ")


def test_a_model_that_gives_an_image_no_score_is_refused(project, monkeypatch, capsys):
    from relion_cryofilter.nn.model import Model

    monkeypatch.setattr(Model, "_score", lambda self, logits: logits * float("nan"))
    assert job.main(score_words("--any_contrast").split()) == 1
    assert "gives no score for 48 of 48 images" in capsys.readouterr().err
    assert not any(Path(JOB, name).exists() for name in RESULTS)

"""What was rejected is looked at again: a Class2D job of it, what it finds comes back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from making import JOB, half_star, rows_of, run_to_end

from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.relion import job
from relion_cryofilter.simulate import simulate_project

LAST = """
# version 30001

data_job

_rlnJobType                             8
_rlnJobIsContinue                       1


# version 30001

data_joboptions_values

loop_
_rlnJobOptionVariable #1
_rlnJobOptionValue #2
do_ctf_correction        Yes
   fn_cont Class2D/job010/run_it012_optimiser.star
    fn_img Extract/job001/particles.star
nr_classes         17
nr_threads          2
particle_diameter        150

"""


def options_of(path=Path("job.star")):
    """Return the options in a job.star, as RELION reads them."""
    rows = path.read_text().partition("_rlnJobOptionValue")[2].splitlines()[1:]
    return {words[0]: words[-1].strip('"') for words in map(str.split, rows) if words}


def rows(name, folder=JOB):
    return [line for line in Path(folder, name).read_text().splitlines() if "@" in line]


@pytest.mark.parametrize("version", ["3.1", "4.0", "5.0"])
def test_the_rejected_become_a_class2d_job_of_the_version_that_is_asked_for(
    scored, version, capsys
):
    assert job.main(f"job --mode check --in_parts {JOB} --relion {version} --j 3".split()) == 0
    text = Path("job.star").read_text()
    kind = "_rlnJobType 8\n" if version == "3.1" else "_rlnJobTypeLabel relion.class2d\n"
    assert kind in text
    assert ("# version 50001" in text) == (version == "5.0")
    options = options_of()
    assert options["fn_img"] == f"{JOB}particles_rejected.star"
    assert options["particle_diameter"] == "67"  # 0.7 boxes of 32 px of 3 Å
    assert (options["nr_classes"], options["nr_threads"]) == ("4", "3")
    assert options["do_ctf_correction"] == "Yes"
    assert Path(".gui_class2djob.star").read_text() == text
    said = capsys.readouterr().out
    assert "WARNING: This project has no Class2D job" in said
    assert "its tab 2D classification is filled in (.gui_class2djob.star)" in said


def test_settings_are_those_of_the_last_classification(scored, capsys):
    for number, text in (("9", LAST.replace("17", "5")), ("10", LAST)):
        folder = Path(f"Class2D/job0{number.zfill(2)}")
        folder.mkdir(parents=True)
        (folder / "job.star").write_text(text)
    assert job.main(f"job --mode check --in_parts {JOB} --o again.star".split()) == 0
    assert "Settings as in" in capsys.readouterr().out
    found, before = options_of(Path("again.star")), options_of(Path("Class2D/job010/job.star"))
    assert found == {**before, "fn_img": f"{JOB}particles_rejected.star", "fn_cont": ""}
    assert re.search(r"_rlnJobIsContinue +0\n", Path("again.star").read_text())
    assert not Path("job.star").exists()


def test_a_sample_of_the_rejected_is_the_same_each_time_and_verbatim(scored):
    words = f"job check --in_parts {JOB} --sample 5"
    assert job.main(words.split()) == 0
    assert options_of()["fn_img"] == f"{JOB}particles_rejected_sample.star"
    drawn = rows("particles_rejected_sample.star")
    assert len(drawn) == 5
    assert set(drawn) <= set(rows("particles_rejected.star"))
    assert job.main(words.split()) == 0
    assert rows("particles_rejected_sample.star") == drawn
    assert job.main([*words.split(), "--seed", "1"]) == 0
    assert rows("particles_rejected_sample.star") != drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("job --mode check", "Say whose rejected particles"),
        ("job --mode check --in_parts Extract/job001/", "is no STAR file of particles"),
        ("job --mode check --in_parts x.cs", "is no STAR file of particles"),
        ("job --mode check --in_parts x --relion 2.0", "expected 3.1 or 4.0 or 5.0"),
        ("--mode check --in_parts External/job002/", "relion_cryofilter job --mode check"),
    ],
)
def test_what_cannot_be_checked_is_said(project, words, message, capsys):
    assert job.main(words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.relion
def test_relion_runs_the_job_and_what_it_keeps_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simulate_project(tmp_path, n_micrographs=2, particles_per_micrograph=30, snr=0.2)
    words = f"score --in_parts Extract/job001/particles.star --threshold keep=0.3 --o {JOB}"
    assert job.main(words.split()) == 0
    assert job.main(f"job --mode check --in_parts {JOB} --j 2".split()) == 0
    text = Path("job.star").read_text()
    assert "_rlnJobType 8" in text  # as the project
    Path("job.star").write_text(text.replace("fn_img", "nr_iter 2\npsi_sampling 12\nfn_img"))
    added = run_to_end(["relion_pipeliner", "--addJobFromStar", "job.star"])
    assert added.returncode == 0
    assert "WARNING" not in added.stderr + added.stdout
    run_to_end(["relion_pipeliner", "--RunJobs", "Class2D/job002/", "--sec_wait_after", "1"])
    assert Path("Class2D/job002/RELION_JOB_EXIT_SUCCESS").exists()
    found = "Class2D/job002/run_it002_data.star"
    assert len(read_particles(Path(found))) == rows_of("particles_rejected.star") == 42
    words = f"select --in_parts {JOB}particles.star --add {found} --o T/"
    assert job.main(words.split()) == 0
    assert sorted(rows("particles_accepted.star", "T")) == sorted(rows("particles.star"))


@pytest.fixture
def found_good(scored):
    """Every third of the rejected with one column more, and one of the accepted, as a selection."""
    kept, lost = rows("particles_accepted.star"), rows("particles_rejected.star")
    chosen = [*lost[::3], kept[0], lost[0]]
    text = Path(JOB, "particles.star").read_text()
    head = text[: text.index("rlnParticleFigureOfMerit")] + "rlnParticleFigureOfMerit #8\n"
    lines = "".join(f"{row} 7 \n" for row in chosen)
    Path("found.star").write_text(f"{head}_rlnClassNumber #9\n{lines}\n")
    return lost[::3]


def test_what_was_found_good_comes_back_once_and_verbatim(found_good, capsys):
    words = f"select --in_parts {JOB}particles.star --add found.star --o T/"
    assert job.main(words.split()) == 0
    kept, lost = rows("particles_accepted.star"), rows("particles_rejected.star")
    now, left = (rows(f"particles_{side}.star", "T") for side in ("accepted", "rejected"))
    everyone = rows("particles.star")
    assert now == [row for row in everyone if row in kept or row in found_good]
    assert left == [row for row in lost if row not in found_good]
    said = capsys.readouterr().out
    assert f"Added {len(found_good)} particles of found.star: 1 accepted already, 0 not in" in said
    assert f"Accepted as in {JOB}particles_accepted.star or added: {len(now)} accepted" in said
    assert not Path("T/particles_random.star").exists()


def test_a_threshold_and_an_addition_go_together(found_good):
    words = f"select --in_parts {JOB}particles.star --threshold 1 --add found.star --o T/"
    assert job.main(words.split()) == 0
    assert rows_of("particles_accepted.star", "T") == len(found_good) + 1


def test_a_random_subset_is_as_large_as_the_accepted_and_drawn_from_all(scored):
    words = f"select --in_parts {JOB}particles.star --threshold count=20 --random --o T/"
    assert job.main(words.split()) == 0
    drawn, everyone = rows("particles_random.star", "T"), rows("particles.star")
    assert len(drawn) == len(set(drawn)) == 20
    assert drawn == [row for row in everyone if row in drawn]
    assert set(drawn) - set(rows("particles_accepted.star", "T"))
    assert "T/particles_random.star 3 " in Path("T/RELION_OUTPUT_NODES.star").read_text()
    assert job.main([*words.split(), "--seed", "1"]) == 0
    assert rows("particles_random.star", "T") != drawn
    assert job.main(words.replace("--random", "").split()) == 0
    assert not Path("T/particles_random.star").exists()


def test_particles_of_another_set_cannot_come_back(scored, capsys):
    star = half_star(Path(), "other.star", lambda line: True)
    star.write_text(star.read_text().replace("Mics/mic", "Mics/other"))
    words = f"select --in_parts {JOB}particles.star --add other.star --o T/"
    assert job.main(words.split()) == 2
    assert "none of its 48 particles is in" in capsys.readouterr().err


def test_what_was_accepted_must_be_known(scored, capsys):
    for side in ("accepted", "rejected"):
        Path(JOB, f"particles_{side}.star").unlink()
    assert job.main(f"select --in_parts {JOB}particles.star --random --o T/".split()) == 2
    assert "so what was accepted isn't known" in capsys.readouterr().err

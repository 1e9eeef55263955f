"""The scripts of examples/ do what they say, on data that they simulate."""

from __future__ import annotations

import subprocess

import making
import pytest
from making import ROOT

from relion_cryofilter.errors import UsageError
from relion_cryofilter.particles.labels import read_labels
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.simulate import simulate_project, simulate_selection


@pytest.mark.slow
def test_the_examples_run_one_after_the_other(tmp_path):
    environment = making.command_line(tmp_path / "bin")
    project = tmp_path / "project"
    simulate = f"python {ROOT}/examples/simulate.py {project} --micrographs 8 --particles 30"
    scripts = [f"bash {ROOT}/examples/{name}.sh {project}" for name in
               ("score", "train_from_select", "rethreshold")]  # fmt: skip
    for command in (simulate, *scripts):
        done = subprocess.run(
            command.split(), env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    accepted = "particles_accepted.star"
    assert len(read_particles(project / "scored" / accepted)) == 144
    assert len(read_particles(project / "best_200" / accepted)) == 200
    assert (project / "precise" / accepted).is_file()


def test_a_simulated_select_job_gives_the_truth_but_for_the_wrong_ones(tmp_path):
    star = simulate_project(tmp_path / "p", n_micrographs=4, particles_per_micrograph=50)
    labelled = read_labels(simulate_selection(star, wrong=0.2))
    truth = dict(line.split(",")[:2] for line in (tmp_path / "p/truth.csv").read_text().split())
    names = [labelled.particles.image_name(row) for row in range(len(labelled))]
    agree = sum(truth[name] == str(int(label)) for name, label in zip(names, labelled.labels))
    assert len(names) == 200
    assert 140 < agree < 180


def test_a_select_job_is_simulated_once_and_for_relion_3(tmp_path):
    star = simulate_project(tmp_path / "p", n_micrographs=2, particles_per_micrograph=8)
    simulate_selection(star)
    with pytest.raises(UsageError, match="expected a new project"):
        simulate_selection(star)
    five = simulate_project(
        tmp_path / "five", n_micrographs=2, particles_per_micrograph=8, relion_version="5"
    )
    with pytest.raises(UsageError, match=r"RELION 3\.1"):
        simulate_selection(five)

"""What a newcomer runs first."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from making import ROOT

from relion_cryofilter.commands import demo as demo_command
from relion_cryofilter.options import DemoOptions
from relion_cryofilter.particles.particles import read_particles

ROW = r"^  (\w+) +(\d+) +(\d+) +(\d+)$"
COMMAND = [sys.executable, "-m", "relion_cryofilter"]


def demo(folder):
    return subprocess.run([*COMMAND, "demo", folder], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_demo_filters_a_project_before_and_after_a_training(tmp_path, monkeypatch, caplog):
    done = demo(tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert "Simulating a RELION project" in done.stdout
    found = re.findall(r": ([\d,]+) accepted \(.*?\), ([\d,]+) rejected", done.stdout)
    assert len(found) == 2
    for job, counts in zip(("job002", "job004"), found):
        folder = tmp_path / "demo/External" / job
        for name, count in zip(("accepted", "rejected"), counts):
            rows = len(read_particles(folder / f"particles_{name}.star"))
            assert rows == int(count.replace(",", ""))
    assert str(folder) in done.stdout
    table = re.findall(ROW, done.stdout, re.MULTILINE)
    kept = {kind: [int(n) / int(total) for n in accepted] for kind, total, *accepted in table}
    assert kept["particle"][0] > 0.7  # the bundled model keeps noise out, and weak ones with it
    assert kept["empty"][0] < 0.05
    assert kept["aggregate"][0] < 0.1
    assert kept["particle"][1] > 0.85
    assert kept["empty"][1] < 0.25
    assert kept["aggregate"][1] < 0.5
    # The next time it filters the same project again; the model is not trained anew here.
    results = ("External/job002/particles.star", "External/job004/particles_accepted.star")
    before = [(tmp_path / "demo" / name).read_bytes() for name in results]
    jobs, run_job = [], demo_command._run_job

    def run_or_skip(words, project):
        jobs.append(words[0])
        if words[0] != "train":
            run_job(words, project)

    monkeypatch.setattr(demo_command, "_run_job", run_or_skip)
    with caplog.at_level("INFO"):
        demo_command.demo(DemoOptions(folder=tmp_path / "demo"))
    assert "holds the simulated project already" in caplog.text
    assert jobs == ["score", "train", "score"]
    assert [(tmp_path / "demo" / name).read_bytes() for name in results] == before
    rows = [row for text in caplog.messages for row in re.findall(ROW, text, re.MULTILINE)]
    assert rows == table


def test_the_demo_does_not_touch_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    done = demo(tmp_path)
    assert done.returncode == 2
    assert "is not a demo project. Name a new folder." in done.stderr


@pytest.mark.parametrize("words", ["score", "train", "metrics", "select", "convert", "demo", "job"])
def test_the_readme_shows_every_mode(words):
    assert re.search(rf"relion_cryofilter {words}\b", (ROOT / "README.md").read_text())

"""What a newcomer runs first."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from relion_cryofilter.data.particles import read_particles

COMMAND = [sys.executable, "-m", "relion_cryofilter"]


def demo(folder):
    return subprocess.run([*COMMAND, "demo", folder], capture_output=True, text=True, cwd=ROOT)


def test_the_demo_scores_a_project_and_says_where_the_results_are(tmp_path):
    for said in ("Simulating a RELION project", "holds the simulated project already"):
        done = demo(tmp_path / "demo")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        folder = tmp_path / "demo" / "External/job002"
        assert str(folder) in done.stdout
        counts = re.search(r": ([\d,]+) accepted \(.*?\), ([\d,]+) rejected", done.stdout)
        for name, count in zip(("accepted", "rejected"), counts.groups()):
            assert len(read_particles(folder / f"particles_{name}.star")) == int(count)
        kept = {k: int(a) / int(b) for k, a, b in
                re.findall(r"  (\w+) +(\d+) of +(\d+)", done.stdout)}  # fmt: skip
        assert kept["particle"] > 0.8
        assert kept["empty"] < 0.6


def test_the_demo_does_not_touch_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    done = demo(tmp_path)
    assert done.returncode == 2
    assert "is not a demo project. Name a new folder." in done.stderr


@pytest.mark.parametrize("words", ["score", "train", "metrics", "select", "convert", "demo", "job"])
def test_the_readme_shows_every_mode(words):
    assert re.search(rf"relion_cryofilter {words}\b", (ROOT / "README.md").read_text())

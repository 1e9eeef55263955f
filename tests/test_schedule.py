"""The real RELION 3.1.3 runs our Schedule: extraction and scoring in turns, as micrographs come."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from making import PATIENCE_S, ROOT, run_to_end, started, wait_until

from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.simulate import random_molecule
from relion_cryofilter.simulate.micrograph import simulate_micrograph

pytestmark = pytest.mark.relion
BOX, PICKS = 64, 12
PICK_HEAD = "\ndata_\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n"
EMPTY = "\n# version 30001\n\ndata_pipeline_general\n\n_rlnPipeLineJobCounter 1\n \n"
RUN = ["relion_scheduler", "--schedule", "filter", "--run"]
SCORES = Path("External/job004/scores.csv")


def add_micrograph(number, where="Micrographs"):
    """Write a simulated micrograph and its picks, as a microscope and a picker would."""
    molecule = random_molecule(np.random.default_rng(0), 120.0)
    rng = np.random.default_rng(number)
    image, picks = simulate_micrograph(rng, molecule, ["particle"] * PICKS, box_px=BOX, snr=0.2)
    folder = Path(where)
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{x:12.2f} {y:12.2f}\n" for x, y in zip(picks.x, picks.y))
    (folder / f"mic{number}_pick.star").write_text(f"{PICK_HEAD}{rows}\n")
    with mrcfile.new(folder / f"mic{number}.mrc") as file:
        file.set_data(image)
        file.voxel_size = 3.0


def make_schedule(*words):
    options = ["--angpix", "3", "--box", str(BOX), "--wait_sec", "1", *words]
    done = run_to_end([sys.executable, ROOT / "examples/schedule.py", *options])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_schedule_extracts_and_scores_in_turns_as_micrographs_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("default_pipeline.star").write_text(EMPTY)
    add_micrograph(1)
    add_micrograph(2)
    add_micrograph(3, where="coming")
    make_schedule("--rounds", "2", "--score", "threshold keep=0.5", "any_contrast Yes")
    with started(RUN, stdout=subprocess.PIPE, text=True) as running:
        wait_until(Path("External/job004/run.out").exists, running)  # round 1 has read its picks
        first = Path("Extract/job003/Micrographs/mic1.mrcs").stat()
        for path in Path("coming").iterdir():
            path.rename(Path("Micrographs") / path.name)
        wait_until(Path("External/job004/RELION_JOB_EXIT_SUCCESS").exists, running)
        assert len(SCORES.read_text().splitlines()) == 2 * PICKS
        said, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    assert "reached an exit point" in said
    assert len(SCORES.read_text().splitlines()) == 3 * PICKS
    assert len(read_particles("External/job004/particles_accepted.star")) == 3 * PICKS // 2
    assert Path("Extract/job003/Micrographs/mic1.mrcs").stat().st_mtime_ns == first.st_mtime_ns
    pipeline = Path("default_pipeline.star").read_text()
    jobs = re.findall(r"^(\w+/job\d+)/\s+None\s+\d+\s+(\d)", pipeline, re.M)
    assert jobs == [("Import/job001", "2"), ("Import/job002", "2"), ("Extract/job003", "2"),
                    ("External/job004", "2")]  # fmt: skip


@pytest.mark.slow
def test_a_schedule_stops_where_its_score_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("default_pipeline.star").write_text(EMPTY)
    add_micrograph(1)
    make_schedule("--score", "weights missing.safetensors")
    done = run_to_end(RUN)
    assert "Stopping schedule due to job External/job004/ failing" in done.stdout + done.stderr

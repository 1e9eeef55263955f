"""The scripts of examples/ and benchmarks/ start, and the memory benchmark runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from making import ROOT

SCRIPTS = [
    *sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]),
    ROOT / "benchmarks/pretraining/pretrain.py",
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_explains_itself(script):
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_memory_benchmark_runs():
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), "--n", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "MB for the job" in done.stdout

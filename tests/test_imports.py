"""The rooms of the house: imports point down only."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "relion_cryofilter"
FORBIDDEN = {
    "data": ("nn", "results", "relion", "cli", "commands", "doppio"),
    "nn": ("results", "relion", "cli", "commands", "doppio"),
    "results": ("data", "nn", "relion", "cli", "commands", "doppio"),
    "relion": ("nn", "results", "doppio"),
    "commands": ("cli", "doppio"),
    "doppio": ("nn", "results", "relion", "cli", "commands"),
}


def imported(path):
    """Return the modules of the package that a file imports, e.g. ``data.star``."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("relion_cryofilter."):
                yield name.removeprefix("relion_cryofilter.")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_know_the_rooms_above_it(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in FORBIDDEN[room], f"{path.name} imports {name}"


def test_only_the_front_doors_print():
    doors = {"cli.py", "job.py"}
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert path.name in doors or not prints, f"{path.name} prints"


def test_scoring_starts_without_packages_that_only_training_needs():
    """They take a second or two to import."""
    code = "import sys, relion_cryofilter.commands.score; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "pandas", "matplotlib"} & set(done.stdout.split())

"""The rooms of the house stand in one line: imports point to the left, never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from making import ROOT

PACKAGE = ROOT / "relion_cryofilter"
LINE = (
    "errors", "inputs", "files", "processes", "locks", "kinds", "options", "thresholds", "progress",
    "evaluation", "particles", "simulate", "images", "nn", "results", "commands", "api", "cli",
    "relion", "doppio",
)  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or not path.name.startswith("__")
}


def imported(path):
    """Return the modules of the package that a file imports anywhere, e.g. ``particles.star``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found.update(name.removeprefix("relion_cryofilter.") for name in names)
    return found & set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_knows_only_the_rooms_to_its_left(name):
    room = LINE.index(name.split(".")[0])
    for other in imported(MODULES[name]):
        assert LINE.index(other.split(".")[0]) <= room, f"{name} imports {other}"


def test_no_imports_go_in_a_circle():
    inner = {name: imported(path) - {name, name.split(".")[0]} for name, path in MODULES.items()}
    assert list(TopologicalSorter(inner).static_order())


def test_a_module_name_exists_once():
    files = [name for name, path in MODULES.items() if path.name != "__init__.py"]
    rest = [name.split(".")[-1] for name in files if not name.startswith("commands.")]
    assert len(rest) == len(set(rest))


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
    heavy = {"sklearn", "scipy", "pandas", "starfile", "matplotlib", "mrcfile"}
    assert not heavy & set(done.stdout.split())

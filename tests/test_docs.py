"""Every command in README.md and docs/ runs, in a RELION project that is simulated for the page.

A page's ```bash and ```python blocks run from top to bottom. A mark before a block says what it
needs: ``run: relion`` RELION's programs, ``run: screen`` those with a window (under Xvfb). The
blocks ``run: demo`` and ``run: tests`` are run by .ci/run; ``run: tests/test_x.py`` names the test
that runs a block. ``<!-- before: … -->`` runs, unseen, what a reader does in RELION's window.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

import making
import pytest
from making import PATIENCE_S, ROOT, write_keras

from relion_cryofilter import cli
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.simulate import simulate_project, simulate_selection

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(
    r"<!-- before: (?P<before>.*?) -->"
    r"|(?:<!-- run: (?P<mark>[\w/.]+) -->\n)?"
    r"^ *```(?P<kind>bash|python)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)
JOBS = {"Extract/job001": "Extract/job007", "Class2D/job002": "Class2D/job008",
        "Select/job003": "Select/job009"}  # fmt: skip
NEXT_JOB = 12
SECONDS_ON_SCREEN = 4
LARGEST_PICTURE = 150_000


@dataclass(frozen=True)
class Block:
    """A piece of a page that can be run: its mark, if any, its language and its text."""

    mark: str
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text()):
        if match["before"]:
            found.append(Block("", "bash", match["before"]))
        else:
            found.append(Block(match["mark"] or "", match["kind"], textwrap.dedent(match["text"])))
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The commands of this checkout, and an `sbatch` that starts the script at once."""
    folder = tmp_path_factory.mktemp("commands")
    variables = making.command_line(folder / "bin")
    (folder / "bin/sbatch").write_text('#!/bin/sh\nbash "$1" > "$1.log" 2>&1 &\n')
    (folder / "bin/sbatch").chmod(0o755)
    return {**variables, "HOME": str(folder)}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A project in which the pages' job numbers are right, up to External/job010."""
    project = tmp_path_factory.mktemp("pages") / "project"
    particles = simulate_project(project, n_micrographs=6, particles_per_micrograph=18, snr=0.1)
    simulate_selection(particles)
    for old, new in JOBS.items():
        (project / old).rename(project / new)
    for path in project.rglob("*.star"):
        text = path.read_text()
        for old, new in JOBS.items():
            text = text.replace(old, new)
        path.write_text(re.sub(r"(JobCounter +)\d+", rf"\g<1>{NEXT_JOB}", text))
    shutil.copytree(project / "Select/job009", project / "Select/job011")
    stacks = sorted((project / "Extract/job007").rglob("*.mrcs"))
    for name, stack in zip(("a.mrcs", "b.mrcs"), stacks):
        shutil.copy(stack, project / name)
    write_keras(project / "weights.h5", build_network("straight", f=4))
    return project


@pytest.fixture
def project(simulated, tmp_path):
    shutil.copytree(simulated, tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="module")
def screen(environment):
    """The number of an X display without a screen, or None if there can't be one."""
    if not (shutil.which("Xvfb") and shutil.which("relion_display")):
        yield None
        return
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", "1280x1024x24"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with making.started(command, **pipes) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()  # so that it takes its lock away
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, project, environment, screen):
    lacking = []
    for block in blocks(page):
        if block.mark in ("demo", "tests") or block.mark.endswith(".py"):
            assert block.mark in ("demo", "tests") or (ROOT / block.mark).is_file()
        elif block.mark == "relion" and shutil.which("relion_refine") is None:
            lacking.append("RELION's programs (Debian: relion)")
        elif block.mark == "screen" and not screen:
            lacking.append("RELION's windows (Debian: relion-gui and xvfb)")
        elif block.mark == "screen":
            stays_open(block.text, project, {**environment, "DISPLAY": f":{screen}"})
        else:
            run(block, project, environment)
    if lacking and os.environ.get("RELION_REQUIRED"):
        pytest.fail(f"missing here: {lacking}")
    if lacking:
        pytest.skip(f"the rest ran; {len(lacking)} blocks need {' and '.join(set(lacking))}")


def run(block, folder, environment):
    command = ["bash", "-euo", "pipefail", "-c"] if block.kind == "bash" else ["python", "-c"]
    done = subprocess.run(
        [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    failed = list(folder.glob("*/*/RELION_JOB_EXIT_FAILURE"))
    assert not failed, (failed[0].parent / "run.err").read_text()


def stays_open(text, folder, environment):
    """Run a program with a window; it must neither end nor complain while we look."""
    words = shlex.split(text.replace("\\\n", " "))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with making.started(words, cwd=folder, env=environment, **pipes) as program:
        try:
            out, _ = program.communicate(timeout=SECONDS_ON_SCREEN)
            pytest.fail(f"{text}\nended: {out.decode()}")
        except subprocess.TimeoutExpired:
            program.kill()
            out, _ = program.communicate()
            assert b"ERROR" not in out, out.decode()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_of_a_page_can_be_read(page):
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    for command in re.findall(r"`relion_cryofilter ((?:[a-z]+|--mode)\b[^`]*)`", prose):
        words = shlex.split(command)
        if "MODE" not in command and "…" not in command and "--help" not in words:
            cli.parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_and_pictures_of_a_page_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"https?:", target):
            path = page.parent / target
            assert path.exists(), f"{page.name} names {target}"
            assert path.suffix != ".png" or path.stat().st_size < LARGEST_PICTURE


def test_the_page_of_options_is_that_of_the_options():
    page = runpy.run_path(str(ROOT / "docs/make_options.py"))["page"]()
    assert (ROOT / "docs/options.md").read_text() == page, "run: python docs/make_options.py"

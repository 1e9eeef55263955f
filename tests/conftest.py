"""Fixtures for all tests, and the rules by which tests that need outside things are skipped."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import making
import pytest
from hypothesis import settings
from making import SHARED

# Tests run side by side on few cores, and threads that wait for each other take them. Workers of
# pytest-xdist and the programs that tests start read this before they load torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("unhurried", making.unhurried)
settings.load_profile("unhurried")


def pytest_xdist_auto_num_workers() -> int:
    """Start two workers more than there are cores: some tests wait for RELION's own pauses."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, those that wait for RELION's scheduler first: none ends alone."""
    items.sort(key=lambda item: (not item.get_closest_marker("slow"), "schedule" not in item.name))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, visibly, what needs RELION or data that are not part of the project."""
    if item.get_closest_marker("relion") and shutil.which("relion_refine") is None:
        if os.environ.get("RELION_REQUIRED"):
            pytest.fail("RELION is required here but not installed (apt-get install relion)")
        pytest.skip("needs RELION's programs (Debian: apt-get install relion)")
    marker = item.get_closest_marker("shared")
    if marker and not (SHARED / marker.args[0]).exists():
        pytest.skip(f"needs development data that are not part of the project: {marker.args[0]}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data; tests that use it carry the mark `shared`."""
    return SHARED


@pytest.fixture(autouse=True)
def no_process_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what works on in a test's folder after it; RELION detaches jobs from who starts them."""
    with_folder = "tmp_path" in request.fixturenames
    folder = request.getfixturevalue("tmp_path") if with_folder else None
    yield
    if folder is not None:
        making.end_processes_in(folder)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Take back what `cli.main`, run within a test, sets for its whole process."""
    log = logging.getLogger("relion_cryofilter")
    before = (list(log.handlers), log.propagate, log.level)
    shown, raised = warnings.showwarning, logging.raiseExceptions
    yield
    log.handlers, log.propagate, level = before
    log.setLevel(level)
    warnings.showwarning, logging.raiseExceptions = shown, raised


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out logfile.pdf and report.html, most of a small job's time, where others test them."""
    for mode in ("score", "train", "metrics"):
        command = import_module(f"relion_cryofilter.commands.{mode}")
        monkeypatch.setattr(command, "write_report", lambda folder, collect: ())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small RELION project as working directory, with a model in it."""
    monkeypatch.chdir(tmp_path)
    making.project_with_model()
    return tmp_path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], object]], Path]:
    """Return what makes a folder once for all workers; tests get copies of it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(make: Callable[[], object]) -> Path:
        folder, unfinished = base / make.__name__, base / f"{make.__name__}.part"
        with (base / f"{make.__name__}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                with making.working_in(unfinished):
                    make()
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def scored_once(made_once) -> Path:
    return made_once(making.scored_project)


@pytest.fixture(scope="session")
def trained_once(made_once) -> Path:
    return made_once(making.trained_project)


@pytest.fixture
def scored(scored_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project of `project` as working directory, scored already; the job is `making.JOB`."""
    shutil.copytree(scored_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project of `select_project`, trained for one epoch in `making.TRAIN_JOB`.

    What the training said is in the job's run.out.
    """
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def select_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of 4 micrographs as working directory, with a Select job that kept blobs."""
    monkeypatch.chdir(tmp_path)
    making.project_with_selection()
    return tmp_path

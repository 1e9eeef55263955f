"""Fixtures for all tests, and the rules by which tests that need outside things are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import making
import pytest
from making import ROOT, SHARED  # noqa: F401


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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small RELION project as working directory, with a model in it."""
    making.write_project(tmp_path)
    making.tiny_model().save(tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def select_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of 4 micrographs as working directory, with a Select job that kept blobs."""
    making.write_project(tmp_path, n_micrographs=4, per_micrograph=24)
    monkeypatch.chdir(tmp_path)
    making.make_select_job(tmp_path)
    return tmp_path

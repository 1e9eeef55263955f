"""The RELION project: the folder that all paths in its STAR files are relative to."""

from __future__ import annotations

from pathlib import Path

PIPELINE_FILE = "default_pipeline.star"
_JOB_FILE = "job_pipeline.star"


def find_project(start: Path) -> Path | None:
    """Return the nearest of `start` and its parents that is a RELION project, or None.

    A project holds default_pipeline.star. So do many job folders (RELION leaves a copy there);
    these are told by their job_pipeline.star.
    """
    start = start.resolve()
    for folder in (start, *start.parents):
        if (folder / PIPELINE_FILE).is_file() and not (folder / _JOB_FILE).exists():
            return folder
    return None

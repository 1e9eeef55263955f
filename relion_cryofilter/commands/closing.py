"""The last lines of run.out: which files a job has left, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

FEATURE_SAMPLE = 20_000
"""Particles whose features are kept for the report's map of features."""

log = logging.getLogger("relion_cryofilter")


def log_files(folder: Path, files: Mapping[str, str], conclusion: str) -> None:
    """Log the files of `folder` that are there, with what each holds, then the conclusion.

    RELION's window shows the last few lines of run.out, so the conclusion comes last.

    Parameters
    ----------
    folder
        The job's folder.
    files
        What they hold, by name; files that were not written are passed over.
    conclusion
        One line, or two.
    """
    there = {name: text for name, text in files.items() if (folder / name).is_file()}
    width = max(map(len, there), default=0)
    lines = "".join(f"\n  {name:<{width}}  {text}".rstrip() for name, text in there.items())
    log.info("Results are in %s/%s", folder, f":{lines}" if lines else "")
    log.info("%s", conclusion)

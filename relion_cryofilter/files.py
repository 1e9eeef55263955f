"""Files that are never found half written, their names, and the RELION project's folder."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def open_input(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read its bytes; an OSError for a pipe or a device, which never end."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a zero byte", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = open(path, "rb", buffering, opener=lambda *_: descriptor)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or device, no file", str(path))
    return file


def read_small(path: Path) -> str:
    """Return the text of a small file of RELION's, such as job.star: its first megabyte."""
    with open_input(path) as file:
        return file.read(1 << 20).decode(errors="replace")


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON from outside; a ValueError for whatever is none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends well.

    The folder must exist. After an exception the temporary file is deleted and `path` is left as
    it was.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
            yield file
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8; bytes of odd file names as they were) to `path` through `replacing`."""
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


ALL, ACCEPTED, REJECTED = "particles.star", "particles_accepted.star", "particles_rejected.star"
"""The particles with scores and the two subsets, of `score` and `select`."""

SCORES_CSV, FEATURES, BAD_IMAGES = "scores.csv", "features.npy", "bad_images.csv"
"""Of `score`."""

MODEL, HISTORY, CHECKPOINT = "model.safetensors", "history.csv", "checkpoint_last.pt"
"""Of `train`."""

METRICS, PREDICTIONS = "metrics.json", "predictions.csv"
"""Of `train` and `metrics`."""

LOGFILE, REPORT = "logfile.pdf", "report.html"
"""The report, for RELION's Display menu and for a browser."""

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


SCORE_LABEL = "rlnParticleFigureOfMerit"
"""RELION's own label for how good a particle is; select, sort and histogram work on it."""


def numbered(name: str, number: int) -> str:
    """Return ``model.safetensors`` for 1, ``model_2.safetensors`` for 2 and so on."""
    path = Path(name)
    return name if number == 1 else f"{path.stem}_{number}{path.suffix}"

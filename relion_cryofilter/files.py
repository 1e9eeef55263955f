"""Files that are never found half written, what may be replaced by them, and their names.

`replacing` makes every file of this program. It writes what is ours only (`require_ours`), and
nothing if an input changed meanwhile.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from relion_cryofilter.errors import UsageError
from relion_cryofilter.inputs import read_small, require_unchanged


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends well.

    The folder must exist. After an exception the temporary file is deleted and `path` is left as
    it was. A link is replaced, not followed.

    Raises
    ------
    CryoFilterError
        What is at `path` is not ours (see `require_ours`), or an input changed meanwhile.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
            yield file
        Path(name).chmod(0o666 & ~_umask())
        require_ours(path)
        require_unchanged()
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _written.add(_place(path))


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

RANDOM, SAMPLE = "particles_random.star", "particles_rejected_sample.star"
"""As many as are accepted, of `select --random`, and a part of the rejected, of `check`."""

SCORES_CSV, FEATURES, BAD_IMAGES = "scores.csv", "features.npy", "bad_images.csv"
ADAPTED_MODEL, ADAPTING = "adapted_model.safetensors", "adapted_all_0.pt"
"""Of `score`; the latter is there only while a model is adapted."""

MODEL, HISTORY, CHECKPOINT = "model.safetensors", "history.csv", "checkpoint_last.pt"
CHECKPOINTS, SUSPICIOUS = "checkpoints", "suspicious_labels.star"
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


_RESULT = re.compile(
    r"particles(_accepted|_rejected|_rejected_sample|_random)?(_passthrough\d*)?\.(star|cs|csg)"
    r"|scores\.(csv|png)|input\.cs|features\.npy|bad_images\.csv|(adapted_)?model(_\d+)?\.safetensors"
    r"|history(_\d+)?\.(csv|png)|checkpoint_last(_\d+)?\.pt|[a-z_]+_(all|fold\d+)_\d+\.pt"
    r"|suspicious_labels(_passthrough\d*)?\.(star|cs|csg)"
    r"|metrics\.json|predictions\.csv|logfile\.pdf|report\.html|RELION_OUTPUT_NODES\.star"
    r"|score_cache(_\d+)?\.journal|(roc|precision_recall|reliability|confusion_matrix"
    r"|score_histogram)\.png"
)
_UNFINISHED = re.compile(rf"\.({_RESULT.pattern})\.[a-z0-9_]+\.part")
_KINDS = {
    "scores": re.compile(rb"0, [01]\.\d{4}\n"),
    "bad images": re.compile(rb"row,image,reason\n"),
    "history": re.compile(rb"epoch,train_loss,"),
    "predictions": re.compile(rb"image,micrograph,label,score\n"),
    "metrics": re.compile(rb'\{\n  "data": '),
    "model": re.compile(rb'.{8}\{.{0,2000}"__metadata__":\{"relion_cryofilter":', re.DOTALL),
    "job to fill in": re.compile(
        rb".*?^_rlnJobType(Label)?\s+(99|relion\.external|8|relion\.class2d)\s", re.M | re.S
    ),
}
"""How the results begin that are known by themselves, wherever they are."""
_HEAD_BYTES = 4096
_TRACES = ("*_JOB_EXIT_*", "score_cache*.journal", "checkpoint_last*.pt", ".cryofilter.lock")
"""What this program leaves in a folder, whatever became of the run."""

_claimed: set[Path] = set()  # folders that were found to be ours
_written: set[Path] = set()  # what this process wrote


def _place(path: Path) -> Path:
    """Return where `path` itself is, be it a link."""
    return path.parent.resolve() / path.name


def is_result(name: str) -> bool:
    """Tell whether a file of this name is a result of any mode."""
    return _RESULT.fullmatch(name) is not None


def kind_of(path: Path) -> str:
    """Return which of our results (a key of `_KINDS`) a file begins as, or ""."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return ""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return next((kind for kind, begins in _KINDS.items() if begins.match(head)), "")


def require_ours(path: Path, kind: str = "") -> None:
    """Raise a UsageError unless `path` may be replaced: the one rule of what is written over.

    It may if nothing is there, or a link (which is replaced, never followed), or an empty file, or
    a regular file that this program wrote: one of a result's name in a folder that is ours, or one
    that begins as our results do; as those of `kind`, where it is given.
    """
    try:
        status = path.lstat()
    except OSError:  # nothing there; if it is for another reason, writing will tell
        return
    if stat.S_ISLNK(status.st_mode) or _place(path) in _written:
        return
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} is no file that can be replaced. Name another, or move it away.")
    if not kind and _RESULT.fullmatch(path.name) and _place(path).parent in _claimed:
        return
    found = kind_of(path)
    if status.st_size and (not found or kind not in ("", found)):
        raise UsageError(
            f"{path} is there already and was not written by this program as what would replace "
            "it. Name another file or folder, or move it away."
        )


def is_ours(folder: Path) -> bool:
    """Tell whether results may go into `folder`: not into another job's, nor over others' files."""
    if is_of_another_job(folder):
        return False
    there = [path for path in _entries(folder) if path.is_file() and not path.is_symlink()]
    results = [path for path in there if _RESULT.fullmatch(path.name)]
    about = _text(folder / "job.star")
    if not results or re.search(r"cryofilter|external_job\.py", about):
        return True
    # By hand, or by a command of another name: what an earlier run left tells.
    traces = _TRACES[1:] if about else _TRACES
    left = any(path.match(pattern) for path in there for pattern in traces)
    return left or any(map(kind_of, results))


def is_of_another_job(folder: Path) -> bool:
    """Tell whether RELION or the ccpem-pipeliner made the folder for a job that is not ours."""
    kind = re.search(r"^_rlnJobType(?:Label)?\s+(\S+)", _text(folder / "job.star"), re.M)
    if kind is None:
        return (folder / "run.job").exists()  # RELION 3.0
    name = kind[1]
    return not (name == "99" or "external" in name or name.startswith("cryofilter."))


def claim(folder: Path, known: bool = False) -> None:
    """Make `folder`, and take it for ours; a UsageError where it is not, unless that is `known`."""
    if folder.resolve() in _claimed and folder.is_dir():
        return
    if is_of_another_job(folder):
        raise UsageError(
            f"{folder} is the folder of another RELION job. Name a folder of its own for the "
            "results, such as External/job012/."
        )
    if not known and not is_ours(folder):
        raise UsageError(
            f"{folder} holds files that this program did not write, under the names of its "
            "results. Name another folder for the results, or move the files away."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _claimed.add(folder.resolve())


def remove(path: Path) -> None:
    """Remove a result of an earlier run, or a link in its place; leave what is not ours."""
    with suppress(UsageError, FileNotFoundError):
        require_ours(path)
        path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove what `replacing` left in a folder of ours whose run was killed, and nothing else."""
    for path in _entries(folder):
        if _UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return read_small(path)
    except OSError:
        return ""

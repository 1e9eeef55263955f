"""Every option once: what the command line, the External job and the Python API accept.

Each mode has a frozen dataclass. Its fields are the options; their metadata says how to read
words into values and how to explain them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from relion_cryofilter.errors import UsageError

TRUE_WORDS = ("yes", "true", "1", "on")
FALSE_WORDS = ("no", "false", "0", "off")
ALL_GPUS = "all"


def option(help_text: str, kind: str, default: Any = None, **limits: Any) -> Any:
    """Make a dataclass field that is an option of kind flag, integer, number, text, path, …"""
    return field(default=default, metadata={"help": help_text, "kind": kind, **limits})


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the options of all modes can do."""

    quiet: bool = option("Say only warnings and errors.", "flag", False)
    verbose: bool = option("Say more, and show the traceback of every error.", "flag", False)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata["kind"] == "path" and value is not None:
                object.__setattr__(self, item.name, Path(value))
            elif item.metadata["kind"] == "paths":
                object.__setattr__(self, item.name, tuple(Path(path) for path in value))
            _check_limits(item, getattr(self, item.name))


@dataclass(frozen=True, kw_only=True)
class JobOptions(Options):
    """What RELION gives to every External job."""

    o: Path | None = option("Folder for the results, e.g. External/job012/.", "path")
    in_parts: Path | None = option("Particles: a RELION particles.star.", "path")
    j: int | None = option("Threads; all cores of this process if not given.", "integer", low=1)

    @property
    def threads(self) -> int:
        """Number of threads to use."""
        return self.j or available_cores()


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JobOptions):
    """Score particles and sort them into accepted and rejected."""

    mrc: tuple[Path, ...] = option("Plain image stacks instead of a STAR file.", "paths", ())
    out_file: Path | None = option("Where to write scores.csv; in --o if not given.", "path")
    weights: Path | None = option(
        "The model (.safetensors, or a Keras .h5 of 2020); the bundled one if not given.", "path"
    )
    threshold: float | None = option(
        "Accept scores of at least this; the model's own threshold if not given.",
        "number", low=0, high=1,
    )  # fmt: skip
    tta: bool = option("Average the scores of the eight flips and rotations.", "flag", False)
    features: bool = option("Also write features.npy, one row a particle.", "flag", False)
    score_label: str = option(
        "Column for the scores. RELION can select and sort only by labels it knows.",
        "text", "rlnParticleFigureOfMerit",
    )  # fmt: skip
    skip_bad: bool = option(
        "Score missing, blank and NaN images 0 and list them in bad_images.csv.", "flag", False
    )
    batch_size: int | None = option(
        "Images read at a time by each thread; 32 MiB worth if not given.", "integer", low=1
    )
    gpu: str | None = option(
        "GPUs: 0, 0,1, 0:1 or nothing for all of them; cpu or absent for none.", "gpu"
    )
    model: str | None = option("Network of a Keras .h5 file, to check it.", "text")
    f: int | None = option("Filters of a Keras .h5 file, to check it.", "integer", low=1)
    img_dim: int | None = option("Network image size in px, to check the model.", "integer", low=1)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Turn Keras weights of the 2020 program into a model file."""

    weights: Path | None = option("The Keras .h5 weights.", "path", positional=True)
    o: Path | None = option("The model file to write, e.g. model.safetensors.", "path")
    f: int | None = option("Filters, to check the file.", "integer", low=1)
    img_dim: int = option("Network image size in px.", "integer", 28, low=8)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Simulate a small RELION project and score it as an External job would."""

    folder: Path = option(
        "Folder for the project.", "path", Path("cryofilter_demo"), positional=True
    )
    j: int | None = option("Threads.", "integer", low=1)


MODES: Mapping[str, type[Options]] = {
    "score": ScoreOptions,
    "convert": ConvertOptions,
    "demo": DemoOptions,
}
JOB_MODES = tuple(name for name, kind in MODES.items() if issubclass(kind, JobOptions))

RELION_ONLY = {
    "pipeline_control": "given by RELION; the results go to --o",
    "in_movies": "not used by this program",
    "in_mics": "not used by this program",
    "in_coords": "not used by this program",
    "in_3dref": "not used by this program",
    "in_mask": "not used by this program",
}
"""What RELION may put on the command line of any External job."""


def read_words(item: Field[Any], words: Sequence[str]) -> Any:
    """Turn the words after an option into its value.

    Returns
    -------
    Any
        The value, or None for an empty value (RELION drops those and leaves a bare option).

    Raises
    ------
    UsageError
        The words can't be read as what the option expects.
    """
    text = " ".join(words).strip()
    kind = item.metadata["kind"]
    if not text and kind != "flag":
        return ALL_GPUS if kind == "gpu" else None
    try:
        return _READERS[kind](text) if kind != "paths" else tuple(map(Path, words))
    except ValueError:
        raise UsageError(
            f"--{item.name} is {text!r}; expected {_EXPECTED[kind]}. {item.metadata['help']}"
        ) from None


def gpu_numbers(text: str) -> list[int] | None:
    """Read ``--gpu`` in RELION's spellings: [] is no GPU, None all of them.

    Examples
    --------
    >>> gpu_numbers("0:1"), gpu_numbers("cpu"), gpu_numbers(",")
    ([0, 1], [], None)
    """
    words = [word for word in re.split(r"[,:;\s]+", text.strip().strip("\"'").lower()) if word]
    if words in (["cpu"], ["none"], ["no"], ["false"], ["-1"]):
        return []
    if not words or words in ([ALL_GPUS], ["gpu"], ["cuda"], ["yes"], ["true"]):
        return None
    return sorted({int(word.removeprefix("cuda")) for word in words})


def _read_flag(text: str) -> bool:
    if not text or text.lower() in TRUE_WORDS:
        return True
    if text.lower() in FALSE_WORDS:
        return False
    raise ValueError(text)


def _read_gpu(text: str) -> str:
    gpu_numbers(text)
    return text


_READERS: Mapping[str, Callable[[str], Any]] = {
    "flag": _read_flag, "integer": int, "number": float, "text": str, "path": Path,
    "gpu": _read_gpu,
}  # fmt: skip
_EXPECTED = {
    "flag": "nothing, Yes or No",
    "integer": "a whole number",
    "number": "a number",
    "gpu": "GPU numbers such as 0 or 0,1, or cpu",
}


def _check_limits(item: Field[Any], value: Any) -> None:
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if value is None or (low is None and high is None):
        return
    if not (low is None or value >= low) or not (high is None or value <= high):
        limits = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise UsageError(f"--{item.name} is {value}; expected {limits}. {item.metadata['help']}")

"""The kinds of options: how words become values, and what values are allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from relion_cryofilter.errors import UsageError
from relion_cryofilter.results.thresholds import ThresholdRequest

TRUE_WORDS = ("yes", "true", "1", "on")
FALSE_WORDS = ("no", "false", "0", "off")
ALL_GPUS = "all"


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
    if kind == "path" and len(words) > 1 and all(Path(word).exists() for word in words):
        raise UsageError(f"--{item.name} takes one path; found {len(words)}: {text}.")
    try:
        return _READERS[kind](text) if kind != "paths" else _as_paths(words)
    except ValueError:
        raise UsageError(
            f"--{item.name} is {text!r}; expected {_EXPECTED[kind]}. {item.metadata['help']}"
        ) from None


def gpu_numbers(text: str | None) -> list[int] | None:
    """Read ``--gpu`` in RELION's spellings: [] is no GPU (or no --gpu), None all of them.

    Examples
    --------
    >>> gpu_numbers("0:1"), gpu_numbers("cpu"), gpu_numbers(",")
    ([0, 1], [], None)
    """
    if text is None:
        return []
    plain = text.strip().strip("\"'").lower().replace("cuda:", "")
    words = [word for word in re.split(r"[,:;\s]+", plain) if word]
    if words in (["cpu"], ["none"], ["no"], ["false"], ["-1"]):
        return []
    if not words or words in ([ALL_GPUS], ["gpu"], ["cuda"], ["yes"], ["true"]):
        return None
    return sorted({int(word) for word in words})


def _read_flag(text: str) -> bool:
    if not text or text.lower() in TRUE_WORDS:
        return True
    if text.lower() in FALSE_WORDS:
        return False
    raise ValueError(text)


def _read_gpu(text: str) -> str:
    gpu_numbers(text)
    return text


def _read_integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.split(r"[,;\s]+", text.strip("\"'")) if word)


def as_kind(item: Field[Any], value: Any) -> Any:
    """Read what a Python caller gives: text as on the command line, and natural types."""
    kind = item.metadata["kind"]
    if kind == "paths":
        return _as_paths(value)
    if kind == "integers":
        return tuple(value) if not isinstance(value, str) else read_words(item, [value])
    if kind == "gpu" and isinstance(value, int | list | tuple):
        value = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if kind == "threshold" and isinstance(value, int | float):
        value = str(value)
    return read_words(item, [value]) if isinstance(value, str) and kind != "text" else value


def _as_paths(value: Any) -> tuple[Path, ...]:
    if isinstance(value, str | Path):
        return (Path(value),)
    return tuple(Path(path) for path in value or ())


_READERS: Mapping[str, Callable[[str], Any]] = {
    "flag": _read_flag,
    "integer": int,
    "integers": _read_integers,
    "number": float,
    "text": str,
    "label": lambda text: text.removeprefix("_"),
    "path": Path,
    "gpu": _read_gpu,
    "threshold": ThresholdRequest.parse,
}
_EXPECTED = {
    "flag": "nothing, Yes or No",
    "integer": "a whole number",
    "integers": "whole numbers such as 1,4,7",
    "number": "a number",
    "gpu": "GPU numbers such as 0 or 0,1, or cpu",
}


def check_limits(item: Field[Any], value: Any) -> None:
    """Raise a UsageError if a number is outside what the option allows."""
    choices = item.metadata.get("choices")
    if choices and value is not None and value not in choices:
        raise UsageError(f"--{item.name} is {value!r}; expected {' or '.join(choices)}.")
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if value is None or (low is None and high is None):
        return
    if not (low is None or value >= low) or not (high is None or value <= high):
        limits = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise UsageError(f"--{item.name} is {value}; expected {limits}. {item.metadata['help']}")

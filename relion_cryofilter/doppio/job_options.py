"""The options of a mode as the pipeliner's typed job options, and back as words of a command.

Names, help, limits, choices and defaults come from `relion_cryofilter.options`; what stands here
is how each kind of option looks in Doppio.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from math import floor, log10
from typing import Any

from pipeliner.data_structure import NODE_MLMODEL, NODE_PARTICLEGROUPMETADATA
from pipeliner.job_options import (
    BooleanJobOption,
    FileDescription,
    FloatJobOption,
    InputNodeJobOption,
    IntJobOption,
    JobOption,
    JobOptionValidationResult,
    MultiInputNodeJobOption,
    MultipleChoiceJobOption,
    StringJobOption,
)

from relion_cryofilter.errors import UsageError
from relion_cryofilter.option_kinds import check_limits, read_words
from relion_cryofilter.options import JobOptions, LabelOptions, ModelOptions

LEFT_OUT = {
    "o": "the pipeliner names the folder",
    "j": "the pipeliner's own Number of threads",
    "quiet": "for terminals",
    "verbose": "for terminals",
    "mrc": "plain stacks give no STAR file for the next job",
    "out_file": "results stay in the job's folder",
    "out_dir": "results stay in the job's folder",
    "weight_dir": "results stay in the job's folder",
    "history_dir": "results stay in the job's folder",
}
"""Options that Doppio does not show, and why; all but the folder may be additional arguments."""

CHOICE_DEFAULT = "default"
"""What a menu shows for an option that is not given."""

MODEL_KEYWORD = "cryofilter"
PARTICLES = FileDescription("Particles STAR file", [".star"])
MODELS = FileDescription("Model", [".safetensors", ".h5"])

_GROUPS = {LabelOptions: "Labels", ModelOptions: "Model"}
_ACRONYMS = ("tta", "gpu")
_NOTES = {"gpu": " Here, nothing means none, and all means all."}


def job_options(mode: type[JobOptions]) -> dict[str, JobOption[Any]]:
    """Return the job options of a mode by name, in the order of its options.

    Parameters
    ----------
    mode
        E.g. `options.ScoreOptions`.
    """
    return {item.name: job_option(item, _group(mode, item.name)) for item in shown(mode)}


def shown(mode: type[JobOptions]) -> list[Field[Any]]:
    """Return the options that Doppio shows."""
    return [item for item in fields(mode) if item.name not in LEFT_OUT]


def job_option(item: Field[Any], group: str) -> JobOption[Any]:
    """Return one option as the pipeliner's job option of the fitting type."""
    kind = item.metadata["kind"]
    common: dict[str, Any] = {
        "label": label_of(item.name),
        "help_text": item.metadata["help"] + _NOTES.get(kind, ""),
        "jobop_group": group,
    }
    default: Any = item.default
    if item.metadata.get("choices"):
        return MultipleChoiceJobOption(
            choices=[CHOICE_DEFAULT, *item.metadata["choices"]],
            default_value=default or CHOICE_DEFAULT,
            is_required=False,
            **common,
        )
    return _MAKERS.get(kind, _string)(item, common)


def label_of(name: str) -> str:
    """Return what stands beside the box: ``Batch size:`` for ``batch_size``."""
    if name in _ACRONYMS:
        return f"{name.upper()}:"
    words = name.removeprefix("in_").replace("_", " ")
    return f"{words[0].upper()}{words[1:]}:"


def words_of(mode: type[JobOptions], given: Mapping[str, JobOption[Any]]) -> list[str]:
    """Return the words of the command line for all job options that differ from the defaults."""
    words = []
    for item in shown(mode):
        values = _values(given[item.name])
        if values and given[item.name].value != given[item.name].default_value:
            words += [f"--{item.name}", *values]
    return words


def problems(
    mode: type[JobOptions], given: Mapping[str, JobOption[Any]]
) -> list[JobOptionValidationResult]:
    """Return what the command line would say of the values, option by option."""
    found = []
    for item in shown(mode):
        values = _values(given[item.name])
        try:
            if values:
                check_limits(item, read_words(item, values))
        except UsageError as error:
            found.append(JobOptionValidationResult("error", [given[item.name]], str(error)))
    return found


def _values(option: JobOption[Any]) -> list[str]:
    """Return the value as words, none if nothing is chosen."""
    if option.is_blank or option.value == CHOICE_DEFAULT:
        return []
    if isinstance(option, MultiInputNodeJobOption):
        return list(option.value)
    return [option.value_string]


def _group(mode: type[JobOptions], name: str) -> str:
    owner = next(kind for kind in mode.__mro__ if name in inspect.get_annotations(kind))
    return _GROUPS.get(owner, "Main")


def _flag(item: Field[Any], common: dict[str, Any]) -> JobOption[Any]:
    default: Any = item.default
    return BooleanJobOption(default_value=default, **common)


def _integer(item: Field[Any], common: dict[str, Any]) -> JobOption[Any]:
    default: Any = item.default
    return IntJobOption(default_value=default, **_limits(item), **common)


def _number(item: Field[Any], common: dict[str, Any]) -> JobOption[Any]:
    default: Any = item.default
    step = 10.0 ** (floor(log10(default or 0.1)) - 1)
    return FloatJobOption(default_value=default, step_value=step, **_limits(item), **common)


def _limits(item: Field[Any]) -> dict[str, Any]:
    return {"hard_min": item.metadata.get("low"), "hard_max": item.metadata.get("high")}


def _string(item: Field[Any], common: dict[str, Any]) -> JobOption[Any]:
    default = "" if item.default in (None, ()) else str(item.default)
    return StringJobOption(default_value=default, **common)


def _path(item: Field[Any], common: dict[str, Any]) -> JobOption[Any]:
    node = _NODES.get(item.name)
    return InputNodeJobOption(**node, **common) if node else _string(item, common)


def _paths(item: Field[Any], common: dict[str, Any]) -> JobOption[Any]:
    return MultiInputNodeJobOption(**_NODES[item.name], **common)


_PARTICLE_NODE: dict[str, Any] = {
    "node_type": NODE_PARTICLEGROUPMETADATA, "node_kwds": ["relion"], "pattern": PARTICLES,
}  # fmt: skip
_MODEL_NODE: dict[str, Any] = {
    "node_type": NODE_MLMODEL, "node_kwds": [MODEL_KEYWORD], "pattern": MODELS,
}  # fmt: skip
_NODES = {
    "in_parts": _PARTICLE_NODE,
    "pos": _PARTICLE_NODE,
    "neg": _PARTICLE_NODE,
    "weights": _MODEL_NODE,
    "init": _MODEL_NODE,
}
_MAKERS: dict[str, Callable[[Field[Any], dict[str, Any]], JobOption[Any]]] = {
    "flag": _flag,
    "integer": _integer,
    "number": _number,
    "path": _path,
    "paths": _paths,
}

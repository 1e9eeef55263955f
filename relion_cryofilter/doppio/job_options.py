"""The options of a mode as the pipeliner's typed job options, and back as words of a command.

Names, help, limits, choices and defaults come from `relion_cryofilter.options`; what stands here
is how each kind of option looks in Doppio.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import Field, fields
from math import floor, log10
from typing import Any

from pipeliner import job_options as kinds
from pipeliner.data_structure import NODE_MLMODEL, NODE_PARTICLEGROUPMETADATA
from pipeliner.job_options import FileDescription, JobOption, JobOptionValidationResult

from relion_cryofilter.errors import UsageError
from relion_cryofilter.kinds import check_limits, read_words
from relion_cryofilter.options import JobOptions, LabelOptions, ModelOptions

LEFT_OUT = {
    "o": "the pipeliner names the folder",
    "j": "the pipeliner's own Number of threads",
    "quiet": "for terminals",
    "verbose": "for terminals",
    "mrc": "plain stacks give no STAR file for the next job",
    **dict.fromkeys(
        ("out_file", "out_dir", "weight_dir", "history_dir"), "results stay in the job's folder"
    ),
}
"""Options that Doppio does not show, and why; all but the folder may be additional arguments."""

CHOICE_DEFAULT = "default"
"""What a menu shows for an option that is not given."""
MODEL_KEYWORD = "cryofilter"
PARTICLES = FileDescription("Particles STAR file", [".star"])
MODELS = FileDescription("Model", [".safetensors", ".h5"])

_NODES: dict[str, dict[str, Any]] = {
    name: {"node_type": kind, "node_kwds": [keyword], "pattern": pattern}
    for names, kind, keyword, pattern in (
        (("in_parts", "pos", "neg", "junk"), NODE_PARTICLEGROUPMETADATA, "relion", PARTICLES),
        (("weights", "init"), NODE_MLMODEL, MODEL_KEYWORD, MODELS),
    )
    for name in names
}
"""What the options that name an earlier job's files take."""
_GROUPS = {LabelOptions: "Labels", ModelOptions: "Model"}
_ACRONYMS = ("tta", "gpu")
_NOTES = {"gpu": " Here, nothing means none, and all means all."}


def job_options(mode: type[JobOptions]) -> dict[str, JobOption[Any]]:
    """Return the job options of a mode by name, in the order of its options."""
    found: dict[str, JobOption[Any]] = {}
    for item in _shown(mode):
        kind, choices = item.metadata["kind"], item.metadata.get("choices")
        default: Any = item.default
        # What stands beside the box, ``Batch size:`` for ``batch_size``, and where.
        words = item.name.removeprefix("in_").replace("_", " ")
        words = words.upper() if item.name in _ACRONYMS else words[0].upper() + words[1:]
        owner = next(one for one in mode.__mro__ if item.name in inspect.get_annotations(one))
        common: dict[str, Any] = {
            "label": f"{words}:",
            "help_text": item.metadata["help"] + _NOTES.get(kind, ""),
            "jobop_group": _GROUPS.get(owner, "Main"),
        }
        # The fitting type.
        option: type[JobOption[Any]] = kinds.StringJobOption
        if choices:
            option, common["is_required"] = kinds.MultipleChoiceJobOption, False
            common["choices"] = [CHOICE_DEFAULT, *choices]
            common["default_value"] = default or CHOICE_DEFAULT
        elif item.name in _NODES:
            option = kinds.MultiInputNodeJobOption if kind == "paths" else kinds.InputNodeJobOption
            common |= _NODES[item.name]
        elif kind == "flag":
            option, common["default_value"] = kinds.BooleanJobOption, default
        elif kind in ("integer", "number"):
            option, common["default_value"] = kinds.IntJobOption, default
            common["hard_min"], common["hard_max"] = map(item.metadata.get, ("low", "high"))
            if kind == "number":
                option = kinds.FloatJobOption
                common["step_value"] = 10.0 ** (floor(log10(default or 0.1)) - 1)
        else:
            common["default_value"] = "" if default in (None, ()) else str(default)
        found[item.name] = option(**common)
    return found


def _shown(mode: type[JobOptions]) -> list[Field[Any]]:
    """Return the options that Doppio shows."""
    return [item for item in fields(mode) if item.name not in LEFT_OUT]


def words_of(mode: type[JobOptions], given: Mapping[str, JobOption[Any]]) -> list[str]:
    """Return the words of the command line for all `job_options` that differ from the defaults."""
    words = []
    for item in _shown(mode):
        values = _values(given[item.name])
        if values and given[item.name].value != given[item.name].default_value:
            words += [f"--{item.name}", *values]
    return words


def problems(
    mode: type[JobOptions], given: Mapping[str, JobOption[Any]]
) -> list[JobOptionValidationResult]:
    """Return what the command line would say of the values of `job_options`, one by one."""
    found = []
    for item in _shown(mode):
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
    if isinstance(option, kinds.MultiInputNodeJobOption):
        return list(option.value)
    return [option.value_string]

"""The facts of a run as names and texts, for its report."""

from __future__ import annotations

import shlex
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relion_cryofilter.data.labelled import LabelledSet
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.data.star_labels import SCORE_LABEL
from relion_cryofilter.option_kinds import gpu_numbers
from relion_cryofilter.options import JobOptions, Options
from relion_cryofilter.versions import versions
from relion_cryofilter.wording import counted

MOST_SOURCES = 3
CUT = "{cut}"
"""Stands for the threshold in a `select` command that report.html fills in."""


def set_facts(particles: ParticleSet) -> list[tuple[str, str]]:
    """Return what was read: names and counts."""
    names = particles.source.split(", ") if particles.star is None else [particles.source]
    if particles.star is None and not particles.has_micrographs:
        names = list(dict.fromkeys(particles.stack_names))
    source = ", ".join(names[:MOST_SOURCES])
    if len(names) > MOST_SOURCES:
        source += f" and {len(names) - MOST_SOURCES:,} more"
    return [("Input", source), ("Particles", describe_set(particles))]


def describe_set(particles: ParticleSet) -> str:
    """Return ``1,400 particles in 14 stacks, 14 micrographs, 1 optics group``."""
    held = (particles.stack_of, particles.micrograph_of, particles.optics_of)
    stacks, micrographs, groups = (len(np.unique(numbers)) for numbers in held)
    text = f"{counted(len(particles), 'particle')} in {counted(stacks, 'stack')}"
    if particles.has_micrographs:
        text += f", {counted(micrographs, 'micrograph')}"
    return f"{text}, {counted(groups, 'optics group')}"


def label_facts(labelled: LabelledSet) -> list[tuple[str, str]]:
    """Return how many particles of each kind were measured."""
    good = int(labelled.labels.sum())
    return [("Labels", f"{good:,} good, {len(labelled) - good:,} bad")]


def run_facts(options: JobOptions) -> list[tuple[str, str]]:
    """Return where and with what it ran."""
    gpus = getattr(options, "gpu", None)
    used = gpu_numbers(gpus) != [] and torch.cuda.is_available()
    where = f"GPU {gpus}" if used else "the processor"
    made_with = versions("matplotlib")
    return [
        ("Computed on", f"{where}, {counted(options.threads, 'thread')}"),
        ("Versions", ", ".join(" ".join(item) for item in made_with.items())),
        ("Made", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def options_text(mode: str, options: Options) -> str:
    """Return the options that differ from their defaults, as they would be typed."""
    words = [mode]
    for item in fields(options):
        if item.name in ("quiet", "verbose"):
            continue
        value = getattr(options, item.name)
        if value != item.default:
            words += [f"--{item.name}", *_typed(value)]
    return " ".join(words)


def _typed(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, tuple) and value and isinstance(value[0], int):
        return [",".join(map(str, value))]
    values = value if isinstance(value, tuple) else [value]
    return [shlex.quote(str(item)) for item in values]


def select_command(folder: Path, scored: str, label: str) -> str:
    """Return the command that sorts `scored` in `folder` again, with `CUT` for its threshold."""
    words = ["relion_cryofilter", "select", "--in_parts", str(folder / scored)]
    words += ["--threshold", CUT, "--o", f"{folder}/cut_{CUT}/"]
    if label != SCORE_LABEL:
        words += ["--score_label", label]
    return " ".join(word if CUT in word and _plain(word) else shlex.quote(word) for word in words)


def _plain(word: str) -> bool:
    """Tell whether a word needs no quotes once `CUT` is a number."""
    return shlex.quote(word.replace(CUT, "0.5")) == word.replace(CUT, "0.5")

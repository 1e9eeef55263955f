"""Ready job.star files: they fill in the ten label/value boxes of RELION's External tab."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import find_project, require_ours, write_text
from relion_cryofilter.options import MODES, available_cores

JOB_FILE = "job.star"
GUI_FILE = ".gui_externaljob.star"
N_PARAMETERS = 10
_INPUTS = {"in_parts": "in_part"}
_OTHER_INPUTS = ("in_mov", "in_mic", "in_coords", "in_3dref", "in_mask")
_TRACES_OF_JOBS = ("job_pipeline.star", "run.job", "run.out", "note.txt")
_NOT_PARAMETERS = ("mode", "o", "j", *_INPUTS)
_FLAGS = {
    item.name
    for kind in MODES.values()
    for item in fields(kind)
    if item.metadata["kind"] in ("flag", "gpu")
}
# ASCII but letters, digits, spaces and @%+=:,./_-^; and ~ where it means a home.
_NOT_QUOTED = re.compile(r"[\x00-\x1f\x7f!\"#$&'()*;<>?\[\\\]`{|}]|(?:^|(?<=[\s:=]))~")
_HEAD = """data_job

_rlnJobType            99
_rlnJobIsContinue       0

data_joboptions_values

loop_
_rlnJobOptionVariable #1
_rlnJobOptionValue #2
"""

log = logging.getLogger("relion_cryofilter")


def write_job_files(given: Mapping[str, list[str]]) -> None:
    """Write job.star and .gui_externaljob.star into the working directory, or one file to --o.

    `given` holds the words of each option of the job, ``mode`` included.
    """
    source = " ".join(given.get("in_parts", []))
    if source and not Path(source).is_file():
        log.warning("--in_parts %s does not exist here (yet).", source)
    write_job_file(job_star(given), " ".join(given.get("o", [])), GUI_FILE, "External")


def write_job_file(text: str, named: str, gui_file: str, tab: str) -> None:
    """Write a job.star and what fills in a tab of RELION's window, or the one file `named`."""
    paths = [Path(named)] if named else [Path(JOB_FILE), Path(gui_file)]
    if named.endswith("/") or paths[0].is_dir():
        paths = [paths[0] / JOB_FILE]
    if find_project(Path()) != Path.cwd():
        log.warning("No default_pipeline.star here; run this in the RELION project's folder.")
    for path in paths:
        if named and any((path.parent / name).exists() for name in _TRACES_OF_JOBS):
            raise UsageError(
                f"{path.parent} is the folder of a RELION job. Name another file for --o."
            )
        require_ours(path, "job to fill in")
    for path in paths:
        verb = "Replaced" if path.exists() else "Wrote"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        log.info("%s %s", verb, path)
    if not named:
        log.info("Start RELION here: its tab %s is filled in (%s).", tab, gui_file)
        log.info("If its window is open: %s, then Jobs > Load job settings.", tab)
    log.info("Without a window: relion_pipeliner --addJobFromStar %s", paths[0])


def job_star(given: Mapping[str, list[str]]) -> str:
    """Return a job.star that RELION 3.1, 4.0 and 5.0 accept.

    Options beyond the tenth parameter go into the additional arguments. Boxes that stay empty are
    named too: RELION's "Load job settings" leaves what the file does not name as it was.
    """
    values = {"fn_exe": executable(), **dict.fromkeys(_OTHER_INPUTS, "")}
    values["in_part"] = " ".join(given.get("in_parts", []))
    values["nr_threads"] = " ".join(given.get("j", [])) or str(available_cores())
    parameters = [("mode", given["mode"][0])]
    parameters += [
        (name, " ".join(words) or "Yes")
        for name, words in given.items()
        if name not in _NOT_PARAMETERS and (words or name in _FLAGS)
    ]
    empty = [("", "")] * (N_PARAMETERS - len(parameters))
    for number, (label, value) in enumerate([*parameters[:N_PARAMETERS], *empty], 1):
        values[f"param{number}_label"] = label
        values[f"param{number}_value"] = value
    rest = [f"--{label} {value}" for label, value in parameters[N_PARAMETERS:]]
    values["other_args"] = " ".join(rest)
    return _HEAD + "".join(f"{name} {quoted(value)}\n" for name, value in values.items()) + "\n"


def executable() -> str:
    """Return what to type as External executable: this installation, by absolute path."""
    beside = Path(sys.executable).parent / "relion_cryofilter"
    shim = Path(__file__).resolve().parents[2] / "external_job.py"
    found = shutil.which("relion_cryofilter")
    if beside.is_file():
        parts = [str(beside)]
    elif shim.is_file():
        parts = [sys.executable, str(shim)]
    elif found is not None:
        parts = [str(Path(found).resolve())]
    else:
        raise UsageError(
            "Can't tell how RELION should start this program: no relion_cryofilter command beside "
            f"{sys.executable}. Install the package there with pip."
        )
    if any(" " in part for part in parts):
        raise UsageError(
            f"RELION can't start a program whose path has spaces: {' '.join(parts)}. Install "
            "relion_cryofilter in another folder."
        )
    return " ".join(parts)


def quoted(value: str) -> str:
    """Return a value as job.star holds it; RELION puts it on a command line that a shell reads."""
    if found := _NOT_QUOTED.search(value):
        raise UsageError(
            f"RELION gives the values of a job.star to a shell, so they can't hold a quote, a line "
            f"end or a sign that means something there; found {found[0]!r} in {value!r:.200}. "
            "Rename the file or its folder, or make a link with a plain name."
        )
    return f'"{value}"' if not value or " " in value else value

"""Ready job.star files: they fill in the ten label/value boxes of RELION's External tab."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import write_text

JOB_FILE = "job.star"
GUI_FILE = ".gui_externaljob.star"
N_PARAMETERS = 10

_INPUTS = {"in_parts": "in_part"}
_NOT_PARAMETERS = ("mode", "o", "j", *_INPUTS)
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

    Parameters
    ----------
    given
        The words of each option of the job, ``mode`` included.
    """
    text = job_star(given)
    named = given.get("o")
    paths = [Path(" ".join(named))] if named else [Path(JOB_FILE), Path(GUI_FILE)]
    if paths[0].is_dir():
        paths = [paths[0] / JOB_FILE]
    for path in paths:
        write_text(path, text)
        log.info("Wrote %s", path)
    log.info(
        "Open RELION here: the External tab is filled in (%s). Without a window:\n"
        "  relion_pipeliner --addJobFromStar %s", GUI_FILE, paths[0],
    )  # fmt: skip


def job_star(given: Mapping[str, list[str]]) -> str:
    """Return a job.star that RELION 3.1, 4.0 and 5.0 accept.

    Options beyond the tenth parameter go into the additional arguments.
    """
    values = {"fn_exe": executable(), "in_part": "", "nr_threads": "1"}
    values["in_part"] = " ".join(given.get("in_parts", []))
    values["nr_threads"] = " ".join(given.get("j", [])) or "1"
    parameters = [("mode", given["mode"][0])]
    parameters += [
        (name, " ".join(words)) for name, words in given.items() if name not in _NOT_PARAMETERS
    ]
    for number, (label, value) in enumerate(parameters[:N_PARAMETERS], 1):
        values[f"param{number}_label"] = label
        values[f"param{number}_value"] = value or "Yes"
    rest = [f"--{label} {value or 'Yes'}" for label, value in parameters[N_PARAMETERS:]]
    values["other_args"] = " ".join(rest)
    return _HEAD + "".join(f"{name} {_quoted(value)}\n" for name, value in values.items()) + "\n"


def executable() -> str:
    """Return what to type as External executable: this installation, by absolute path."""
    beside = Path(sys.executable).parent / "relion_cryofilter"
    if beside.is_file():
        return str(beside)
    shim = Path(__file__).resolve().parents[2] / "external_job.py"
    if shim.is_file():
        return f"{sys.executable} {shim}"
    found = shutil.which("relion_cryofilter")
    if found is None:
        raise UsageError(
            "Can't tell how RELION should start this program: no relion_cryofilter command beside "
            f"{sys.executable}. Install the package there with pip."
        )
    return str(Path(found).resolve())


def _quoted(value: str) -> str:
    if not value or " " in value:
        return f'"{value}"'
    return value

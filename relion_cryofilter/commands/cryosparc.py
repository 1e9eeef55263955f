"""``cryosparc``: particles of a CryoSPARC job in, an External job with two particle outputs out.

Written against the classes of cryosparc-tools 5 (https://tools.cryosparc.com).
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from relion_cryofilter.commands.score import filter_particles
from relion_cryofilter.errors import CryoFilterError, CryoSparcError, UsageError
from relion_cryofilter.files import replacing
from relion_cryofilter.locks import one_run
from relion_cryofilter.options import CryosparcOptions, ScoreOptions
from relion_cryofilter.particles.cryosparc import TOOLS, CsFile, CsTable, optional, particles_of_cs
from relion_cryofilter.results.charts import SCORE_HISTOGRAM
from relion_cryofilter.results.outputs import Output, results_folder
from relion_cryofilter.results.summaries import histogram_of
from relion_cryofilter.thresholds import Chosen

TOOLS_MAJOR = 5
INPUT, SLOT = "particles", "blob"
OUTPUTS = ("particles_accepted", "particles_rejected")
SCORED, HISTOGRAM = "particles_scored.cs", "scores"

log = logging.getLogger("relion_cryofilter")


@one_run()
def cryosparc(
    options: CryosparcOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Score the particles of a CryoSPARC job in an External job of the same project.

    Raises
    ------
    CryoFilterError
        The server refuses, or the particles can't be scored; the External job is marked as failed.
    """
    source = re.fullmatch(r"(J\d+)[:.]([A-Za-z]\w*)", options.particles or "")
    if not source:
        raise UsageError(
            f"--particles is {options.particles or 'missing'}; expected a job and its output, "
            "such as J42:particles or J43:particles_selected."
        )
    if not options.project or not options.workspace:
        raise UsageError("Say where the External job goes: --project P3 --workspace W1.")
    client = connect(options)
    with _asking(f"find the project {options.project}"):
        project = client.find_project(options.project)
        folder = options.project_dir or Path(str(project.dir))
    if not folder.is_dir():
        raise CryoSparcError(
            f"The folder of {options.project}, {folder}, can't be seen from this machine. Run this "
            "where CryoSPARC's projects are mounted, or name the folder with --project_dir."
        )
    with _asking(f"create an External job in {options.workspace}"):
        job = project.create_external_job(options.workspace, title=options.title)
    log.info("External job %s of %s: %s", job.uid, options.project, options.title)
    kept = nullcontext(options.o) if options.o else tempfile.TemporaryDirectory()
    with _failing(job), kept as name:
        results = results_folder(Path(str(name)))
        _connect_and_start(job, source[1], source[2])
        with _copying_log(job):
            _filter(job, folder, results, options, abort_requested)
        with _asking("mark the External job as completed"):
            job.stop()
    return ()


def connect(options: CryosparcOptions) -> Any:
    """Log in to the server and return its `cryosparc.tools.CryoSPARC`.

    Raises
    ------
    CryoSparcError
        The server can't be reached, refuses the login, or wants another cryosparc-tools.
    """
    tools = optional("cryosparc.tools", TOOLS)
    version = tools.__version__
    if int(version.partition(".")[0]) != TOOLS_MAJOR:
        raise CryoSparcError(
            f"cryosparc-tools {version} is installed; expected {TOOLS_MAJOR}.x. Install it: pip "
            f"install 'cryosparc-tools~={TOOLS_MAJOR}.0'. For other servers, score the .cs files "
            "(mode score)."
        )
    where = f"CryoSPARC at http://{options.host}:{options.port}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            client = tools.CryoSPARC(
                None, host=options.host, base_port=options.port, email=options.email,
                password=os.environ.get("CRYOSPARC_PASSWORD"),
                license=options.license or os.environ.get("CRYOSPARC_LICENSE_ID"),
            )  # fmt: skip
        except ValueError as error:
            raise CryoSparcError(
                f"{where}: no login is known here. Run `python -m cryosparc.tools login`, or give "
                "--email and the password in the variable CRYOSPARC_PASSWORD."
            ) from error
        except RuntimeError as error:
            raise CryoSparcError(_why_not_connected(where, error)) from error
    for warning in said:
        if "may not be compatible" in str(warning.message):
            found = re.search(r"with version v?(\S+)", str(warning.message))
            server = found[1] if found else "unknown"
            minor = ".".join(server.split(".")[:2])
            raise CryoSparcError(
                f"{where} has version {server}, but cryosparc-tools {version} is installed. "
                f"Install the one that fits: pip install 'cryosparc-tools~={minor}.0'."
            )
    return client


def _why_not_connected(where: str, error: RuntimeError) -> str:
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)  # of a proxy before the server
    if {getattr(cause, "code", None), getattr(response, "status_code", None)} & {401, 403}:
        return (
            f"{where} refuses the login. Check --email and CRYOSPARC_PASSWORD, or run "
            "`python -m cryosparc.tools login` again."
        )
    return f"{where} can't be reached ({_first_line(cause)}). Check --host and --port."


def _connect_and_start(job: Any, source_job: str, source_output: str) -> None:
    """Connect the input, declare the outputs, which inherit all else from it, and start."""
    with _asking(f"connect {source_job}:{source_output}"):
        job.connect(INPUT, source_job, source_output, slots=[SLOT], title="Particles")
        for name in OUTPUTS:
            title = name.replace("_", " ").capitalize()
            job.add_output("particle", name, slots=[SLOT], passthrough=INPUT, title=title)
        job.start("running")


def _filter(
    job: Any,
    project: Path,
    results: Path,
    options: CryosparcOptions,
    abort_requested: Callable[[], bool],
) -> None:
    """Score the input in the folder `results` and send what comes out to the job."""
    with _asking("load the particles"):
        particles = job.load_input(INPUT)
    source = results / "input.cs"
    with replacing(source) as file:
        particles.save(file)
    names = ("weights", "threshold", "skip_bad", "any_contrast", "gpu", "j", "quiet", "verbose")
    same = {name: getattr(options, name) for name in names}
    table = CsTable(source, CsFile(source, particles, np.dtype([])))
    filtered = filter_particles(
        ScoreOptions(in_parts=source, o=results, project_dir=project, **same),
        lambda _: particles_of_cs(table, project),
        abort_requested,
    )
    assert filtered is not None  # one process
    chosen = filtered.chosen
    _save_outputs(job, table.main.with_score(chosen.values).dataset, chosen.accepted)
    _show(job, results, chosen)


def _save_outputs(job: Any, scored: Any, accepted: np.ndarray) -> None:
    """Save both outputs; CryoSPARC adds the other slots of the input by uid."""
    for name, rows in zip(OUTPUTS, (accepted, ~accepted)):
        with _asking(f"save {name}"):
            part = scored.mask(rows)
            output = job.alloc_output(name, part)
            for field in output.fields(exclude_uid=True):
                if field in part:
                    output[field] = part[field]
            job.save_output(name, output)
    with _asking(f"take {SCORED}"):
        job.upload_dataset(SCORED, scored)


def _show(job: Any, results: Path, chosen: Chosen) -> None:
    """Put all pictures of the results into the job's log; the histogram of scores on its tile."""
    kept = int(chosen.accepted.sum())
    histogram = histogram_of(chosen.values, chosen.threshold, kept)
    replace(SCORE_HISTOGRAM, name=HISTOGRAM).of(histogram).save(results)
    path = results / f"{HISTOGRAM}.png"
    with _asking("take the plot"):
        for picture in sorted(results.glob("*.png")):
            name = picture.stem.replace("_", " ").capitalize()
            job.log_plot(BytesIO(picture.read_bytes()), name, formats=["png"])
        job.set_tile_image(BytesIO(path.read_bytes()), name="scores")


@contextmanager
def _failing(job: Any) -> Iterator[None]:
    """Mark the External job as failed if the block does not end well."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, CryoFilterError)
        with suppress(Exception):  # the server may be what failed; the error is raised anyway
            job.stop(error=str(error) if known else traceback.format_exc())
        raise


class _JobLog(logging.Handler):
    """Sends lines of our log to the job's log."""

    def __init__(self, job: Any) -> None:
        super().__init__(logging.INFO)
        self._job = job

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning" if record.levelno >= logging.WARNING else "text"
        with suppress(Exception):  # a lost line is no reason to lose the scores
            self._job.log(self.format(record), level=level)


@contextmanager
def _copying_log(job: Any) -> Iterator[None]:
    handler = _JobLog(job)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn what the server, or the way to it, has against `what` into a CryoSparcError."""
    try:
        yield
    except (TypeError, AttributeError, CryoFilterError):
        raise
    except Exception as error:
        raise CryoSparcError(f"CryoSPARC did not {what}: {_first_line(error)}.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

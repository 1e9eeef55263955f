"""The External-job guard: whatever happens, RELION learns how the job ended.

RELION ignores exit codes; it waits for one of three empty files. So the guard opens before the
options are parsed or anything heavy is imported, and this module imports the standard library
only.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

from relion_cryofilter.errors import Aborted, CryoFilterError, UsageError, readable
from relion_cryofilter.files import find_project, is_ours, remove_unfinished
from relion_cryofilter.locks import FolderInUse, own, release
from relion_cryofilter.options import JOB_MODES, MODES
from relion_cryofilter.processes import process_number
from relion_cryofilter.relion.advice import advice_on

SUCCESS = "RELION_JOB_EXIT_SUCCESS"
FAILURE = "RELION_JOB_EXIT_FAILURE"
ABORTED = "RELION_JOB_EXIT_ABORTED"
ABORT_NOW = "RELION_JOB_ABORT_NOW"
PIPELINE_CHANGED = ".pipeline_has_changed"
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)


class Terminated(BaseException):
    """The system asked the process to end (a queue's time limit, a shutdown)."""


class JobFolder:
    """The folder of an External job and the files by which RELION follows it.

    Parameters
    ----------
    name
        The value of ``--o``, project-relative, e.g. ``External/job012/``.
    """

    def __init__(self, name: str) -> None:
        self.name = name if name.endswith("/") else f"{name}/"
        self.path = Path(name)
        self.in_use = False  # by another job, whose exit file it is

    def open(self) -> None:
        """Make the folder ours; remove the exit files and unfinished files of an earlier run."""
        try:
            own(self.path)
        except FolderInUse:
            self.in_use = True
            raise
        for name in (SUCCESS, FAILURE, ABORTED):
            (self.path / name).unlink(missing_ok=True)
        remove_unfinished(self.path)

    def abort_requested(self) -> bool:
        """Tell whether somebody chose "Abort running" in RELION's window."""
        return (self.path / ABORT_NOW).exists()

    def close(self, outcome: str) -> None:
        """Leave the exit file `outcome`, and wake up an open RELION 5 window."""
        if self.in_use:
            return
        (self.path / ABORT_NOW).unlink(missing_ok=True)
        (self.path / outcome).touch()
        project = find_project(Path()) or find_project(self.path)
        if project is not None:
            with suppress(OSError):
                (project / PIPELINE_CHANGED).touch()
        release(self.path)


def output_folder(words: Sequence[str]) -> JobFolder | None:
    """Find the job's folder in unparsed words: the value of ``--o``, if it is that of a job.

    None for commands that write a file to ``--o`` (``convert``, ``job``), and for a folder that
    is not ours: of another RELION job, with others' files, or where the input is. Nothing is
    touched there.
    """
    value = _value_of("o", words)
    if not value:
        return None
    path = Path(value)
    named = words[0] if words and not words[0].startswith("-") else ""
    file_expected = named in MODES and named not in JOB_MODES and not path.is_dir()
    if named == "job" or file_expected or (path.exists() and not path.is_dir()):
        return None
    source = _value_of("in_parts", words)
    if (source and Path(source).resolve().parent == path.resolve()) or not is_ours(path):
        return None
    return JobFolder(value)


def _value_of(name: str, words: Sequence[str]) -> str:
    """Return the words after ``--name``, joined as the parser will; the last one counts."""
    value = ""
    for place, word in enumerate(words):
        label, equals, first = word.partition("=")
        if not label.startswith("--") or label.lstrip("-") != name:
            continue
        rest = list(takewhile(lambda other: not other.startswith("--"), words[place + 1 :]))
        value = " ".join([first, *rest] if equals else rest) or value
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without program name) and tell RELION how it ended.

    Returns
    -------
    int
        Exit code: 0 success, 1 failure, 2 usage error, 3 aborted, 143 terminated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait take the cores from others, on a busy node twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = output_folder(words)
    try:
        if folder is not None and process_number():  # the first process speaks to RELION
            _do(words, folder.abort_requested)
            return 0
        if folder is None:
            _do(words, lambda: False)
            return 0
        folder.open()
        with _signals(folder):
            _work(words, folder)
    except BaseException as error:
        folder = None if process_number() else folder
        return _report(error, folder, verbose="--verbose" in words)
    return 0


def _do(words: list[str], abort_requested: Callable[[], bool]) -> tuple[Any, ...]:
    """Parse the words and run the recipe; return what RELION should know."""
    from relion_cryofilter import cli

    request = cli.read(words)
    if request is None:  # --help, --version
        return ()
    if request.mode == "job":
        from relion_cryofilter.relion.templates import write_job_files

        write_job_files(request.given)
        return ()
    from relion_cryofilter import commands

    return commands.run(request.mode, request.options, abort_requested)


def _work(words: list[str], folder: JobFolder) -> None:
    if folder.abort_requested():
        raise Aborted("Stopped on request before anything was done.")
    outputs = _do(words, folder.abort_requested)
    from relion_cryofilter.relion.nodes import Node, write_output_nodes

    nodes = [Node(folder.name + output.file_name, output.kind) for output in outputs]
    if len(folder.name.split()) == 1:  # RELION has no way to write a name with spaces
        write_output_nodes(folder.path, nodes)
    folder.close(SUCCESS)


def _report(error: BaseException, folder: JobFolder | None, verbose: bool) -> int:
    """Say what went wrong on stderr (run.err), leave the exit file, return the exit code."""
    outcome, code = FAILURE, 1
    if isinstance(error, SystemExit) and folder is None:
        return int(error.code or 0) if not isinstance(error.code, str) else 1
    if isinstance(error, Aborted):
        outcome, code = ABORTED, 3
        logging.getLogger("relion_cryofilter").info("%s", error)
    elif isinstance(error, SystemExit):
        _say("Nothing was done: --help or --version leaves no results.")
    elif isinstance(error, Terminated | KeyboardInterrupt):
        code = 143
        _say(f"Ended by {str(error) or 'the keyboard'} before the job was done. Start it again.")
    elif advice := advice_on(error):
        _say(advice)
    elif isinstance(error, CryoFilterError):
        code = 2 if isinstance(error, UsageError) else 1
        _say(str(error))
    elif isinstance(error, OSError | MemoryError):
        _say(f"{error or 'out of memory'}. Check the disk, the memory and the permissions.")
    else:
        verbose = True
        _say(f"{type(error).__name__}: {error}. This is a bug in relion_cryofilter; please "
             "report it with the lines below.")  # fmt: skip
    if verbose and outcome == FAILURE:
        traceback.print_exception(error)
    if folder is not None:
        with suppress(OSError):  # a folder that can't be written was reported already
            folder.close(outcome)
    return code


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"ERROR: {readable(text)}", file=sys.stderr, flush=True)


@contextmanager
def _signals(folder: JobFolder) -> Iterator[None]:
    """Turn the system's polite requests to end into `Terminated`; FAILURE is left at once.

    A queue kills for good a few seconds after it has asked, so the exit file can't wait for a
    batch to end.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if not (folder.path / SUCCESS).exists():
            os.close(os.open(folder.path / FAILURE, os.O_CREAT | os.O_WRONLY, 0o666))
        raise Terminated(signal.Signals(number).name)

    before = {}
    with suppress(ValueError):  # not in the main thread: an application that embeds us decides
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

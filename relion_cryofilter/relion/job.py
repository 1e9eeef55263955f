"""The External-job guard: whatever happens, RELION learns how the job ended.

RELION ignores exit codes; it waits for one of three empty files. So the guard opens before the
options are parsed or anything heavy is imported, and this module imports the standard library
only. A program's work is done by a child, so that what ends that (a crash in a library, a memory
limit, a kill) leaves the guard.

The exit file comes before any words, and it is a rename of a file that was made at the start: it
needs no space, and whoever asks first decides, so there is one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

from relion_cryofilter.errors import Aborted, CryoFilterError, UsageError, readable
from relion_cryofilter.files import find_project, is_ours, remove_unfinished
from relion_cryofilter.locks import FolderInUse, own, release
from relion_cryofilter.options import JOB_MODES, MODES, CheckOptions
from relion_cryofilter.processes import process_number
from relion_cryofilter.relion.advice import advice_on

SUCCESS = "RELION_JOB_EXIT_SUCCESS"
FAILURE = "RELION_JOB_EXIT_FAILURE"
ABORTED = "RELION_JOB_EXIT_ABORTED"
ABORT_NOW = "RELION_JOB_ABORT_NOW"
_OUTCOMES = (SUCCESS, FAILURE, ABORTED)
PIPELINE_CHANGED = ".pipeline_has_changed"
_UNDECIDED = ".RELION_JOB_EXIT"  # becomes the exit file
_LEFT_ALONE = {
    *(signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT),  # these end nothing
    *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),  # these are crashes
    *(signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
    *(signal.SIGKILL, signal.SIGSTOP),  # these can't be heard
}
_SIGNALS = sorted(signal.valid_signals() - _LEFT_ALONE)
"""All that end a process unless it listens: of people, queues, limits and timers."""
_GRACE_S = 10  # what the work has to tidy up when it was asked to end
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_SEARCH_PATHS = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")


class Terminated(BaseException):
    """The system asked the process to end (a queue's time limit, a shutdown), by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(_name(number))
        self.number = number


def _name(number: int) -> str:
    """Return ``SIGTERM`` for 15."""
    names = {int(known): known.name for known in signal.Signals}
    return names.get(number, f"signal {number}")


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
        self.closed = False  # it is known that there is an exit file
        self.in_use = False  # by another job, whose exit file it is

    def open(self) -> None:
        """Make the folder ours; remove the exit files and unfinished files of an earlier run."""
        try:
            own(self.path)
        except FolderInUse:
            self.in_use = True
            raise
        for name in _OUTCOMES:
            (self.path / name).unlink(missing_ok=True)
        (self.path / _UNDECIDED).touch()
        remove_unfinished(self.path)

    def abort_requested(self) -> bool:
        """Tell whether somebody chose "Abort running" in RELION's window."""
        return (self.path / ABORT_NOW).exists()

    def close(self, outcome: str) -> bool:
        """Leave the exit file `outcome`, if there is none yet, and wake up RELION 5's window.

        Tells whether this call decided. Nothing is raised: a folder that can't be written leaves
        no way to tell RELION anything.
        """
        if self.in_use:
            return False
        try:
            (self.path / _UNDECIDED).rename(self.path / outcome)
        except OSError:  # decided already, or never opened
            if any((self.path / name).exists() for name in _OUTCOMES):
                self.closed = True
                return False
            with suppress(OSError):
                (self.path / outcome).touch()
        self.closed = True
        with suppress(OSError):
            (self.path / ABORT_NOW).unlink(missing_ok=True)
            project = find_project(Path()) or find_project(self.path)
            if project is not None:
                (project / PIPELINE_CHANGED).touch()
        return True


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

    The program's own words (`argv` is None) are done in a child process.

    Returns
    -------
    int
        Exit code: 0 success, 1 failure, 2 usage error, 3 aborted, 143 terminated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait take the cores from others, on a busy node twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder, first, guarded, code = output_folder(words), True, False, 0
    with _signals(folder) if folder else nullcontext(), _released(folder):
        try:
            if folder is None:
                _do(words, lambda: False)
                return 0
            try:
                first = not process_number()
            except UsageError:
                folder.open()
                raise
            if first:  # it speaks to RELION, the others only if they fail
                folder.open()
            folder.path.mkdir(parents=True, exist_ok=True)
            if argv is None:
                ended = _in_child(folder, first)
                if ended is not None:
                    return ended
                guarded = True
            _work(words, folder, first)
        except BaseException as error:
            if isinstance(error, Aborted) and not first:
                folder = None
            code = _report(error, folder, verbose="--verbose" in words)
            if isinstance(error, Terminated) and guarded:
                os._exit(code)  # the guard would speak for a child whose threads end too late
    if guarded:
        # Everything is written and said; taking a million objects apart would take a second.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


@contextmanager
def _released(folder: JobFolder | None) -> Iterator[None]:
    """Let another job have the folder when everything is done."""
    try:
        yield
    finally:
        if folder is not None:
            release(folder.path)


def _in_child(folder: JobFolder, first: bool) -> int | None:
    """Fork: None in the child, which does the work; its exit code here, once it has ended.

    A child that ends without an exit file gets one from here.
    """
    # Files that are opened must not become the standard output of a library.
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(spare)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until both know which they are
    guard, child = os.getpid(), os.fork()
    if not child:
        _end_with(guard)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _, status = os.waitpid(child, 0)
    except Terminated as request:  # FAILURE was left; the work may tidy up
        end = time.monotonic() + _GRACE_S
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, request.number)
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    raise
                time.sleep(0.02)
        return 143
    code = os.waitstatus_to_exitcode(status)
    if (first or code not in (0, 3)) and folder.close(FAILURE):
        _say(_last_words(code))
        code = code or 1
    return code if code >= 0 else 128 - code


def _end_with(guard: int) -> None:
    """Let the kernel kill this process when its guard is killed (Linux): no job goes on unseen."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)


def _last_words(code: int) -> str:
    """Say for a process that could not how it ended: by its exit code, or minus its signal."""
    if code >= 0:
        return (
            f"A library ended the program (exit code {code}); the lines above may tell why. Check "
            "the memory, the limits of the queue (ulimit -a) and the installation."
        )
    if -code == signal.SIGKILL:
        return (
            "The program was killed (SIGKILL), as the system does when the memory is full and a "
            "queue at its limits. Ask for more memory or time, or use fewer threads (--j)."
        )
    return (
        f"The program was ended by {_name(-code)}: a library crashed. A damaged input, a full "
        "disk or a memory limit can do that; check them, then start it again."
    )


def _do(words: list[str], abort_requested: Callable[[], bool]) -> tuple[Any, ...]:
    """Parse the words and run the recipe; return what RELION should know."""
    from relion_cryofilter import cli

    request = cli.read(words)
    if request is None:  # --help, --version
        return ()
    if request.mode == "job":
        if isinstance(request.options, CheckOptions):
            from relion_cryofilter.relion.classification import write_check

            write_check(request.options, " ".join(request.given.get("o", [])))
            return ()
        from relion_cryofilter.relion.templates import write_job_files

        write_job_files(request.given)
        return ()
    from relion_cryofilter import commands

    return commands.run(request.mode, request.options, abort_requested)


def _work(words: list[str], folder: JobFolder, first: bool) -> None:
    if folder.abort_requested():
        raise Aborted("Stopped on request before anything was done.")
    outputs = _do(words, folder.abort_requested)
    if not first:
        return
    from relion_cryofilter.relion.nodes import Node, write_output_nodes

    nodes = [Node(folder.name + output.file_name, output.kind) for output in outputs]
    if len(folder.name.split()) == 1:  # RELION has no way to write a name with spaces
        write_output_nodes(folder.path, nodes)
    folder.close(SUCCESS)


def _report(error: BaseException, folder: JobFolder | None, verbose: bool) -> int:
    """Leave the exit file, say what went wrong on stderr (run.err), return the exit code."""
    aborted = isinstance(error, Aborted)
    if folder is not None:
        folder.close(ABORTED if aborted else FAILURE)
    code = 1
    if isinstance(error, SystemExit) and folder is None:
        return int(error.code or 0) if not isinstance(error.code, str) else 1
    if aborted:
        code = 3
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
        _say(f"{str(error) or 'Out of memory'}. Check the disk, the memory and the permissions.")
    else:
        verbose = True
        _say(f"{type(error).__name__}: {error}. This is a bug in relion_cryofilter; please "
             "report it with the lines below.")  # fmt: skip
    if verbose and not aborted:
        with suppress(OSError, ValueError):
            traceback.print_exception(error)
    return code


def _say(text: str) -> None:
    """Write a line to stderr, after what was said on stdout, if there is still a way to do so."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # full, broken, closed, or None
            stream.flush()
    with suppress(OSError, ValueError):
        print(f"ERROR: {readable(text)}", file=sys.stderr, flush=True)


@contextmanager
def _signals(folder: JobFolder) -> Iterator[None]:
    """Turn the first request to end into `Terminated`, ignore more; FAILURE is left at once.

    A queue kills for good a few seconds after it has asked, so the exit file can't wait for a
    batch to end.
    """
    before: dict[int, Any] = {}
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or folder.closed:
            return
        asked = True
        folder.close(FAILURE)
        raise Terminated(number)

    with suppress(ValueError):  # not in the main thread: an application that embeds us decides
        for number in map(int, _SIGNALS):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

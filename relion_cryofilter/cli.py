"""One grammar for the command line and the External job, made from `options`."""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

from relion_cryofilter.errors import UsageError, readable, suggestion
from relion_cryofilter.kinds import KINDS, read_words
from relion_cryofilter.options import JOB_MODES, MODES, RELION_ONLY, TEMPLATES, Options
from relion_cryofilter.processes import __version__, process_number

PROGRAM = "relion_cryofilter"
ABOUT = "Score cryo-EM particle images and sort good particles from junk."
_OPTION = re.compile(r"-{2,}[A-Za-z]")
JOB_USAGE = f"""usage: {PROGRAM} job --mode MODE [options of that mode] [--o job.star]

Write job.star and .gui_externaljob.star into this folder, a RELION project: they fill in RELION's
External tab when its window is started (if it is open: External, then Jobs > Load job settings),
and relion_pipeliner --addJobFromStar takes them. With --o, write that one file only.
MODE is one of {", ".join(JOB_MODES)};
`{PROGRAM} MODE --help` lists its options.

{PROGRAM} job --mode check --in_parts External/job012/ [--sample N] [--o job.star]

Write a Class2D job of what was rejected there, for RELION's 2D classification tab."""
_KINDS = {**MODES, **TEMPLATES}
_LAST = [item.name for item in fields(Options)]
_ALSO = {"job": "Write a job.star that fills in RELION's External tab, or classifies the rejected."}


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    mode: str  # a key of `options.MODES`, or ``job``
    options: Options
    given: dict[str, list[str]]  # the words of each option that was given


class _Help(argparse.HelpFormatter):
    """Shows ``--threshold NUMBER`` instead of argparse's ``--threshold [NUMBER ...]``."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Try `{self.prog} --help`.")


def split_mode(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Find the mode: the first word, the value of ``--mode``, or both.

    Returns
    -------
    mode
        As it was typed, None without any; ``job score`` for ``job --mode score``.
    rest
        The other words.
    """
    split = (word.split("=", 1) if word.startswith("--mode=") else [word] for word in words)
    rest = [part for parts in split for part in parts]
    modes = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    if modes == ["job"] and rest and rest[0] in _KINDS:
        modes.append(rest.pop(0))
    while "--mode" in rest:
        place = rest.index("--mode")
        value = rest[place + 1 : place + 2]
        named = value if value and not value[0].startswith("-") else []
        modes += [word for word in named if word not in modes]
        del rest[place : place + 1 + len(named)]
    return " ".join(modes) or None, rest


def parse(words: Sequence[str]) -> Request:
    """Read the words of a command line.

    Raises
    ------
    UsageError
        A mode or an option is unknown, or a value can't be read.
    """
    # ``----label`` is a label that was typed with its dashes into RELION's window.
    plain = ["--" + word.lstrip("-") if _OPTION.match(word) else word for word in words]
    mode, rest = split_mode(plain)
    template, _, inner = (mode or "").partition(" ")
    if template == "job":
        if words[0] != "job" or (inner and inner not in (*JOB_MODES, *TEMPLATES)):
            raise UsageError(
                f"{PROGRAM} job writes a job.star for {', '.join((*JOB_MODES, *TEMPLATES))}; found "
                f"{mode!r}."
            )
        request = _parse_mode(inner or "score", rest)
        return Request("job", request.options, {"mode": [inner or "score"], **request.given})
    if mode in TEMPLATES:
        raise UsageError(f"{mode} only writes a job for RELION: {PROGRAM} job --mode {mode} …")
    return _parse_mode(mode or "score", rest)


def _parse_mode(mode: str, words: list[str]) -> Request:
    if mode not in _KINDS:
        raise UsageError(f"There is no mode {mode!r}. {suggestion(mode, [*MODES, *_ALSO], '')}")
    parser, kind = _parser_of(mode), _KINDS[mode]
    namespace, unknown = parser.parse_known_args(words)
    _refuse_unknown(mode, unknown)
    given = {name: value for name, value in vars(namespace).items() if value is not None}
    values = {}
    for item in fields(kind):
        if item.name in given:
            value = read_words(item, given[item.name])
            if value is not None:
                values[item.name] = value
    return Request(mode, kind(**values), given)


def _parser_of(mode: str) -> _Parser:
    kind = _KINDS[mode]
    parser = _Parser(
        prog=f"{PROGRAM} {mode}",
        usage=f"{PROGRAM} {mode} [options]",
        description=kind.__doc__,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    for item in sorted(fields(kind), key=lambda item: item.name in _LAST):
        positional = item.metadata.get("positional")
        kind_of = KINDS[item.metadata["kind"]]
        shown = "Yes" if item.default is True else item.default
        default = "" if item.default in (None, False, ()) else f" Default: {shown}."
        parser.add_argument(
            item.name if positional else f"--{item.name}",
            nargs="*",
            action="extend" if kind_of.several else "store",
            help=f"{item.metadata['help']}{default}".replace("%", "%%"),
            metavar=item.name.upper() if positional else kind_of.metavar,
        )
    for name in RELION_ONLY:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return parser


def _refuse_unknown(mode: str, unknown: list[str]) -> None:
    if not unknown:
        return
    word = unknown[0]
    if not word.startswith("-"):
        raise UsageError(f"Found {' '.join(unknown)!r} where an option (--name) was expected.")
    name = word.lstrip("-").partition("=")[0]
    known = [item.name for item in fields(_KINDS[mode])]
    if name in known:
        raise UsageError(f"Found {word!r}; options begin with two dashes: --{name}.")
    owners = [other for other, kind in MODES.items() if name in {f.name for f in fields(kind)}]
    if owners:
        raise UsageError(f"--{name} is an option of {' and '.join(owners)}, not of {mode}.")
    raise UsageError(f"There is no option --{name} in {mode}. {suggestion(name, known, '--')}")


def usage() -> str:
    """Return the text of ``relion_cryofilter --help``."""
    lines = [f"usage: {PROGRAM} MODE [options]", "", ABOUT, "", "modes:"]
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in MODES.items()}
    lines += [f"  {name:<9} {text}" for name, text in {**about, **_ALSO}.items()]
    jobs = ", ".join(JOB_MODES)
    lines += ["", f"`{PROGRAM} MODE --help` lists a mode's options. In RELION's External tab the"]
    lines += [f"mode is a parameter: label mode, value {jobs.replace(', ', ' or ')}."]
    return "\n".join(lines)


def read(words: Sequence[str]) -> Request | None:
    """Return what the words ask for, with the log started; None if it was help, which is printed.

    Raises
    ------
    UsageError
        As `parse`.
    """
    for stream in (sys.stdout, sys.stderr):  # of terminals that can't show all letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    texts = {(): usage(), ("help",): usage(), ("--version",): f"{PROGRAM} {__version__}"}
    for flag in ("--help", "-h"):
        texts |= {(flag,): usage(), ("job", flag): JOB_USAGE}
    if tuple(words) in texts:
        print(texts[tuple(words)])
        return None
    request = parse(words)
    _start_log(request.options)
    return request


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = readable(super().format(record))
        return text if record.levelno < logging.WARNING else f"WARNING: {text}"


def _note_library_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Log what a library warns of, for --verbose; those of fonts and of casts come in dozens."""
    log = logging.getLogger(PROGRAM)
    log.debug("%s, line %d: %s: %s", filename, lineno, category.__name__, message)


def _start_log(options: Options) -> None:
    warnings.showwarning = _note_library_warning
    logging.raiseExceptions = False  # a terminal that went away is no reason to stop a job
    log = logging.getLogger(PROGRAM)
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_LineFormatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    level = logging.DEBUG if options.verbose else logging.INFO
    level = logging.WARNING if options.quiet else level
    log.setLevel(logging.ERROR if process_number() else level)

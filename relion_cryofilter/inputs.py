"""What is read must stay what it was: the identity of every input of a run, kept and compared.

Whoever opens an input says so with `seen` or `reading`. The first identity counts; a file that is
another one later, while it is read, when it is read again, or when results are about to appear
(`files.replacing` asks), ends the run. So a result is never of two versions of a file, and never
of one that is gone.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from relion_cryofilter.errors import CryoFilterError

Identity: TypeAlias = tuple[int, int, int, int]
"""Inode, size, time of change (ns), and time of change of the inode (ns).

The last one tells of a file that was rewritten in place and got its old time back. A changed mode
or a new hard link moves it too; such a run is refused for nothing, and goes on when started again.
"""


def open_input(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read its bytes; an OSError for a pipe or a device, which never end."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a zero byte", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = open(path, "rb", buffering, opener=lambda *_: descriptor)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or device, no file", str(path))
    return file


def read_small(path: Path) -> str:
    """Return the text of a small file of RELION's, such as job.star: its first megabyte."""
    with open_input(path) as file:
        return file.read(1 << 20).decode(errors="replace")


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON from outside; a ValueError for whatever is none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


_watched: ContextVar[dict[Path, Identity] | None] = ContextVar("watched", default=None)


@contextmanager
def watching() -> Iterator[None]:
    """Keep the identities of the inputs that are opened within the block."""
    token = _watched.set({})
    try:
        yield
    finally:
        _watched.reset(token)


def identity_of(status: os.stat_result) -> Identity:
    """Return what two versions of a file never share."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def seen(path: Path, status: os.stat_result, known: Identity | None = None) -> Identity:
    """Note the status of an open input and return its identity.

    Raises
    ------
    CryoFilterError
        It is not the `known` one, or not what this path was when it was first opened.
    """
    identity, watched = identity_of(status), _watched.get()
    first = identity if watched is None else watched.setdefault(path, identity)
    if identity != first or known not in (None, identity):
        raise _changed(path)
    return identity


@contextmanager
def reading(path: Path, known: Identity | None = None, buffering: int = 0) -> Iterator[BinaryIO]:
    """Open an input that is `known`, and see that it is the same when the block ends well."""
    with open_input(path, buffering) as file:
        identity = seen(path, os.fstat(file.fileno()), known)
        yield file
        seen(path, os.fstat(file.fileno()), identity)


def require_unchanged() -> None:
    """Raise a CryoFilterError if an input is not what it was when it was first opened."""
    for path, identity in (_watched.get() or {}).items():
        try:
            same = identity_of(path.stat()) == identity
        except OSError:
            same = False
        if not same:
            raise _changed(path)


def _changed(path: Path) -> CryoFilterError:
    return CryoFilterError(
        f"{path} was replaced, changed or removed while this job read it, so nothing was made of "
        "it. Wait until no other program writes it, then start the job again; what was scored "
        "before is not scored again."
    )

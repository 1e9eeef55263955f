"""A results folder has one owner at a time: ``.cryofilter.lock``, made and judged here alone.

Two signs tell a live owner from a dead one, for neither is enough everywhere:

- ``flock`` on the file. The kernel lets go of it when the process ends, however it ends, so a
  killed job never blocks its Continue. Linux passes it on to NFS servers, Lustre and GPFS take it
  when mounted so. It is `flock` rather than `lockf`, whose locks are lost when the process closes
  any other descriptor of the file. But Lustre without ``-o flock`` and NFS without a lock server
  refuse it, and BeeGFS and mounts with local locks keep it within one machine.
- What is written there: host, process, and their start times. On the owner's machine they tell
  whether it lives, a number that was given to another process included. From another machine the
  file's time tells, which the owner moves every few seconds: who would take over waits and looks
  whether it moves. Clocks are not compared.

The file is created with ``O_EXCL``, never through a link, and removed by its owner. The processes
of one job (torchrun, srun) share the lock of the first, before which none of them writes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import claim
from relion_cryofilter.inputs import watching
from relion_cryofilter.processes import process_number

NAME = ".cryofilter.lock"
BEAT_S, PATIENCE_S = 3.0, 12.0
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger("relion_cryofilter")

_held: dict[Path, _Lock] = {}


class FolderInUse(UsageError):  # noqa: N818 - as `Aborted`
    """Another job, which lives, owns the folder; nothing was touched there."""


def own(folder: Path) -> None:
    """Make `folder` this job's until `release`; no matter if it is already.

    Raises
    ------
    FolderInUse
        Another job works in it.
    UsageError
        It is of another RELION job, or holds files of others (see `files.claim`).
    """
    claim(folder)
    place, first = folder.resolve(), True
    with suppress(UsageError):  # who asks for the number next says what is wrong with it
        first = not process_number()
    if place not in _held and first:
        _held[place] = _Lock(folder)


def release(folder: Path) -> None:
    """Let another job have `folder`."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        lock.free()


@contextmanager
def one_run() -> Iterator[None]:
    """Watch inputs in the block, or the function it decorates; release what it owned after it."""
    before = set(_held)
    try:
        with watching():
            yield
    finally:
        for folder in set(_held) - before:
            release(folder)


class _Lock:
    def __init__(self, folder: Path) -> None:
        self.path, self._owner = folder / NAME, os.getpid()
        self._end = threading.Event()
        self._descriptor, locked = self._open()
        try:
            self._judge(locked)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_myself()).encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._beat = threading.Thread(target=self._keep_beating, daemon=True)
        # The thread hears no signals: they are to interrupt what the main thread waits for.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._beat.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def _open(self) -> tuple[int, bool]:
        """Open the file that is at the path once it is locked, and tell if it could be locked.

        Where the owner is dead, its child that did the work, and holds the lock too, is dying.
        """
        end = time.monotonic() + PATIENCE_S
        while True:
            if self.path.is_symlink():
                self.path.unlink(missing_ok=True)
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:  # its owner has just removed it
                continue
            locked = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _read(descriptor)
                os.close(descriptor)
                if _is_dead(owner) and time.monotonic() < end:
                    time.sleep(0.02)
                    continue
                raise self._in_use(owner) from None
            except OSError as error:
                locked = False
                if error.errno not in _UNSUPPORTED:
                    os.close(descriptor)
                    raise
            with suppress(FileNotFoundError):
                status = self.path.lstat()
                if os.path.samestat(os.fstat(descriptor), status):
                    if status.st_nlink == 1:
                        return descriptor, locked
                    self.path.unlink()  # a hard copy of the folder has it, too
            os.close(descriptor)

    def _judge(self, locked: bool) -> None:
        """Raise FolderInUse if the owner that the file names lives, though no lock tells."""
        owner, me = _read(self._descriptor), _myself()
        if not owner.get("host") or owner == me:
            return
        if (owner.get("host"), owner.get("boot")) == (me["host"], me["boot"]):
            if not _is_dead(owner):
                raise self._in_use(owner)
            return
        log.warning(
            "%s: a job on %s was not ended here; looking for %.0f s whether it still works.",
            self.path.parent, owner.get("host"), PATIENCE_S,
        )  # fmt: skip
        before, end = _time_of(self.path), time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 6)
            if _time_of(self.path) != before:
                raise self._in_use(owner)

    def _in_use(self, owner: dict[str, Any]) -> FolderInUse:
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
        return FolderInUse(
            f"{self.path.parent} is in use by another job of this program ({who}). Wait until it "
            "has ended, or name another folder for the results."
        )

    def _keep_beating(self) -> None:
        while not self._end.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._descriptor)

    def free(self) -> None:
        """Remove the file while it is still locked, then let go; not in a child of the owner."""
        if os.getpid() != self._owner:
            return
        self._end.set()
        self._beat.join(BEAT_S)
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), self.path.lstat()):
                self.path.unlink()
        os.close(self._descriptor)


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": _start_of(pid)}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Tell whether a process of this machine has ended; one that is not yet waited for has."""
    if (owner.get("host"), owner.get("boot")) != (socket.gethostname(), _boot()):
        return False
    return not owner.get("start") or owner.get("start") != _start_of(owner.get("pid"))


def _boot() -> str:
    """Return what tells one start of this machine from another, or ""."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_of(pid: Any) -> str:
    """Return when the process began, in ticks; "" if there is none (or no /proc), or it is dead."""
    with suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    return ""


def _read(descriptor: int) -> dict[str, Any]:
    """Return what the file says of its owner; {} if it says nothing."""
    with suppress(ValueError, RecursionError):
        found = json.loads(os.pread(descriptor, 4096, 0))
        return found if isinstance(found, dict) else {}
    return {}


def _time_of(path: Path) -> int:
    """Return the file's time as its server has it: opening makes NFS ask."""
    with suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return 0

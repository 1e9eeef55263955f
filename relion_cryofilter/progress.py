"""Whole progress lines with rate and time left, and the check whether to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from relion_cryofilter.errors import Aborted

log = logging.getLogger("relion_cryofilter")

_FIRST_LINE_S = 2.0
_MOST_SILENCE_S = 30.0

Listener: TypeAlias = Callable[[str, int, int], object]
"""Called with what is counted, how many are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Tell `listener` of every step of every Progress within the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """Counts what is done and says so now and then, in lines that read well in run.out.

    The first line comes after two seconds, later ones at ever longer intervals up to half a
    minute: a long job does not fill run.out, a short one says something.

    Parameters
    ----------
    total
        How many there are to do.
    what
        What is counted, e.g. ``particles``.
    abort_requested
        Asked at every `step`; when it says True, `step` raises Aborted.
    """

    def __init__(
        self, total: int, what: str, abort_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.total, self.what, self.done, self._before = total, what, 0, 0
        self._abort_requested = abort_requested
        self._start = time.monotonic()
        self._silence = _FIRST_LINE_S
        self._next = self._start + self._silence

    def skip(self, count: int) -> None:
        """Note that `count` more were done by an earlier run; they do not count for the rate."""
        self.done += count
        self._before += count

    def step(self, count: int) -> None:
        """Note that `count` more are done.

        Raises
        ------
        Aborted
            Somebody asked the job to stop.
        """
        self.done += count
        listener = _listener.get()
        if listener is not None:
            listener(self.what, self.done, self.total)
        if self._abort_requested():
            raise Aborted(f"Stopped on request after {self.done:,} of {self.total:,} {self.what}.")
        now = time.monotonic()
        if now >= self._next and self.done > self._before:
            self._silence = min(1.5 * self._silence, _MOST_SILENCE_S)
            self._next = now + self._silence
            left = (self.total - self.done) / max(self.rate, 1e-9)
            log.info(
                "%s of %s %s (%d %%), %s/s, %s left",
                f"{self.done:,}", f"{self.total:,}", self.what,
                100 * self.done // max(self.total, 1), f"{self.rate:,.0f}", duration(left),
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Done a second, by this run."""
        return (self.done - self._before) / max(self.seconds, 1e-9)


def duration(seconds: float) -> str:
    """Return seconds in the largest units that fit: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return ``1 micrograph``, ``2 micrographs``, ``1,400 particles``; `plural` if odd."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"

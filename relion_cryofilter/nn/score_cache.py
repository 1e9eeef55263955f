"""Scores that are kept in the job's folder, so that no image is scored twice.

A journal of records, each written at once when its images have been scored: a job that is killed
loses what was under way and nothing else. A record names its stack with size and time of change,
and the models; so does the journal's first line. Nothing is believed unseen: a cut-off or damaged
end is dropped, and so are records that are not of these models, or hold what no score can be.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from relion_cryofilter.errors import bounded
from relion_cryofilter.files import replacing
from relion_cryofilter.inputs import open_input, parse_json, seen
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.splits import short_hash
from relion_cryofilter.progress import counted

NAME, SUFFIX = "score_cache", ".journal"

_FORMAT = 2
_HEAD = struct.Struct("<II")
"""Before each record: its length and checksum."""

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class _Record:
    """Scores of images of one stack: 0-based places (k,) and scores (k,)."""

    key: str  # of the models and how they were used
    stack: str
    identity: tuple[int, ...]
    places: np.ndarray
    scores: np.ndarray

    def to_bytes(self) -> bytes:
        about = {
            "key": self.key, "stack": self.stack, "identity": self.identity, "n": len(self.places)
        }  # fmt: skip
        body = json.dumps(about).encode() + b"\n"
        body += self.places.astype("<u4").tobytes() + self.scores.astype("<f8").tobytes()
        return _HEAD.pack(len(body), zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, body: bytes) -> _Record:
        """Read what `to_bytes` gave; a ValueError for what is no record."""
        line, _, values = body.partition(b"\n")
        try:
            about = parse_json(line)
            key, stack, identity = about["key"], about["stack"], tuple(about["identity"])
            n = bounded(about["n"], 0, len(values) // 12, "n", refuse=ValueError)
        except (KeyError, TypeError) as error:
            raise ValueError("not a record") from error
        if not isinstance(stack, str) or len(values) != 12 * n:
            raise ValueError("not a record")
        places = np.frombuffer(values, "<u4", n).astype(np.int64)
        scores = np.frombuffer(values, "<f8", n, 4 * n)
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("its scores are not from 0 to 1")
        return cls(key, stack, identity, places, scores)


class ScoreCache:
    """The journal of one process of a job; `values` (n,) are the scores known at its start.

    `key` is all that scores depend on besides the images: the models' hashes and how they are
    used. Each process (`number`) writes a journal of its own and reads those of all.
    """

    def __init__(self, folder: Path, key: str, particles: ParticleSet, number: int = 0) -> None:
        self.path = folder / f"{NAME}{f'_{number}' if number else ''}{SUFFIX}"
        self._key = short_hash(key)
        self._first_line = json.dumps({"format": _FORMAT, "key": key}).encode() + b"\n"
        self._particles = particles
        inverted = particles.inverted or (False,) * len(particles.stacks)
        self._identities = list(map(_identity, particles.stacks, inverted))
        _make_own(self.path)
        self._numbers = {name: n for n, name in enumerate(particles.stack_names)}
        self._lock = threading.Lock()
        journals = sorted(folder.glob(f"{NAME}*{SUFFIX}"))
        self.values = self._known([p for p in journals if p.is_file() and not p.is_symlink()])

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Keep the scores (m,) of `rows`, at once; NaN is no score. Safe from several threads."""
        good = ~np.isnan(scores)
        rows, scores = rows[good], scores[good]
        stacks = self._particles.stack_of[rows]
        records = []
        for stack, members in groupby(range(len(rows)), key=lambda place: int(stacks[place])):
            part = list(members)
            identity = self._identities[stack]
            if identity is not None:
                places = self._particles.index[rows[part]]
                name = self._particles.stack_names[stack]
                record = _Record(self._key, name, identity, places, scores[part])
                records.append(record.to_bytes())
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with self._lock, os.fdopen(os.open(self.path, flags, 0o666), "ab") as file:
            start = b"" if file.tell() else self._first_line
            file.write(start + b"".join(records))

    def _known(self, paths: list[Path]) -> np.ndarray:
        """Return (n,) scores by row, NaN where there is none; drop what can't be used."""
        by_stack: dict[int, list[_Record]] = {}
        for path in paths:
            for record in self._read(path):
                number = self._numbers.get(record.stack)
                if number is not None and record.identity == self._identities[number]:
                    by_stack.setdefault(number, []).append(record)
        # From places in stacks to rows.
        particles = self._particles
        values = np.full(len(particles), np.nan)
        order = np.argsort(particles.stack_of, kind="stable")
        edges = np.searchsorted(particles.stack_of[order], np.arange(len(particles.stacks) + 1))
        for number, records in by_stack.items():
            rows = order[edges[number] : edges[number + 1]]
            places = np.concatenate([record.places for record in records])
            wanted = particles.index[rows]
            rows, wanted = rows[wanted >= 0], wanted[wanted >= 0]
            most = min(places.max(initial=-1), wanted.max(initial=-1))
            table = np.full(most + 1, np.nan)
            known, asked = places < len(table), wanted < len(table)
            table[places[known]] = np.concatenate([record.scores for record in records])[known]
            values[rows[asked]] = table[wanted[asked]]
        return values

    def _read(self, path: Path) -> Iterator[_Record]:
        """Yield the whole records of a journal; cut our own off where the rest can't be used."""
        strange = 0
        with open_input(path, 1 << 20) as file:
            if file.readline(len(self._first_line) + 1) != self._first_line:
                log.info("%s is of other models or options; its scores are not used.", path)
                end = 0
            else:
                records = _whole_records(file)
                while True:
                    try:
                        record = next(records)
                    except StopIteration as stop:
                        end = stop.value
                        break
                    if record is not None and record.key == self._key:
                        yield record
                    else:
                        strange += 1
            size = os.fstat(file.fileno()).st_size
        if strange:
            log.warning(
                "%s holds %s without scores from 0 to 1 by these models; they are not used.",
                path, counted(strange, "record"),
            )  # fmt: skip
        if 0 < end < size:
            log.warning("The end of %s can't be read; those images are scored again.", path)
        if end < size and path == self.path:
            os.truncate(path, end)


def _whole_records(file: BinaryIO) -> Generator[_Record | None, None, int]:
    """Yield records up to the first that is cut off or damaged; return where it begins.

    One that is whole but no record is None.
    """
    while True:
        end = file.tell()
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return end
        length, check = _HEAD.unpack(head)
        if length > os.fstat(file.fileno()).st_size - file.tell():
            return end
        body = file.read(length)
        if zlib.crc32(body) != check:
            return end
        try:
            record = _Record.from_bytes(body)
        except ValueError:
            record = None
        yield record


def _make_own(path: Path) -> None:
    """See that appending to `path` changes no other file: a link goes, a second name is left."""
    if path.is_symlink():
        path.unlink()
    elif path.is_file() and path.stat().st_nlink > 1:
        content = path.read_bytes()
        with replacing(path) as file:
            file.write(content)


def _identity(path: Path, inverted: bool) -> tuple[int, ...] | None:
    """Return size, time of change (ns) and, if read inverted, a mark of a stack that exists.

    What changes while this run reads it is found by `inputs`, before its scores are kept.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # the latter for a zero byte in its name
        return None
    seen(path, found)
    return (found.st_size, found.st_mtime_ns, *([-1] if inverted else []))

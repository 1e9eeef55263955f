"""Scores that are kept in the job's folder, so that no image is scored twice.

A journal of records, each written at once when its images have been scored: a job that is killed
loses what was under way and nothing else. A record names its stack with size and time of change;
the journal's first line names the models. A cut-off or damaged end is dropped.
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
from relion_cryofilter.files import open_input, parse_json
from relion_cryofilter.particles.particles import ParticleSet

NAME, SUFFIX = "score_cache", ".journal"

_FORMAT = 1
_HEAD = struct.Struct("<II")
"""Before each record: its length and checksum."""

log = logging.getLogger("relion_cryofilter")


@dataclass(frozen=True)
class _Record:
    """Scores of images of one stack: 0-based places (k,) and scores (k,)."""

    stack: str
    identity: tuple[int, ...]
    places: np.ndarray
    scores: np.ndarray

    def to_bytes(self) -> bytes:
        about = {"stack": self.stack, "identity": self.identity, "n": len(self.places)}
        body = json.dumps(about).encode() + b"\n"
        body += self.places.astype("<u4").tobytes() + self.scores.astype("<f8").tobytes()
        return _HEAD.pack(len(body), zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, body: bytes) -> _Record:
        """Read what `to_bytes` gave; a ValueError for what is no record."""
        line, _, values = body.partition(b"\n")
        try:
            about = parse_json(line)
            stack, identity = str(about["stack"]), tuple(about["identity"])
            n = bounded(about["n"], 0, len(values) // 12, "n", refuse=ValueError)
        except (KeyError, TypeError) as error:
            raise ValueError("not a record") from error
        places = np.frombuffer(values, "<u4", n).astype(np.int64)
        scores = np.frombuffer(values, "<f8", n, 4 * n)
        return cls(stack, identity, places, scores)


class ScoreCache:
    """The journal of one process of a job; `values` (n,) are the scores known at its start.

    `key` is all that scores depend on besides the images: the models' hashes and how they are
    used. Each process (`number`) writes a journal of its own and reads those of all.
    """

    def __init__(self, folder: Path, key: str, particles: ParticleSet, number: int = 0) -> None:
        self.path = folder / f"{NAME}{f'_{number}' if number else ''}{SUFFIX}"
        self._first_line = json.dumps({"format": _FORMAT, "key": key}).encode() + b"\n"
        self._particles = particles
        inverted = particles.inverted or (False,) * len(particles.stacks)
        self._identities = list(map(_identity, particles.stacks, inverted))
        self._numbers = {name: n for n, name in enumerate(particles.stack_names)}
        self._lock = threading.Lock()
        self.values = self._known(sorted(folder.glob(f"{NAME}*{SUFFIX}")))

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
                records.append(_Record(name, identity, places, scores[part]).to_bytes())
        with self._lock, self.path.open("ab", buffering=0) as file:
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
            index = particles.index[rows]
            table = np.full(min(places.max(initial=0), index.max(initial=0)) + 1, np.nan)
            known, asked = places < len(table), index < len(table)
            table[places[known]] = np.concatenate([record.scores for record in records])[known]
            values[rows[asked]] = table[index[asked]]
        return values

    def _read(self, path: Path) -> Iterator[_Record]:
        """Yield the whole records of a journal; cut our own off where the rest can't be used."""
        with open_input(path, 1 << 20) as file:
            if file.readline(len(self._first_line) + 1) != self._first_line:
                log.info("%s is of other models or options; its scores are not used.", path)
                end = 0
            else:
                end = yield from _whole_records(file)
            size = os.fstat(file.fileno()).st_size
        if 0 < end < size:
            log.warning("The end of %s can't be read; those images are scored again.", path)
        if end < size and path == self.path:
            os.truncate(path, end)


def _whole_records(file: BinaryIO) -> Generator[_Record, None, int]:
    """Yield records up to the first that is cut off or damaged; return where it begins."""
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
            return end
        yield record


def _identity(path: Path, inverted: bool) -> tuple[int, ...] | None:
    """Return size, time of change (ns) and, if read inverted, a mark of a stack that exists."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # the latter for a zero byte in its name
        return None
    return (found.st_size, found.st_mtime_ns, *([-1] if inverted else []))

"""CryoSPARC's .cs datasets and .csg result groups, read and written again whole.

All fields, their types and the order of the uids stay what they were; only the score is added.
Reading and writing are cryosparc-tools' own (https://tools.cryosparc.com); it needs no server.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from relion_cryofilter.data.result_groups import TOOLS, group_text, optional, read_group
from relion_cryofilter.errors import CryoSparcError
from relion_cryofilter.files import replacing

CS_SUFFIXES = (".cs", ".csg")
SCORE_FIELD = "cryofilter/score"
_LONGEST_HEADER = 1 << 30
"""In bytes; numpy alone takes the headers of files with many fields for an attack."""


@dataclass(frozen=True)
class CsFile:
    """One .cs file.

    Attributes
    ----------
    path
        Where it was read from.
    dataset
        Its `cryosparc.dataset.Dataset`.
    dtype
        The types of its records; None if it has CryoSPARC's compressed format.
    """

    path: Path
    dataset: Any
    dtype: np.dtype[Any] | None

    def slots(self) -> list[str]:
        """Return the parts of field names before the ``/``, in file order."""
        names = [name.partition("/")[0] for name in self.dataset.fields(exclude_uid=True)]
        return list(dict.fromkeys(names))

    def with_score(self, values: np.ndarray) -> CsFile:
        """Return a copy with `values` (n,) in the field ``cryofilter/score``, float32."""
        dataset = self.dataset.copy()
        if SCORE_FIELD in dataset:
            dataset.drop_fields([SCORE_FIELD])
        dataset.add_fields([(SCORE_FIELD, "<f4")])
        dataset[SCORE_FIELD] = values.astype(np.float32)
        return replace(self, dataset=dataset)

    def save(self, file: BinaryIO, rows: np.ndarray) -> None:
        """Write the particles of the mask `rows` (n,) in the format that was read."""
        subset = self.dataset.mask(rows)
        if self.dtype is None:
            subset.save(file, format=optional("cryosparc.dataset", TOOLS).CSDAT_FORMAT)
            return
        records = subset.to_records(fixed=True)
        types = [_wider(part, self.dtype) for part in records.dtype.descr]
        np.save(file, np.asarray(records).astype(types), allow_pickle=False)


@dataclass(frozen=True)
class CsTable:
    """Particles of CryoSPARC: a .cs file and the passthrough files that tell more of them.

    Attributes
    ----------
    source
        What was named, a .cs or .csg file.
    main
        The file to which scores are added.
    passthroughs
        Files with other fields of the same particles, brought into the order of `main`.
    slot_types
        CryoSPARC's types of the slots (``particle.blob``) where a result group told them.
    """

    source: Path
    main: CsFile
    passthroughs: tuple[CsFile, ...] = ()
    slot_types: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ".cs"

    def __len__(self) -> int:
        return len(self.main.dataset)

    @property
    def files(self) -> tuple[CsFile, ...]:
        """The main file and the passthroughs."""
        return (self.main, *self.passthroughs)

    def column(self, name: str) -> np.ndarray | None:
        """Return the values (n, …) of a field of any of the files, or None."""
        for file in self.files:
            if name in file.dataset:
                return np.asarray(file.dataset[name])
        return None

    def scores(self) -> np.ndarray:
        """Return the scores (n,) of a file that was scored.

        Raises
        ------
        CryoSparcError
            There are none.
        """
        values = self.column(SCORE_FIELD)
        if values is None:
            raise CryoSparcError(
                f"{self.source}: has no field {SCORE_FIELD}. Give the particles.cs of a score job."
            )
        return np.round(values.astype(float), 6)

    def write(self, subsets: Mapping[Path, np.ndarray], values: np.ndarray | None = None) -> None:
        """Write parts of the table, each as .cs with its passthroughs and a .csg result group.

        Parameters
        ----------
        subsets
            For each .cs file to write, a (n,) mask of the particles to keep.
        values
            (n,) scores to add; None to write the fields as they are. All files appear together.
        """
        scored = self if values is None else replace(self, main=self.main.with_score(values))
        with ExitStack() as stack:
            for path, rows in subsets.items():
                names = part_names(path, len(self.passthroughs))
                for part, name in zip(scored.files, names):
                    part.save(stack.enter_context(replacing(path.with_name(name))), rows)
                group = stack.enter_context(replacing(path.with_suffix(".csg")))
                parts = {name: part.slots() for part, name in zip(self.files, names)}
                text = group_text(path.stem, parts, self.slot_types, int(rows.sum()))
                group.write(text.encode())

    def remove(self, path: Path) -> None:
        """Remove what an earlier `write` made of `path`."""
        for name in part_names(path, len(self.passthroughs)):
            path.with_name(name).unlink(missing_ok=True)
        path.with_suffix(".csg").unlink(missing_ok=True)


def part_names(path: Path, n_passthroughs: int) -> list[str]:
    """Return the names of the .cs file `path` and of the passthroughs that go with it."""
    numbers = ["", *(str(number) for number in range(2, n_passthroughs + 1))][:n_passthroughs]
    return [path.name, *(f"{path.stem}_passthrough{number}.cs" for number in numbers)]


def read_cs(path: Path, passthrough: Path | None = None) -> CsTable:
    """Read a .cs file or a .csg result group.

    Parameters
    ----------
    path
        The file.
    passthrough
        A .cs file with other fields of the same particles. A .csg names its own.

    Raises
    ------
    CryoSparcError
        A file is missing or can't be read, or the uids of the two don't agree.
    """
    main, others = path, [passthrough] if passthrough else []
    types: dict[str, str] = {}
    if path.suffix == ".csg":
        (main, *named), types = read_group(path)
        others = [*named, *others]
    first = load_cs(main)
    if not len(first.dataset):
        raise CryoSparcError(f"{main}: holds no particles, so there is nothing to do.")
    joined = tuple(_in_order_of(first, load_cs(other)) for other in others)
    return CsTable(path, first, joined, types)


def load_cs(path: Path) -> CsFile:
    """Read one .cs file, in either of CryoSPARC's formats.

    Raises
    ------
    CryoSparcError
        It is missing or no CryoSPARC dataset.
    """
    module = optional("cryosparc.dataset", TOOLS)
    try:
        with path.open("rb") as file:
            compressed = file.read(6) == module.FORMAT_MAGIC_PREFIXES[module.CSDAT_FORMAT]
        if compressed:
            dtype, names = None, [item[0] for item in module.Dataset.inspect(path)["dtype"]]
        else:
            dtype = np.load(path, mmap_mode="r", max_header_size=_LONGEST_HEADER).dtype
            names = list(dtype.names or ())
        if "uid" not in names:
            raise ValueError("it has no field uid")
        dataset = module.Dataset.load(path)
    except OSError as error:
        raise CryoSparcError(
            f"{path}: can't be read ({error.strerror or error}). Paths are relative to the working "
            f"directory, {Path.cwd()}."
        ) from error
    except Exception as error:  # cryosparc-tools has one error for everything, and asserts
        raise CryoSparcError(
            f"{path}: can't be read as a CryoSPARC dataset ({error.__cause__ or error}). Give the "
            "particles .cs file of a job, or its .csg result group."
        ) from error
    return CsFile(path, dataset, dtype)


def _in_order_of(main: CsFile, other: CsFile) -> CsFile:
    """Return `other` with one row for each uid of `main`, in that order."""
    wanted, there = (np.asarray(part.dataset["uid"]) for part in (main, other))
    for part, uids in ((main, wanted), (other, there)):
        if len(np.unique(uids)) < len(uids):
            raise CryoSparcError(
                f"{part.path}: {len(uids) - len(np.unique(uids)):,} of its uids stand there twice, "
                "so it can't be joined with a passthrough file. Remove the duplicates."
            )
    order = np.argsort(there)
    place = np.searchsorted(there, wanted, sorter=order).clip(max=max(len(there) - 1, 0))
    found = there[order[place]] == wanted if len(there) else np.zeros(len(wanted), bool)
    if not found.all():
        raise CryoSparcError(
            f"{other.path}: has no row for {(~found).sum():,} of the {len(found):,} particles (by "
            f"uid) of {main.path}. Give the passthrough file of the same job and output."
        )
    return replace(other, dataset=other.dataset.take(order[place]))


def _wider(part: tuple[Any, ...], stored: np.dtype[Any]) -> tuple[Any, ...]:
    """Return the description of a field as it was stored: texts keep their width."""
    name, kind, *shape = part
    if name in (stored.names or ()) and stored[name].kind == "S":
        kind = max(kind, stored[name].str, key=lambda text: int(text[2:]))
    return (name, kind, *shape)

"""CryoSPARC's particle files: .cs datasets and the .csg result groups that name them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

import numpy as np

from relion_cryofilter.errors import CryoFilterError, CryoSparcError, bounded
from relion_cryofilter.files import SCORE_LABEL, remove, replacing
from relion_cryofilter.inputs import open_input, parse_json, seen
from relion_cryofilter.particles.particles import OpticsGroup, ParticleSet, numbered, particle_set
from relion_cryofilter.particles.poses import views_of_poses

log = logging.getLogger("relion_cryofilter")

TOOLS = "cryosparc-tools"
_POSE = "alignments3D/pose"
_CLASSES_3D = ("alignments3D_multi/", "alignments_class3D", "alignments_class_")
CS_SUFFIXES = (".cs", ".csg")
SCORE_FIELD = "cryofilter/score"

_OWN_SLOT = "cryofilter"  # of our score: CryoSPARC has no type for it, so no result lists it
_HERE = ">"  # CryoSPARC's mark before a path: relative to what names it, or to the project's folder
_LONGEST_HEADER = 1 << 18  # bytes; numpy alone takes headers of many fields for an attack
_KINDS = {
    **dict.fromkeys(("blob/path", "location/micrograph_path"), "O"),
    **dict.fromkeys(("blob/idx", "blob/shape", "alignments2D/class"), "iu"),
    **dict.fromkeys(("blob/psize_A", "blob/sign", SCORE_FIELD), "iuf"),
}
"""Of the fields that are read: what numpy's kinds they may be, one value a row."""
_SHAPE = "blob/shape"  # has two values a row
_LARGEST_GROUP = 1 << 16  # bytes of a .csg
_TRIED = 100  # so many stacks are looked for before the project's folder is called unknown


def optional(name: str, package: str) -> ModuleType:
    """Import a module that only CryoSPARC's users need, or say how to get its package."""
    try:
        return import_module(name)
    except ImportError as error:
        raise CryoSparcError(
            f"CryoSPARC's files need {package}, which can't be loaded here ({error}). Install it: "
            f"pip install {package}."
        ) from error


@dataclass(frozen=True)
class CsFile:
    """One .cs file: its path, its `cryosparc.dataset.Dataset`, and the types of its records.

    `dtype` is None if the file has CryoSPARC's compressed format.
    """

    path: Path
    dataset: Any
    dtype: np.dtype[Any] | None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its fields, such as ``blob/path``, without uid."""
        return tuple(self.dataset.fields(exclude_uid=True))

    def slots(self) -> list[str]:
        """Return the parts of field names before the ``/``, in file order."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.labels))

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
        records, types = subset.to_records(fixed=True), []
        for name, kind, *shape in records.dtype.descr:
            # Texts keep the width that they were stored with, unless they became longer.
            if name in (self.dtype.names or ()) and self.dtype[name].kind == "S":
                kind = max(kind, self.dtype[name].str, key=lambda text: int(text[2:]))
            types.append((name, kind, *shape))
        np.save(file, np.asarray(records).astype(types), allow_pickle=False)


@dataclass(frozen=True)
class CsTable:
    """Particles of CryoSPARC: a .cs file and the passthrough files with more of their fields.

    `source` is what was named, a .cs or .csg file; scores are added to `main`, in whose order the
    `passthroughs` are; `slot_types` are those of a result group (``particle.blob``). What is asked
    of it and is not there is refused with a CryoSparcError.
    """

    suffix: ClassVar[str] = ".cs"
    source: Path
    main: CsFile
    passthroughs: tuple[CsFile, ...] = ()
    slot_types: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.main.dataset)

    @property
    def files(self) -> tuple[CsFile, ...]:
        """The main file and the passthroughs."""
        return (self.main, *self.passthroughs)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the fields of all files, such as ``blob/path``."""
        return tuple(dict.fromkeys(name for file in self.files for name in file.labels))

    def place(self, row: int) -> str:
        """Return file and row (0-based), for messages."""
        return f"{self.source}, row {row + 1}"

    def column(self, name: str) -> np.ndarray | None:
        """Return the values (n, …) of a field of any of the files, or None."""
        for file in self.files:
            if name in file.dataset:
                values = np.asarray(file.dataset[name])
                kinds = _KINDS.get(name, values.dtype.kind)
                shape = (2,) if name == _SHAPE else ()
                if values.shape[1:] != shape or values.dtype.kind not in kinds:
                    expected = {"O": "texts", "iu": "whole numbers"}.get(kinds, "numbers")
                    found = f"{values.dtype} of shape {values.shape[1:]}"
                    raise CryoSparcError(
                        f"{file.path}: its field {name} has the type {found}; expected {expected}, "
                        f"{'two' if shape else 'one'} a row. Give the particles .cs file of a job."
                    )
                return values
        return None

    def needed(self, name: str, cure: str) -> np.ndarray:
        """Return the values (n, …) of a field, which must be there; `cure` says what to do."""
        values = self.column(name)
        if values is None:
            there = ", ".join(slot for file in self.files for slot in file.slots())
            raise CryoSparcError(f"{self.source}: has no field {name} (it has {there}). {cure}")
        return values

    def numbers(self, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Return none of RELION's columns: CryoSPARC's fields have other names and units."""
        return {}

    def views(self) -> np.ndarray | None:
        """Return the directions (n, 3) that particles are seen from, None without poses."""
        for file in self.files:
            poses = np.asarray(file.dataset[_POSE]) if _POSE in file.dataset else np.empty(0)
            if poses.shape[1:] == (3,) and poses.dtype.kind == "f":
                return views_of_poses(poses)
        return None

    def scores(self, label: str = SCORE_LABEL) -> np.ndarray:
        """Return the scores (n,), 0 to 1; they are in one field, whatever the `label`."""
        values = self.needed(SCORE_FIELD, "Give the particles.cs of a score job.").astype(float)
        bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if len(bad):
            row = int(bad[0])
            raise CryoSparcError(
                f"{self.place(row)}: {SCORE_FIELD} is {values[row]}; expected a score from 0 to 1. "
                "Give the particles.cs of a score job."
            )
        return np.round(values, 6)

    def classes(self) -> np.ndarray:
        """Return the numbers of the 2D classes, (n,) int64."""
        cure = "Give the particles of a 2D Classification or Select 2D job."
        if any(name.startswith(_CLASSES_3D) for name in self.labels):
            cure = (
                "These are sorted into 3D classes: give the outputs of the good ones as --pos and "
                "those of the others as --neg (particles_class_0.cs and so on)."
            )
        return self.needed("alignments2D/class", cure).astype(np.int64)

    def write(
        self,
        subsets: Mapping[Path, np.ndarray],
        scores: np.ndarray | None = None,
        label: str = SCORE_LABEL,
    ) -> None:
        """Write parts of the table, each as .cs with its passthroughs and a .csg result group.

        As `star.Loop.write`, but scores go to the field ``cryofilter/score``, whatever the label.
        """
        scored = self if scores is None else replace(self, main=self.main.with_score(scores))
        with ExitStack() as stack:
            for path, rows in subsets.items():
                names = _part_names(path, len(self.passthroughs))
                for part, name in zip(scored.files, names):
                    part.save(stack.enter_context(replacing(path.with_name(name))), rows)
                group = stack.enter_context(replacing(path.with_suffix(".csg")))
                group.write(self._group_text(path.stem, names, int(rows.sum())).encode())

    def _group_text(self, name: str, file_names: Sequence[str], count: int) -> str:
        """Return a .csg of `count` particles as CryoSPARC's Import Result Group reads it."""
        results: dict[str, dict[str, Any]] = {}
        for part, file_name in zip(self.files, file_names):
            for slot in part.slots():
                kind = self.slot_types.get(slot, f"particle.{slot}")
                if slot not in results and slot != _OWN_SLOT:
                    file = _HERE + file_name
                    results[slot] = {"metafile": file, "num_items": count, "type": kind}
        title = name.replace("_", " ").capitalize()
        text: str = optional("yaml", "PyYAML").safe_dump({
            "created": datetime.now(timezone.utc).replace(tzinfo=None),
            "group": {"description": "Sorted by relion_cryofilter", "name": name,
                      "title": title, "type": "particle"},
            "results": results,
            "version": f"v{optional('cryosparc', TOOLS).__version__}",
        })  # fmt: skip
        return text

    def remove(self, path: Path) -> None:
        """Remove what an earlier `write` made of `path`."""
        for name in _part_names(path, len(self.passthroughs)):
            remove(path.with_name(name))
        remove(path.with_suffix(".csg"))


def _part_names(path: Path, n_passthroughs: int) -> list[str]:
    """Return the names of the .cs file `path` and of the passthroughs that go with it."""
    numbers = ["", *(str(number) for number in range(2, n_passthroughs + 1))][:n_passthroughs]
    return [path.name, *(f"{path.stem}_passthrough{number}.cs" for number in numbers)]


def read_cs(path: Path, passthrough: Path | None = None) -> CsTable:
    """Read a .cs file or a .csg result group.

    `passthrough` is a .cs file with other fields of the same particles, by their uids. A .csg
    names its own.
    """
    main, others, types = path, [passthrough] if passthrough else [], {}
    if path.suffix == ".csg":
        yaml: Any = optional("yaml", "PyYAML")
        try:
            with open_input(path) as file:
                seen(path, os.fstat(file.fileno()))
                text = file.read(_LARGEST_GROUP + 1)
            bounded(len(text), 0, _LARGEST_GROUP, "its size", refuse=ValueError)
            # All values are texts: dates and numbers are not converted.
            content = yaml.load(text.decode(), Loader=yaml.BaseLoader)
            results = dict(content["results"].items())
            names = list(dict.fromkeys(_text(result["metafile"]) for result in results.values()))
            types = {_text(slot): _text(result["type"]) for slot, result in results.items()}
        except OSError as error:
            raise CryoSparcError(f"{path}: can't be read ({error.strerror}).") from error
        except (
            *(yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError),
        ) as error:
            raise CryoSparcError(
                f"{path}: is not a CryoSPARC result group ({type(error).__name__}: "
                f"{str(error)[:200]}). Give a .csg that lists results with their metafile, or the "
                ".cs file itself."
            ) from error
        if not names:
            raise CryoSparcError(f"{path}: lists no results. Give the .cs file itself.")
        # The main file first; each is beside its group, or below a folder above it.
        names.sort(key=lambda name: "passthrough" in name.rpartition("/")[2])
        files = []
        for name in (name.removeprefix(_HERE) for name in names):
            places = [folder / name for folder in path.resolve().parents]
            files.append(next(filter(os.path.isfile, places), path.parent / name))
        main, others = files[0], [*files[1:], *others]
    first = load_cs(main)
    if not len(first.dataset):
        raise CryoSparcError(f"{main}: holds no particles, so there is nothing to do.")
    joined = tuple(_in_order_of(first, load_cs(other)) for other in others)
    return CsTable(path, first, joined, types)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a value is not text")
    return value


def load_cs(path: Path) -> CsFile:
    """Read one .cs file, in either of CryoSPARC's formats."""
    module = optional("cryosparc.dataset", TOOLS)
    dtype = None
    try:
        with open_input(path) as file:
            seen(path, os.fstat(file.fileno()))
            if file.read(6) == module.FORMAT_MAGIC_PREFIXES[module.CSDAT_FORMAT]:
                dataset = module.Dataset(_read_compressed(file, module.Stream))
            else:
                # Numpy checks that the file holds what the header says.
                _check_numpy_header(file)
                dtype = np.load(path, mmap_mode="r", max_header_size=_LONGEST_HEADER).dtype
                if dtype["uid"] != np.uint64:
                    raise ValueError("its field uid is none")
                dataset = module.Dataset.load(path)
    except OSError as error:
        raise CryoSparcError(
            f"{path}: can't be read ({error.strerror or error}). Paths are relative to the working "
            f"directory, {Path.cwd()}."
        ) from error
    except CryoFilterError:
        raise
    except Exception as error:  # cryosparc-tools has one error for everything, and asserts
        found = str(error.__cause__ or error)[:200]
        raise CryoSparcError(
            f"{path}: can't be read as a CryoSPARC dataset ({found}). Give the particles .cs file "
            "of a job, or its .csg result group."
        ) from error
    return CsFile(path, dataset, dtype)


def _check_numpy_header(file: BinaryIO) -> None:
    """Raise a ValueError if the header of an .npy file is longer than that of any dataset."""
    file.seek(6)
    version = file.read(2)
    length = int.from_bytes(file.read(2 if version[:1] == b"\1" else 4), "little")
    bounded(length, 0, _LONGEST_HEADER, "the length of its header", refuse=ValueError)


def _read_compressed(file: BinaryIO, stream: Any) -> dict[str, np.ndarray]:
    """Return the fields of a dataset in CryoSPARC's compressed format, behind its first 6 bytes.

    Not read with ``Dataset.load``: it goes wherever the texts' places point in memory, and one
    damaged file in two ends the process. A ValueError says what is wrong.

    After a header in JSON, each column is a length and that many bytes, plain or an LZ4 block;
    texts are places in a heap at the end, where each ends with a zero.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(4), "little")
    bounded(length, 2, _LONGEST_HEADER, "the length of its header", refuse=ValueError)
    header = parse_json(file.read(length))
    n = bounded(header["length"], 0, size // 8, "its number of particles", refuse=ValueError)
    packed, columns = set(header["compressed_fields"]), dict[str, np.ndarray]()
    for name, kind, *shape in header["dtype"]:
        width = np.dtype("<u8" if kind == "|O" else (_text(kind), tuple(*shape)))
        if width.hasobject or not width.itemsize:
            raise ValueError(f"its field {name} is of the type {kind}")
        stored = int.from_bytes(file.read(4), "little") if n else 0
        bounded(stored, 0, size - file.tell(), f"the length of {name}", refuse=ValueError)
        content = file.read(stored)
        if n and name in packed:  # 255 is the most that LZ4 can do
            bounded(n * width.itemsize, 1, 255 * stored, f"the size of {name}", refuse=ValueError)
            column = np.empty(n * width.itemsize, np.uint8)
            if len(stream(None).decompress_numpy(content, column)) != len(column):
                raise ValueError(f"its field {name} is cut off")
            content = column.tobytes()
        columns[name] = np.frombuffer(content, width)
        if len(columns[name]) != n:
            raise ValueError(f"its field {name} has {len(columns[name])} rows of {n}")
    heap = file.read()
    for name, kind, *_ in header["dtype"]:
        if kind == "|O":
            places, of_rows = np.unique(columns[name], return_inverse=True)
            bounded(
                int(places.max(initial=0)),
                0,
                max(len(heap) - 1, 0),
                f"a text's place in {name}",
                refuse=ValueError,
            )
            texts = [heap[k : heap.index(b"\0", k)].decode() for k in places.tolist()]
            columns[name] = np.array([*texts, ""], object)[of_rows]
    if columns["uid"].dtype != np.uint64:
        raise ValueError("its field uid is none")
    return columns


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


def particles_of_cs(table: CsTable, project: Path | None = None) -> ParticleSet:
    """Return the images, micrographs and pixel sizes that a CryoSPARC table names.

    ``blob/sign`` is -1 where protein is dark in the stored images, as in micrographs. Those
    images are contrast-inverted when read: the networks want protein white.
    """
    cure = (
        "Name the file that has it: --passthrough J12_passthrough_particles.cs, or give the .csg "
        "result group, which names both."
    )
    paths = table.needed("blob/path", cure)
    names, stack_of = numbered(str(text).removeprefix(_HERE) for text in paths)
    for number, name in enumerate(names):
        if not name.strip():
            row = int(np.argmax(stack_of == number))
            raise CryoSparcError(
                f"{table.place(row)}: blob/path is empty; expected the path of an image stack. "
                f"{(stack_of == number).sum():,} particles have none: remove them in CryoSPARC "
                "(Particle Sets Tool), or export them again."
            )
    # A stack that holds images of both signs is two.
    sign = table.column("blob/sign")
    dark = np.zeros(len(table), bool) if sign is None else sign < 0
    keys, stack_of = np.unique(2 * stack_of + dark, return_inverse=True)
    stacks = [names[key // 2] for key in keys.tolist()]
    inverted = (keys % 2 == 1).tolist()
    if any(inverted):
        log.info("Protein is dark in %d stack(s) (blob/sign -1); contrast inverted.", sum(inverted))
    location = table.column("location/micrograph_path")
    micrographs = None if location is None else numbered(location)
    # One optics group for each pixel size and box.
    sizes, shapes = table.column("blob/psize_A"), table.column(_SHAPE)
    size, size_of = np.unique(np.zeros(len(table)) if sizes is None else sizes, return_inverse=True)
    boxes = np.zeros(len(table)) if shapes is None else shapes[:, -1]
    box, box_of = np.unique(boxes, return_inverse=True)
    kinds, optics_of = np.unique(size_of * len(box) + box_of, return_inverse=True)
    both = [(size[kind // len(box)], box[kind % len(box)]) for kind in kinds.tolist()]
    known = [[float(value) if value > 0 else None for value in kind] for kind in both]
    optics = [OpticsGroup(str(n), *kind) for n, kind in enumerate(known, 1)], optics_of
    root, index = _project_of(table.source, names, project), table.needed("blob/idx", cure)
    return particle_set(
        table.source, root, (stacks, stack_of), index, micrographs, optics, inverted, table
    )


def _project_of(source: Path, names: Sequence[str], project: Path | None) -> Path:
    """Return the project's folder: the named one, or the nearest above `source` with the stacks."""
    folders = (project,) if project else (*source.resolve().parents, Path.cwd())
    for name in names[:_TRIED]:
        for folder in folders:
            if os.path.isfile(folder / name):  # noqa: PTH113 - False for names of any length
                return folder
    where = f"not in the project's folder {project}" if project else "in none of the folders above"
    cure = "Check that this is" if project else "Name with --project_dir the folder of"
    raise CryoSparcError(
        f"{source}: its image stack {names[0]} is {where}. {cure} its CryoSPARC project, and check "
        "that links to imported stacks are not broken."
    )

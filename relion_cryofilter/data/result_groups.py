"""CryoSPARC's .csg result groups: which .cs files hold which results of the same particles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from relion_cryofilter.errors import CryoSparcError

TOOLS = "cryosparc-tools"
OWN_SLOT = "cryofilter"
"""The slot of our score, for which CryoSPARC has no type: it is not listed among the results."""

HERE = ">"
"""CryoSPARC's mark before a path: relative to what names it, or to the project's folder."""


def group_text(
    name: str, parts: Mapping[str, Sequence[str]], types: Mapping[str, str], count: int
) -> str:
    """Return a .csg as CryoSPARC's Import Result Group reads it.

    Parameters
    ----------
    name
        Name of the group.
    parts
        The slots (``blob``, ``ctf``) in each .cs file beside the group; the first one counts.
    types
        CryoSPARC's types of slots; ``particle.`` and the slot where not given.
    count
        Number of particles.
    """
    results: dict[str, dict[str, Any]] = {}
    for file_name, slots in parts.items():
        for slot in slots:
            kind = types.get(slot, f"particle.{slot}")
            if slot not in results and slot != OWN_SLOT:
                where = HERE + file_name
                results[slot] = {"metafile": where, "num_items": count, "type": kind}
    title = name.replace("_", " ").capitalize()
    text: str = _yaml().safe_dump({
        "created": datetime.now(timezone.utc).replace(tzinfo=None),
        "group": {"description": "Sorted by relion_cryofilter", "name": name,
                  "title": title, "type": "particle"},
        "results": results,
        "version": f"v{optional('cryosparc', TOOLS).__version__}",
    })  # fmt: skip
    return text


def read_group(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the .cs files that a .csg names, the main one first, and the types of its slots.

    Raises
    ------
    CryoSparcError
        It is missing or no result group.
    """
    try:
        content = _yaml().safe_load(path.read_text())
        results = dict(content["results"].items())
        names = list(dict.fromkeys(str(result["metafile"]) for result in results.values()))
        types = {slot: str(result["type"]) for slot, result in results.items()}
    except OSError as error:
        raise CryoSparcError(f"{path}: can't be read ({error.strerror}).") from error
    except (_yaml().YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise CryoSparcError(
            f"{path}: is not a CryoSPARC result group ({type(error).__name__}: {error}). Give a "
            ".csg that lists results with their metafile, or the .cs file itself."
        ) from error
    if not names:
        raise CryoSparcError(f"{path}: lists no results. Give the .cs file itself.")
    names.sort(key=lambda name: "passthrough" in name.rpartition("/")[2])
    return [_beside(path, name) for name in names], types


def _beside(group: Path, name: str) -> Path:
    """Return where a metafile of a group is: beside it, or below a folder above it."""
    plain = name.removeprefix(HERE)
    for folder in folders_above(group):
        if (folder / plain).is_file():
            return folder / plain
    return group.parent / plain


def folders_above(path: Path) -> Iterator[Path]:
    """Yield the folder of `path` and all folders above it."""
    yield from path.resolve().parents


def _yaml() -> Any:
    return optional("yaml", "PyYAML")


def optional(name: str, package: str) -> ModuleType:
    """Import a module that only CryoSPARC's users need, or say how to get its package."""
    try:
        return import_module(name)
    except ImportError as error:
        raise CryoSparcError(
            f"CryoSPARC's files need {package}, which can't be loaded here ({error}). Install it: "
            "pip install 'relion_cryofilter[cryosparc]'."
        ) from error

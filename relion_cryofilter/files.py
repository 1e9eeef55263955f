"""Writing files so that nothing is ever found half written, and reading tables back."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends well.

    Parameters
    ----------
    path
        The file to make or to replace. Its folder must exist.

    Yields
    ------
    BinaryIO
        The temporary file, open for writing. After an exception it is deleted and `path` is
        left as it was.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
            yield file
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8; bytes of odd file names as they were) to `path` through `replacing`."""
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table whose first line names its columns."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))

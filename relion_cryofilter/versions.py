"""Which versions made a result."""

from __future__ import annotations

import platform
from importlib.metadata import version

import relion_cryofilter


def versions(*more: str) -> dict[str, str]:
    """Return versions by name: this package's, Python's, torch's, numpy's and `more`."""
    packages = {name: version(name) for name in ("torch", "numpy", *more)}
    own = {"relion_cryofilter": relion_cryofilter.__version__}
    return {**own, "python": platform.python_version(), **packages}

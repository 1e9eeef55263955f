"""What to do about errors of the environment: packages that are missing, foreign or old, memory.

Only the standard library is imported: the packages may be what is broken.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from relion_cryofilter.errors import CryoFilterError

_SEARCH_PATHS = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
_OWN = str(Path(__file__).resolve().parents[1])
_OUT_OF_MEMORY = re.compile(
    r"out of memory|cannot allocate|can't allocate|unable to allocate|not enough memory|bad_alloc|"
    r"failed to map segment|allocat\w* failed|alloc_failed|failed to allocate|DefaultCPUAllocator|"
    r"can't start new thread|could not create a (?:primitive|memory)",
    re.IGNORECASE,
)


def advice_on(error: BaseException) -> str:
    """Return what to do about an error of the environment; "" for all others."""
    if isinstance(error, CryoFilterError):
        return ""
    if _is_of_memory(error):
        return (
            f"out of memory ({str(error) or type(error).__name__}). Give the job more memory, or "
            "let it need less: fewer threads (--j), a smaller --batch_size; train: --max_memory."
        )
    top = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and top not in sys.modules:
        return (
            f"This Python ({sys.executable}) has no {error.name}. Install relion_cryofilter with "
            "its requirements (in the folder of its README: pip install .), or name the "
            "interpreter of the environment that has them: /path/to/env/bin/python external_job.py"
        )
    if not _is_of_packages(error):
        return ""
    foreign = [f"{name}={os.environ[name]}" for name in _SEARCH_PATHS if os.environ.get(name)]
    cause = f" {' and '.join(foreign)} may bring in another program's files." if foreign else ""
    kind = "" if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: "
    return (
        f"A package of this Python ({sys.executable}) can't be loaded: {kind}{error}.{cause} Start "
        "the job with /path/to/env/bin/python -E external_job.py (-E ignores PYTHONPATH), or "
        "install the packages again."
    )


def _is_of_memory(error: BaseException) -> bool:
    """Tell whether memory, or what the system allows of it, has run out."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    kinds = (RuntimeError, ImportError, OSError, SystemError)
    return isinstance(error, kinds) and _OUT_OF_MEMORY.search(str(error)) is not None


def _is_of_packages(error: BaseException) -> bool:
    """Tell whether a package of others can't be loaded, or is not the one that is needed."""
    if isinstance(error, ImportError):
        return not _is_own(error.name)
    if isinstance(error, OSError):
        return ".so" in str(error)
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return not _is_own(error.obj.__name__)  # an old numpy or torch, or a file of that name
    # Whatever else goes wrong in the code of others while it is imported.
    if isinstance(error, SyntaxError):
        return not str(error.filename).startswith(_OWN)
    frames = _frames(error.__traceback__)
    own = [place for place, (file, _) in enumerate(frames) if file.startswith(_OWN)]
    return any(name == "<module>" for _, name in frames[own[-1] + 1 :]) if own else False


def _is_own(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "relion_cryofilter"


def _frames(trace: TracebackType | None) -> list[tuple[str, str]]:
    """Return source file and function of each frame, the innermost last."""
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, code.co_name))
        trace = trace.tb_next
    return frames

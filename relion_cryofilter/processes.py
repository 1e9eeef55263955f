"""Which of several processes runs here, how they split one job, and which versions they run.

``torchrun --nproc-per-node 4 …`` or ``srun … relion_cryofilter …`` start one program many times;
the first process merges what all have found, writes the results and talks to RELION.

Only the standard library is imported here: the job's guard asks before anything heavy is loaded.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relion_cryofilter.errors import UsageError, bounded

if TYPE_CHECKING:
    import numpy as np
    import torch

__version__ = "0.1.0"

WAIT_S = 300
"""So long processes wait for each other to start."""

_ANNOUNCED = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
_MOST_PROCESSES = 100_000
_SILENCE_S = 10

log = logging.getLogger("relion_cryofilter")


def process_number() -> int:
    """Return this process's number, 0 for the only or the first one."""
    return _numbers()[0]


def process_count() -> int:
    """Return how many processes work on this job together."""
    return _numbers()[1]


def local_count() -> int:
    """Return how many processes of this job share the cores that this one may use."""
    return _variable("LOCAL_WORLD_SIZE", 1, 1)


def _numbers() -> tuple[int, int]:
    """Read what torchrun sets, or srun; a batch script's own shell has no step's task count."""
    for number, count in _ANNOUNCED:
        if os.environ.get(number) and os.environ.get(count):
            n = _variable(count, 1, 1)
            return _variable(number, 0, 0, n - 1), n
    return 0, 1


def _variable(name: str, default: int, low: int, high: int = _MOST_PROCESSES) -> int:
    """Return the number in an environment variable; a UsageError if there is another thing."""
    text = os.environ.get(name) or str(default)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else text
    what = f"The environment variable {name}"
    cure = f"Start the processes with torchrun or srun, or unset {name}."
    return bounded(number, low, high, what, cure, UsageError)


@dataclass(frozen=True)
class Ranks:
    """The number of a process among `count`, and what they do together (torch.distributed)."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.number == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """Return this process's part of `rows`, one run of neighbours."""
        import numpy as np

        return np.array_split(rows, self.count)[self.number]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes to the first, [] to the others."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values = [None] * self.count if self.first else None
        distributed.gather_object(value, values)
        return values or []

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    def device(self, devices: list[torch.device]) -> list[torch.device]:
        """Return the one of `devices` that is this process's; all of them to a single process."""
        if self.count == 1:
            return devices
        on_machine = _variable("LOCAL_RANK", _variable("SLURM_LOCALID", 0, 0), 0)
        return [devices[on_machine % len(devices)]]


ALONE = Ranks()


def join_ranks() -> Ranks:
    """Meet the other processes of this job, if it was started as several.

    Raises
    ------
    UsageError
        Where they should meet is not known, or they did not come.
    """
    ranks = Ranks(process_number(), process_count())
    if ranks.count > 1:
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            if "MASTER_ADDR" not in os.environ:
                os.environ.update(_meeting_point_of_slurm())
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(
                backend, store=_meet(ranks), rank=ranks.number, world_size=ranks.count
            )
    return ranks


def _meet(ranks: Ranks) -> Any:
    """Return the store of torch.distributed in which all processes have met, or a UsageError.

    The meeting is another thread's, so that signals are heard meanwhile.
    """
    from torch.distributed.rendezvous import rendezvous

    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    announced = next(names for names in _ANNOUNCED if all(map(os.environ.get, names)))
    cure = f"If this job should run alone, unset {' and '.join(announced)} before it is started."
    waiting = (
        f"Process {ranks.number + 1} of {ranks.count} (by {' and '.join(announced)}) waits up to "
        f"{WAIT_S} s for the others at {where}. {cure}"
    )
    log.info("%s", waiting)
    found: list[Any] = []

    def meet() -> None:
        try:
            patience = timedelta(seconds=WAIT_S)
            store = next(rendezvous("env://", ranks.number, ranks.count, timeout=patience))[0]
            store.set(f"here{ranks.number}", "")
            store.wait([f"here{number}" for number in range(ranks.count)], patience)
            store.set_timeout(timedelta(minutes=30))  # torch's own
            found.append(store)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(_SILENCE_S)
    if not found and not ranks.first:  # whose log has errors only
        log.error("%s", waiting)
    thread.join(2 * WAIT_S)
    store = found[0] if found else "no answer"
    if not found or isinstance(store, Exception):
        reason = str(store).splitlines()[0] if str(store) else type(store).__name__
        raise UsageError(
            f"Process {ranks.number + 1} of {ranks.count} did not meet the others at {where} "
            f"({reason}). Start all of them with torchrun or srun. {cure}"
        )
    return store


def leave_ranks() -> None:
    """Wait until all processes are done, then part; an end without it takes the others along."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _meeting_point_of_slurm() -> dict[str, str]:
    """Return the first node of a Slurm job, and a port that other jobs hardly use."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or _first_node(nodes)
    if not address:
        raise UsageError(
            "Several processes were started, but neither MASTER_ADDR nor Slurm's node list says "
            "where they meet. Start them with torchrun or srun."
        )
    port = 20_000 + _variable("SLURM_JOB_ID", 0, 0, 2**32) % 20_000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _first_node(nodes: str) -> str:
    """Return ``n012`` for ``n[012-014,020],m1``."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else ""


def memory_left() -> float:
    """Return how many bytes the limits ``ulimit -v`` and ``-d`` leave this process; inf if none."""
    import resource

    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:  # only Linux tells
        return float("inf")
    used = {resource.RLIMIT_AS: int(fields[0]), resource.RLIMIT_DATA: int(fields[5])}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    page = resource.getpagesize()
    return min(
        float("inf") if limit == resource.RLIM_INFINITY else float(limit - used[kind] * page)
        for kind, limit in limits.items()
    )


def need_memory(n_bytes: float, what: str) -> None:
    """Raise a MemoryError if a memory limit leaves less than `n_bytes` for `what`.

    Asked before libraries are loaded: where one of them gets no memory it may crash, or wait for
    some for ever (OpenBLAS).
    """
    left = memory_left()
    if left < n_bytes:
        raise MemoryError(
            f"The memory limit of this process (ulimit -v or -d) leaves {left / 1e9:.1f} GB, and "
            f"{what} needs about {n_bytes / 1e9:.1f} GB. Ask the queue for more memory"
        )


def versions(*more: str) -> dict[str, str]:
    """Return versions by name: this package's, Python's, torch's, numpy's and `more`."""
    from importlib.metadata import version  # slow to import

    packages = {name: version(name) for name in ("torch", "numpy", *more)}
    own = {"relion_cryofilter": __version__}
    return {**own, "python": platform.python_version(), **packages}

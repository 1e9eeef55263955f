"""Which of several processes runs here, how they split one job, and which versions they run.

``torchrun --nproc-per-node 4 …`` or ``srun … relion_cryofilter …`` start one program many times;
the first process merges what all have found, writes the results and talks to RELION.

Only the standard library is imported here: the job's guard asks before anything heavy is loaded.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relion_cryofilter.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

__version__ = "0.1.0"


def process_number() -> int:
    """Return this process's number, 0 for the only or the first one."""
    return _numbers()[0]


def process_count() -> int:
    """Return how many processes work on this job together."""
    return _numbers()[1]


def local_count() -> int:
    """Return how many processes of this job share the cores that this one may use."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _numbers() -> tuple[int, int]:
    """Read what torchrun sets, or srun; a batch script's own shell has no step's task count."""
    for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(number) and os.environ.get(count):
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


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
        on_machine = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        return [devices[on_machine % len(devices)]]


ALONE = Ranks()


def join_ranks() -> Ranks:
    """Meet the other processes of this job, if it was started as several.

    Raises
    ------
    UsageError
        srun started the processes, but where they should meet is not known.
    """
    ranks = Ranks(process_number(), process_count())
    if ranks.count > 1:
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            if "MASTER_ADDR" not in os.environ:
                os.environ.update(_meeting_point_of_slurm())
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, rank=ranks.number, world_size=ranks.count)
    return ranks


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
    port = 20_000 + int(os.environ.get("SLURM_JOB_ID") or 0) % 20_000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _first_node(nodes: str) -> str:
    """Return ``n012`` for ``n[012-014,020],m1``."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else ""


def versions(*more: str) -> dict[str, str]:
    """Return versions by name: this package's, Python's, torch's, numpy's and `more`."""
    from importlib.metadata import version  # slow to import

    packages = {name: version(name) for name in ("torch", "numpy", *more)}
    own = {"relion_cryofilter": __version__}
    return {**own, "python": platform.python_version(), **packages}

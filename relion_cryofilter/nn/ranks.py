"""Several processes, on one machine or many, that share out one job (torch.distributed).

``torchrun --nproc-per-node 4 …`` or ``srun … relion_cryofilter …`` start them; the first merges
what all have found, writes the results and talks to RELION.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from relion_cryofilter.errors import UsageError
from relion_cryofilter.processes import local_number, process_count, process_number

_PORTS = (20_000, 20_000)


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.number == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """Return this process's part of `rows`, one run of neighbours."""
        return np.array_split(rows, self.count)[self.number]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes to the first, [] to the others."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.first else None
        distributed.gather_object(value, values)
        return values or []

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def device(self, devices: list[torch.device]) -> list[torch.device]:
        """Return the one of `devices` that is this process's; all of them to a single process."""
        if self.count == 1:
            return devices
        return [devices[local_number() % len(devices)]]


ALONE = Ranks()


def join_ranks() -> Ranks:
    """Meet the other processes of this job, if it was started as several.

    Raises
    ------
    UsageError
        srun started the processes, but where they should meet is not known.
    """
    ranks = Ranks(process_number(), process_count())
    if ranks.count > 1 and not distributed.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            os.environ.update(_meeting_point_of_slurm())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, rank=ranks.number, world_size=ranks.count)
    return ranks


def leave_ranks() -> None:
    """Wait until all processes are done, then part; an end without it takes the others along."""
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
    first, several = _PORTS
    port = first + int(os.environ.get("SLURM_JOB_ID") or 0) % several
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _first_node(nodes: str) -> str:
    """Return ``n012`` for ``n[012-014,020],m1``."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else ""

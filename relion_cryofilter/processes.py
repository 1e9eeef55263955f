"""Which of several processes this is: torchrun and srun start one program many times.

Only the standard library: the job's guard asks before anything heavy is imported.
"""

from __future__ import annotations

import os


def process_number() -> int:
    """Return this process's number, 0 for the only or the first one."""
    return _numbers()[0]


def process_count() -> int:
    """Return how many processes work on this job together."""
    return _numbers()[1]


def local_number() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def local_count() -> int:
    """Return how many processes of this job share the cores that this one may use."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _numbers() -> tuple[int, int]:
    """Read what torchrun sets, or srun; a batch script's own shell has no step's task count."""
    for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(number) and os.environ.get(count):
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1

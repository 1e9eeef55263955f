"""Where networks run: the processor, or the GPUs that the user names."""

from __future__ import annotations

import logging

import torch

from relion_cryofilter.errors import UsageError
from relion_cryofilter.wording import counted

log = logging.getLogger("relion_cryofilter")

CPU = torch.device("cpu")


def choose_devices(gpus: list[int] | None) -> list[torch.device]:
    """Return the devices to use.

    Parameters
    ----------
    gpus
        GPU numbers; [] for the processor, None for every GPU there is.

    Raises
    ------
    UsageError
        A GPU is asked for by a number that this machine doesn't have.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == []:
        if present:
            log.info("This machine has %s; --gpu 0 would use the first.", counted(present, "GPU"))
        return [CPU]
    if not present:
        log.warning("--gpu was given, but torch sees no CUDA GPU here; using the processor.")
        return [CPU]
    numbers = list(range(present)) if gpus is None else gpus
    absent = [number for number in numbers if number >= present]
    if absent:
        raise UsageError(
            f"--gpu asks for GPU {absent[0]}, but there are {present} (0 to {present - 1})."
        )
    return [torch.device("cuda", number) for number in numbers]

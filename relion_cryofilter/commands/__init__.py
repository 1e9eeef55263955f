"""The recipes: what each mode does, from the input to the results, top to bottom.

Each mode has a module of its name with a function of its name, loaded when it is asked for, so
that `select` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from relion_cryofilter.processes import process_count


@dataclass(frozen=True)
class Output:
    """A result that the next RELION job can use.

    Attributes
    ----------
    file_name
        Its name in the job's folder.
    kind
        ``particles`` or ``log``.
    """

    file_name: str
    kind: str


def run(mode: str, options: Any, abort_requested: Callable[[], bool]) -> tuple[Output, ...]:
    """Run the recipe of `mode`."""
    recipe = getattr(import_module(f"{__name__}.{mode}"), mode)
    outputs: tuple[Output, ...] = recipe(options, abort_requested)
    if process_count() > 1:
        import_module("relion_cryofilter.nn.ranks").leave_ranks()
    return outputs

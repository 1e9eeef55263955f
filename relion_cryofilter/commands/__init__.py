"""The recipes: what each mode does, from the input to the results, top to bottom.

Each mode has a module of its name with a function of its name, loaded when it is asked for, so
that `select` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from relion_cryofilter.processes import join_ranks, leave_ranks, process_count, process_number
from relion_cryofilter.results.outputs import Output


def run(mode: str, options: Any, abort_requested: Callable[[], bool]) -> tuple[Output, ...]:
    """Run the recipe of `mode`."""
    if mode != "score" and process_count() > 1:  # they split the images for scoring only
        join_ranks()
        leave_ranks()
        if process_number():
            return ()
    recipe = getattr(import_module(f"{__name__}.{mode}"), mode)
    outputs: tuple[Output, ...] = recipe(options, abort_requested)
    if process_count() > 1:
        leave_ranks()
    return outputs

"""The recipes: what each mode does, from the input to the results, top to bottom.

Each mode has a module of its name with a function of its name, loaded when it is asked for, so
that `select` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from relion_cryofilter.processes import (
    join_ranks,
    leave_ranks,
    need_memory,
    process_count,
    process_number,
)

if TYPE_CHECKING:
    from relion_cryofilter.results.outputs import Output

_SCORING_BYTES, _TRAINING_BYTES = 0.6e9, 1.8e9
_NEEDED_BYTES = {
    **dict.fromkeys(("score", "convert"), _SCORING_BYTES),
    **dict.fromkeys(("train", "metrics", "demo", "cryosparc"), _TRAINING_BYTES),
}
"""Address space that the libraries of a mode take."""


def run(mode: str, options: Any, abort_requested: Callable[[], bool]) -> tuple[Output, ...]:
    """Run the recipe of `mode`."""
    need_memory(_NEEDED_BYTES.get(mode, 0), mode)
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

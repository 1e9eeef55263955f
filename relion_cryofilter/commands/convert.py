"""``convert``: Keras weights of the 2020 program in, a model file out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from relion_cryofilter.errors import UsageError
from relion_cryofilter.locks import one_run
from relion_cryofilter.nn.model import import_keras
from relion_cryofilter.options import ConvertOptions
from relion_cryofilter.results.outputs import Output, refuse_to_overwrite

log = logging.getLogger("relion_cryofilter")


@one_run()
def convert(
    options: ConvertOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Turn Keras weights into a model file.

    Raises
    ------
    CryoFilterError
        The file is not one of the 2020 program.
    """
    if options.weights is None or options.o is None:
        raise UsageError("Give both: relion_cryofilter convert weights.h5 --o model.safetensors")
    refuse_to_overwrite([options.weights], [options.o], "model")
    model = import_keras(options.weights, f=options.f, dim=options.img_dim)
    options.o.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.o)
    log.info(
        "Wrote %s: network %s, %d px, hash %s",
        options.o, model.network.name, model.network.dim, model.hash,
    )  # fmt: skip
    return ()

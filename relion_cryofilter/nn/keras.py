"""Import of Keras .h5 files: the weights and models that the 2020 program wrote.

h5py is imported here only, and only when a file is imported.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from relion_cryofilter.errors import ModelError, bounded
from relion_cryofilter.images.preprocess import BlurResize
from relion_cryofilter.inputs import open_input, parse_json, seen
from relion_cryofilter.nn.networks import Network, build_network
from relion_cryofilter.options import LARGEST_DIM, MOST_FILTERS

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
DEFAULT_DIM = 28
"""Image size (px) of the 2020 program, unless it was told otherwise."""
CONVOLUTIONS_PER_TOWER, TOWERS = 6, {1: "straight", 2: "roberts"}

LARGEST_FILE, MOST_ITEMS, MOST_WEIGHTS = 1 << 30, 1000, 10_000_000
"""Bytes of a file, items in it, and numbers in one; the largest network has 4 million in one."""

Layer = tuple[Tensor, Tensor]
"""Kernel and bias as Keras keeps them."""


def require_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a file; raise ModelError if not."""
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path} is a folder; expected a model file (.safetensors or .h5).")
    if not path.is_file():
        raise ModelError(
            f"Model file {path} doesn't exist. Check the path; it is relative to {Path.cwd()}."
        )
    seen(path, path.stat())
    return path


def is_keras(path: Path) -> bool:
    """Tell whether a file is Keras's, by its first bytes or its name."""
    with open_input(path) as file:
        signed = file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE
    return signed or path.suffix.lower() in (".h5", ".hdf5")


def read_keras(
    path: Path, *, network: str | None = None, f: int | None = None, dim: int | None = None
) -> tuple[Network, BlurResize]:
    """Read network and preprocessing of a Keras .h5 file.

    Network and filters follow from the layers' shapes. The image size is read from the model's
    configuration where the file has one; else it is `dim`, or 28 px, if the dense layer agrees.
    A ModelError says if h5py is missing, if the file is none of the 2020 networks, or if it
    disagrees with what the caller believes of `network`, `f` and `dim`.
    """
    convolutions, (kernel, bias), configured = _read_layers(path)

    # Network and filters, from the convolutions.
    towers, rest = divmod(len(convolutions), CONVOLUTIONS_PER_TOWER)
    if rest or towers not in TOWERS:
        raise _not_ours(path, f"{len(convolutions)} convolutions")
    name = TOWERS[towers]
    filters = int(convolutions[0][0].shape[3])
    bounded(filters, 1, MOST_FILTERS, f"{path}: the number of filters", refuse=ModelError)
    for number, layer in enumerate(convolutions):
        expected = (3, 3, filters if number % CONVOLUTIONS_PER_TOWER else 1, filters)
        if tuple(layer[0].shape) != expected or tuple(layer[1].shape) != (filters,):
            found = f"convolution {number + 1} with a kernel of {tuple(layer[0].shape)}"
            raise _not_ours(path, f"{found} instead of {expected}")
    _check_belief(path, "network", found=name, believed=network)
    _check_belief(path, "f", found=filters, believed=f)

    # The image size: after three poolings, eight possible sizes give the dense layer's inputs.
    inputs, outputs = kernel.shape
    side = math.isqrt(inputs // (towers * filters))
    if outputs != 1 or side < 1 or side * side * towers * filters != inputs:
        raise _not_ours(path, f"a dense layer of {inputs} x {outputs}")
    if tuple(bias.shape) != (1,):
        raise _not_ours(path, f"a dense layer with a bias of {tuple(bias.shape)}")
    if configured is not None:
        _check_belief(path, "image size", found=configured, believed=dim)
    dim = configured or dim or DEFAULT_DIM
    if dim // 8 != side:
        raise ModelError(
            f"{path}: the dense layer fits image sizes of {8 * side} to {8 * side + 7} px, not "
            f"{dim}. Give the image size that the network was trained with (--img_dim)."
        )

    # The weights: kernels (height, width, in, out) become (out, in, height, width).
    built = build_network(name, f=filters, dim=dim)
    ours = [module for module in built.modules() if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for module, layer in zip(ours, convolutions, strict=True):
            module.weight.copy_(layer[0].permute(3, 2, 0, 1))
            cast(Tensor, module.bias).copy_(layer[1])
        built.head.weight.copy_(kernel.t())
        built.head.bias.copy_(bias)
    return built, BlurResize(dim=dim, roberts=name == "roberts")


def _read_layers(path: Path) -> tuple[list[Layer], Layer, int | None]:
    """Return the convolutions in the order they were built, the dense layer and the image size.

    Weights are kept like ``conv2d_3/conv2d_3/kernel:0``, under ``model_weights`` in a whole model.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ModelError(
            "Reading Keras .h5 files needs h5py, which can't be imported. "
            "Install it with: pip install h5py"
        ) from error
    found: dict[str, dict[str, np.ndarray]] = {}
    names: list[str] = []

    def collect(name: str, item: Any) -> None:
        bounded(len(names), 0, MOST_ITEMS, "the number of items", refuse=ValueError)
        names.append(name)
        if isinstance(item, h5py.Dataset):
            # What it is, before any of it is read: storage that is not there costs nothing.
            if item.shape is None or item.dtype.kind not in "fiu" or item.dtype.itemsize > 8:
                raise ValueError(f"{name} holds no numbers but data of type {item.dtype}")
            bounded(math.prod(item.shape), 0, MOST_WEIGHTS, f"the size of {name}", "", ValueError)
            layer, _, part = name.rpartition("/")
            found.setdefault(layer, {})[part.split(":")[0]] = np.asarray(item[()])

    try:
        bounded(path.stat().st_size, 0, LARGEST_FILE, "its size (bytes)", refuse=ValueError)
        with h5py.File(path, "r") as file:
            configured = _configured_dim(file.attrs.get("model_config"))
            file.get("model_weights", file).visititems(collect)
    except Exception as error:  # h5py has errors of many kinds for a damaged file
        raise ModelError(
            f"{path} is not a readable Keras .h5 file ({_first_line(error)}). Copy it again, or "
            "check the path."
        ) from error

    # By the kernel's rank and the number in the layer's name: 3 of ``conv2d_3``, 0 of ``conv2d``.
    layers: dict[tuple[int, int], Layer] = {}
    for name, parts in found.items():
        if set(parts) != {"kernel", "bias"} or parts["kernel"].ndim not in (2, 4):
            shapes = ", ".join(f"{part} {item.shape}" for part, item in sorted(parts.items()))
            raise _not_ours(path, f"layer {name!r} with {shapes}")
        match = re.search(r"_(\d+)$", name)
        key = (parts["kernel"].ndim, int(match[1]) if match else 0)
        if key in layers:
            raise _not_ours(path, f"two layers numbered {key[1]}, one of them {name!r}")
        for part, item in parts.items():
            if item.dtype.kind != "f":
                raise _not_ours(path, f"layer {name!r} with {part} of type {item.dtype}")
        kernel, bias = (torch.from_numpy(parts[k].astype(np.float32)) for k in ("kernel", "bias"))
        layers[key] = (kernel, bias)
    dense = [layer for (rank, _), layer in layers.items() if rank == 2]
    if len(dense) != 1:
        raise _not_ours(path, f"{len(dense)} dense layers")
    convolutions = [layers[rank, number] for rank, number in sorted(layers) if rank == 4]
    return convolutions, dense[0], configured


def _first_line(error: Exception) -> str:
    """Return what an error says, in a few words."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _configured_dim(model_config: bytes | str | None) -> int | None:
    """Return the image size (px) in a model's configuration, e.g. [null, 28, 28, 1]."""
    network = parse_json(model_config).get("config", {}) if model_config is not None else {}
    for layer in network if isinstance(network, list) else network.get("layers", []):
        config = layer.get("config", {})
        shape = config.get("batch_input_shape") or config.get("batch_shape") or []
        if len(shape) == 4 and shape[1] == shape[2] and shape[1] is not None:
            return bounded(shape[1], 8, LARGEST_DIM, "the image size (px)", refuse=ValueError)
    return None


def _check_belief(path: Path, what: str, *, found: object, believed: object) -> None:
    if believed is not None and believed != found:
        raise ModelError(
            f"{path}: {what} is {found} by the file's layers, but {believed} was asked for. "
            "Leave that option out, or give the file that belongs to it."
        )


def _not_ours(path: Path, found: str) -> ModelError:
    return ModelError(
        f"{path} holds {found}; expected the 2020 `straight` network (6 convolutions of 3 x 3, one "
        "dense unit) or `roberts` (12 convolutions). Other Keras networks can't be imported."
    )

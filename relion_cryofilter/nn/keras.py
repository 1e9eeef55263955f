"""Import of Keras .h5 files: the weights and models that the 2020 program wrote.

h5py is imported here only, and only when a file is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relion_cryofilter.errors import ModelError
from relion_cryofilter.nn.checkpoint import Model, require_file
from relion_cryofilter.nn.network import Network
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.preprocess import BlurResize

DEFAULT_DIM = 28
"""Image size (px) of the 2020 program, unless it was told otherwise."""

CONVOLUTIONS_PER_TOWER = 6
TOWERS = {1: "straight", 2: "roberts"}

Layer = tuple[Tensor, Tensor]
"""Kernel and bias as Keras keeps them."""


def import_keras(
    path: str | os.PathLike[str],
    *,
    f: int | None = None,
    dim: int | None = None,
    network: str | None = None,
) -> Model:
    """Read a Keras .h5 file of the 2020 program, from ``save_weights`` or ``model.save``.

    Network and filters follow from the layers' shapes. The image size is read from the model's
    configuration where the file has one; else it is `dim`, or 28 px, if the dense layer agrees.

    Parameters
    ----------
    path : path
        The .h5 file.
    f, dim, network : optional
        What the caller believes; ModelError if the file disagrees.

    Returns
    -------
    Model
        With the 2020 preprocessing, threshold 0.5 and the file's SHA-256 in its provenance.

    Raises
    ------
    ModelError
        If h5py is missing, or the file is none of the 2020 networks.
    """
    path = require_file(path)
    convolutions, dense, configured_dim = _read_layers(path)
    name, filters = _network_of(path, convolutions)
    _check_belief(path, "network", found=name, believed=network)
    _check_belief(path, "f", found=filters, believed=f)
    side = _side_of(path, dense, filters * len(convolutions) // CONVOLUTIONS_PER_TOWER)
    dim = _dim_of(path, side, configured_dim, dim)
    built = build_network(name, f=filters, dim=dim)
    _copy_weights(built, convolutions, dense)
    return Model(
        network=built,
        preprocess=BlurResize(dim=dim, roberts=name == "roberts"),
        threshold=0.5,
        provenance={
            "origin": "imported from a Keras .h5 file",
            "file": path.name,
            "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
    )


def _read_layers(path: Path) -> tuple[list[Layer], Layer, int | None]:
    """Return the convolutions in the order they were built, the dense layer and the image size."""
    h5py = _import_h5py()
    try:
        with h5py.File(path, "r") as file:
            configured_dim = _configured_dim(file.attrs.get("model_config"))
            layers = _layers_by_number(path, file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable Keras .h5 file ({error}). Copy it again, or check the path."
        ) from error
    convolutions = {number: layer for (rank, number), layer in layers.items() if rank == 4}
    dense = [layer for (rank, _), layer in layers.items() if rank == 2]
    if len(dense) != 1:
        raise ModelError(_not_ours(path, f"{len(dense)} dense layers"))
    return [convolutions[number] for number in sorted(convolutions)], dense[0], configured_dim


def _layers_by_number(path: Path, file: Any) -> dict[tuple[int, int], Layer]:
    """Return kernels and biases by kernel rank and the layer name's number.

    Weights are kept like ``conv2d_3/conv2d_3/kernel:0``, under ``model_weights`` in a whole model.
    """
    found: dict[str, dict[str, Any]] = {}

    def collect(name: str, item: Any) -> None:
        if hasattr(item, "shape"):
            layer, _, part = name.rpartition("/")
            found.setdefault(layer, {})[part.split(":")[0]] = item

    file.get("model_weights", file).visititems(collect)
    layers: dict[tuple[int, int], Layer] = {}
    for name, parts in found.items():
        if set(parts) != {"kernel", "bias"} or len(parts["kernel"].shape) not in (2, 4):
            shapes = ", ".join(f"{part} {item.shape}" for part, item in sorted(parts.items()))
            raise ModelError(_not_ours(path, f"layer {name!r} with {shapes}"))
        key = (len(parts["kernel"].shape), _number(name))
        if key in layers:
            raise ModelError(_not_ours(path, f"two layers numbered {key[1]}, one of them {name!r}"))
        layers[key] = (_tensor(parts["kernel"]), _tensor(parts["bias"]))
    return layers


def _tensor(dataset: Any) -> Tensor:
    return torch.from_numpy(dataset.astype("float32")[()])


def _import_h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ModelError(
            "Reading Keras .h5 files needs h5py, which can't be imported. "
            'Install it with: pip install "relion_cryofilter[keras]"'
        ) from error


def _configured_dim(model_config: bytes | str | None) -> int | None:
    """Return the image size (px) in a model's configuration, e.g. [null, 28, 28, 1]."""
    if model_config is None:
        return None
    network = json.loads(model_config).get("config", {})
    for layer in network if isinstance(network, list) else network.get("layers", []):
        config = layer.get("config", {})
        shape = config.get("batch_input_shape") or config.get("batch_shape") or []
        if len(shape) == 4 and isinstance(shape[1], int) and shape[1] == shape[2]:
            return int(shape[1])
    return None


def _number(name: str) -> int:
    """Return 3 for ``conv2d_3`` and 0 for ``conv2d``."""
    match = re.search(r"_(\d+)$", name)
    return int(match.group(1)) if match else 0


def _network_of(path: Path, convolutions: list[Layer]) -> tuple[str, int]:
    """Return network and filters that the convolutions' shapes tell."""
    towers, rest = divmod(len(convolutions), CONVOLUTIONS_PER_TOWER)
    if rest or towers not in TOWERS:
        raise ModelError(_not_ours(path, f"{len(convolutions)} convolutions"))
    filters = int(convolutions[0][0].shape[3])
    for index, (kernel, bias) in enumerate(convolutions):
        inputs = 1 if index % CONVOLUTIONS_PER_TOWER == 0 else filters
        expected = (3, 3, inputs, filters)
        if tuple(kernel.shape) != expected or tuple(bias.shape) != (filters,):
            raise ModelError(
                _not_ours(
                    path,
                    f"convolution {index + 1} with a kernel of {tuple(kernel.shape)} instead of "
                    f"{expected}",
                )
            )
    return TOWERS[towers], filters


def _side_of(path: Path, dense: Layer, maps: int) -> int:
    """Return the side (px) of the last maps, from the dense layer that follows them."""
    inputs, outputs = dense[0].shape
    side = math.isqrt(inputs // maps)
    if outputs != 1 or side < 1 or side * side * maps != inputs:
        raise ModelError(_not_ours(path, f"a dense layer of {inputs} x {outputs}"))
    if tuple(dense[1].shape) != (1,):
        raise ModelError(_not_ours(path, f"a dense layer with a bias of {tuple(dense[1].shape)}"))
    return side


def _dim_of(path: Path, side: int, configured: int | None, believed: int | None) -> int:
    """Return the image size (px): three poolings make `side` of eight possible sizes."""
    if configured is not None:
        _check_belief(path, "image size", found=configured, believed=believed)
    dim = configured or believed or DEFAULT_DIM
    if dim // 8 != side:
        raise ModelError(
            f"{path}: the dense layer fits image sizes of {8 * side} to {8 * side + 7} px, not "
            f"{dim}. Give the image size that the network was trained with (--img_dim)."
        )
    return dim


def _check_belief(path: Path, what: str, *, found: object, believed: object) -> None:
    if believed is not None and believed != found:
        raise ModelError(
            f"{path}: {what} is {found} by the file's layers, but {believed} was asked for. "
            "Leave that option out, or give the file that belongs to it."
        )


@torch.no_grad()
def _copy_weights(network: Network, convolutions: list[Layer], dense: Layer) -> None:
    """Copy Keras weights: kernels (height, width, in, out) become (out, in, height, width)."""
    ours = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    for module, (kernel, bias) in zip(ours, convolutions, strict=True):
        assert module.bias is not None
        module.weight.copy_(kernel.permute(3, 2, 0, 1))
        module.bias.copy_(bias)
    head = network.head
    assert isinstance(head, torch.nn.Linear)
    head.weight.copy_(dense[0].t())
    head.bias.copy_(dense[1])


def _not_ours(path: Path, found: str) -> str:
    return (
        f"{path} holds {found}; expected the 2020 `straight` network (6 convolutions of 3 x 3, one "
        "dense unit) or `roberts` (12 convolutions). Other Keras networks can't be imported."
    )

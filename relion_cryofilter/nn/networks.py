"""The networks, by name: small images in, one logit and one feature vector per particle out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from relion_cryofilter.errors import ModelError
from relion_cryofilter.nn.equivariant import D4
from relion_cryofilter.nn.network import Network, plane


class _Towers(Network):
    """The 2020 networks: per channel a tower of convolutions, then one dense unit.

    Each tower has three stages of two 3 x 3 convolutions with `f` filters and ReLU, then 2 x 2
    average pooling (odd sizes lose the last row and column). As in Keras, the maps are flattened
    in height, width, channel order. Weights start as Keras starts them: Glorot uniform, biases 0.
    """

    def __init__(self, f: int = 32, dim: int = 28) -> None:
        super().__init__()
        _check_positive("f", f, at_least=1)
        _check_positive("dim", dim, at_least=8)
        self.dim = dim
        self.kwargs = {"f": f, "dim": dim}
        self.feature_count = self.channels * f * (dim // 8) ** 2
        self.towers = nn.ModuleList(_tower(f) for _ in range(self.channels))
        self.head = nn.Linear(self.feature_count, 1)
        self.apply(_start_as_keras)

    def features(self, x: Tensor) -> Tensor:
        """Return the flattened maps, image tower first."""
        flat = [
            tower(plane(x, channel)).permute(0, 2, 3, 1).flatten(1)
            for channel, tower in enumerate(self.towers)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


class Straight(_Towers):
    """The 2020 `straight` network: one tower, on the image."""

    name = "straight"
    channels = 1


class Roberts(_Towers):
    """The 2020 `roberts` network: a tower on the image and one on its Roberts cross."""

    name = "roberts"
    channels = 2


NETWORKS: dict[str, type[Network]] = {network.name: network for network in (Straight, Roberts, D4)}
"""The networks that `build_network` knows."""


def build_network(name: str, **kwargs: Any) -> Network:
    """Build a network with fresh weights.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    **kwargs
        The network's own parameters, e.g. ``f`` (filters per convolution) and ``dim`` (px).

    Raises
    ------
    ModelError
        If the name or a parameter is unknown, or a value makes no sense.
    """
    if name not in NETWORKS:
        raise ModelError(f"Network {name!r} is unknown; known are {', '.join(sorted(NETWORKS))}.")
    known = list(inspect.signature(NETWORKS[name]).parameters)
    for word in kwargs:
        if word not in known:
            raise ModelError(
                f"Network {name} has no parameter {word!r}; it has {', '.join(known)}."
            )
    return NETWORKS[name](**kwargs)


def _tower(f: int) -> nn.Sequential:
    """Return three stages of convolution, ReLU, convolution, ReLU, average pooling."""
    layers: list[nn.Module] = []
    for inputs in (1, f, f):
        layers += [nn.Conv2d(inputs, f, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(f, f, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.AvgPool2d(2)]
    return nn.Sequential(*layers)


def _start_as_keras(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_positive(word: str, value: int, at_least: int) -> None:
    if not isinstance(value, int) or value < at_least:
        raise ModelError(f"{word} is {value!r}; it must be a whole number of {at_least} or more.")

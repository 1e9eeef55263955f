"""What every network offers, where networks run, and the networks of 2020; `d4` has the default."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from relion_cryofilter.errors import ModelError, UsageError, bounded
from relion_cryofilter.images.preprocess import BlurResize, FourierCrop
from relion_cryofilter.options import LARGEST_DIM, MOST_FILTERS, NETWORKS
from relion_cryofilter.progress import counted

log = logging.getLogger("relion_cryofilter")

CPU = torch.device("cpu")


def choose_devices(gpus: list[int] | None) -> list[torch.device]:
    """Return the devices of GPU numbers; [] means the processor, None every GPU there is.

    A number that this machine doesn't have is a UsageError.
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
    if absent := [number for number in numbers if number >= present]:
        raise UsageError(
            f"--gpu asks for GPU {absent[0]}, but there are {present} (0 to {present - 1})."
        )
    return [torch.device("cuda", number) for number in numbers]


class Network(nn.Module, ABC):
    """What every network offers: it sets its attributes, a `head` and `features`.

    Attributes
    ----------
    name : str
        Name in the registry.
    equivariant : bool
        Whether the eight flips and quarter turns of an image give the same logit, exactly.
    recipes : tuple of str
        Names of the preprocessing that fits; the first is the default.
    channels, dim : int
        Input is (n, channels, dim, dim); further channels are ignored.
    feature_count : int
        Length of the feature vector.
    kwargs : dict
        What `build_network` needs, next to the name, to build this network again.
    head : nn.Linear
        From features to one logit.
    """

    name: ClassVar[str]
    equivariant: ClassVar[bool] = False
    recipes: ClassVar[tuple[str, ...]]
    channels: int
    dim: int
    feature_count: int
    kwargs: dict[str, Any]
    head: nn.Linear

    @property
    def micro_batch(self) -> int:
        """Images at a time on a processor: few for its caches, and below 32 MiB of maps (mmap)."""
        return 32 if self.dim <= 48 else 16

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def parameters_of(cls) -> list[str]:
        """Return what may be chosen of a new network; the signature tells the defaults."""
        return list(inspect.signature(cls).parameters)

    def recipe(self, name: str | None = None) -> dict[str, Any]:
        """Return the preprocessing `name`, or the default, for `preprocess_from_dict`."""
        more = {"roberts": True} if self.channels > 1 else {}
        return {"name": name or self.recipes[0], "dim": self.dim, **more}

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return feature vectors (n, feature_count) of images (n, c, dim, dim) of any strides."""

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n,) and features (n, feature_count) of one pass."""
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            features = features.float()
            logits: Tensor = self.head(features)
        return logits.squeeze(1), features

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n,) of small images (n, c, dim, dim)."""
        return self.forward_with_features(x)[0]


def plane(x: Tensor, channel: int) -> Tensor:
    """Return one channel of (n, c, h, w) as (n, 1, h, w), with the strides of channels_last.

    With a single channel, torch takes planar strides for channels_last too, and then convolves
    planar maps, which takes up to three times as long.
    """
    return x[:, channel].contiguous().unsqueeze(-1).movedim(-1, 1)


class _Towers(Network):
    """The 2020 networks: per channel a tower of convolutions, then one dense unit.

    Each tower has three stages of two 3 x 3 convolutions with `f` filters and ReLU, then 2 x 2
    average pooling (odd sizes lose the last row and column). As in Keras, the maps are flattened
    in height, width, channel order. Weights start as Keras starts them: Glorot uniform, biases 0.
    """

    recipes = (BlurResize.name, FourierCrop.name)

    def __init__(self, f: int = 32, dim: int = 28) -> None:
        super().__init__()
        bounded(f, 1, MOST_FILTERS, "f", refuse=ModelError)
        bounded(dim, 8, LARGEST_DIM, "dim", refuse=ModelError)
        self.dim = dim
        self.kwargs = {"f": f, "dim": dim}
        self.feature_count = self.channels * f * (dim // 8) ** 2
        self.towers = nn.ModuleList()
        for _ in range(self.channels):
            layers: list[nn.Module] = []
            for inputs in (1, f, f):
                layers += [nn.Conv2d(inputs, f, 3, padding=1), nn.ReLU(inplace=True)]
                layers += [nn.Conv2d(f, f, 3, padding=1), nn.ReLU(inplace=True)]
                layers += [nn.AvgPool2d(2)]
            self.towers.append(nn.Sequential(*layers))
        self.head = nn.Linear(self.feature_count, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

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


def network_class(name: str) -> type[Network]:
    """Return the network that `options.NETWORKS` has under a name, or raise ModelError."""
    if not isinstance(name, str) or name not in NETWORKS:
        raise ModelError(
            f"Network {name!r:.60} is unknown; known are {', '.join(sorted(NETWORKS))}."
        )
    module, _, kind = NETWORKS[name].rpartition(".")
    network: type[Network] = getattr(import_module(f"{__package__}.{module}"), kind)
    return network


def build_network(name: str, **kwargs: Any) -> Network:
    """Build the network of a name in `options.NETWORKS`, with fresh weights.

    `kwargs` are its own parameters, e.g. ``f`` (filters per convolution) and ``dim`` (px). An
    unknown name or parameter, or a value that makes no sense, is a ModelError.
    """
    network = network_class(name)
    known = network.parameters_of()
    if strange := [word for word in kwargs if word not in known]:
        raise ModelError(
            f"Network {name} has no parameter {strange[0]!r:.60}; it has {', '.join(known)}."
        )
    return network(**kwargs)

"""What every network offers: small images in, one logit and one feature vector a particle out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Network(nn.Module, ABC):
    """What every network offers.

    A network sets its attributes, a `head` (features to one logit) and `features`.

    Attributes
    ----------
    name : str
        Name in the registry.
    channels, dim : int
        Input is (n, channels, dim, dim); further channels are ignored.
    feature_count : int
        Length of the feature vector.
    equivariant : bool
        Whether the eight flips and quarter turns of an image give the same logit, exactly.
    kwargs : dict
        What `build_network` needs, next to the name, to build this network again.
    """

    name: ClassVar[str]
    equivariant: ClassVar[bool] = False
    channels: int
    dim: int
    feature_count: int
    kwargs: dict[str, Any]
    head: nn.Linear

    @property
    def micro_batch(self) -> int:
        """How many images go through at a time on a processor.

        Few enough for its caches, and below the 32 MiB of activations where malloc turns to mmap
        and speed halves.
        """
        return 32 if self.dim <= 48 else 16

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return the feature vectors (n, feature_count) of small images (n, c, dim, dim).

        Whatever the strides of `x`: `plane` gives those that convolutions are fast with.
        """

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

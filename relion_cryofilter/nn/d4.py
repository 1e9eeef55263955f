"""A network whose score is the same for all eight flips and quarter turns of an image.

Kernels are shared over the symmetry group D4 of the square (p4m group convolutions): T. Cohen &
M. Welling, "Group equivariant convolutional networks", ICML 2016. For inference the kernels are
expanded once into plain convolutions and the batch norms are folded into them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d

from relion_cryofilter.errors import ModelError, bounded
from relion_cryofilter.images.preprocess import FourierCrop, d4_views
from relion_cryofilter.nn.networks import Network, plane
from relion_cryofilter.options import LARGEST_DIM

_LARGEST_WIDTH = 64
ORDER, EPSILON = 8, 1e-5
"""Number of flips and quarter turns of a square (see `d4_views`); what steadies a batch norm."""


def _group_table() -> list[list[int]]:
    """Return table[g][h], the number of the element g⁻¹h."""
    mark = torch.arange(9).reshape(3, 3)
    views = [view.flatten().tolist() for view in d4_views(mark)]
    actions = [list(d4_views(torch.tensor(view).reshape(3, 3))) for view in views]
    product = [[views.index(actions[h][g].flatten().tolist()) for h in range(ORDER)]
               for g in range(ORDER)]  # fmt: skip
    inverse = [row.index(0) for row in product]
    return [[product[inverse[g]][h] for h in range(ORDER)] for g in range(ORDER)]


TABLE = _group_table()


class D4Conv(nn.Module):
    """Convolution over the group: (n, cin·8, h, w) or, lifting, (n, cin, h, w) → (n, cout·8, …).

    A kernel of `size` px has an even side with stride 2, so that flips stay exact on even sizes.
    """

    mean: Tensor
    variance: Tensor
    order: Tensor

    def __init__(
        self, cin: int, cout: int, size: int = 3, stride: int = 1, lifting: bool = False
    ) -> None:
        super().__init__()
        depth = 1 if lifting else ORDER
        self.stride, self.padding, self.lifting = stride, (size - 1) // 2, lifting
        self.weight = nn.Parameter(torch.empty(cout, cin * depth, size, size))
        nn.init.normal_(self.weight, std=(2 / (cin * depth * size * size)) ** 0.5)
        self.gain = nn.Parameter(torch.ones(cout))
        self.shift = nn.Parameter(torch.zeros(cout))
        self._kept: tuple[Any, Tensor, Tensor] | None = None
        self.register_buffer("mean", torch.zeros(cout))
        self.register_buffer("variance", torch.ones(cout))
        # Where the weights (cin·depth, size, size) of the eight views come from.
        order = torch.arange(cin * depth * size**2).reshape(cin, depth, size, size)
        views = list(d4_views(order))
        if not lifting:
            views = [view[:, TABLE[g]] for g, view in enumerate(views)]
        self.register_buffer("order", torch.stack(views).flatten(), persistent=False)

    def kernel(self) -> Tensor:
        """Return the plain kernel (cout·8, cin·depth, size, size)."""
        cout, *one = self.weight.shape
        return self.weight.flatten(1).index_select(1, self.order).reshape(cout * ORDER, *one)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return kernel and bias of the plain convolution with the batch norm in it."""
        scale = self.gain / (self.variance + EPSILON).sqrt()
        bias = self.shift - self.mean * scale
        kernel = self.kernel() * scale.repeat_interleave(ORDER)[:, None, None, None]
        return kernel, bias.repeat_interleave(ORDER)

    def _plain(self) -> tuple[Tensor, Tensor]:
        """Return `folded()`, made again only when something in it has changed."""
        if torch.is_grad_enabled():
            return self.folded()
        parts = (self.weight, self.gain, self.shift, self.mean, self.variance)
        key = tuple((part.data_ptr(), part._version) for part in parts)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                kernel, bias = self.folded()
                kernel = kernel.contiguous(memory_format=torch.channels_last)
            self._kept = (key, kernel, bias)
        return self._kept[1], self._kept[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> D4Conv:
        copied = D4Conv.__new__(D4Conv)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy({**self.__dict__, "_kept": None}, memo))
        return copied

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise, with statistics of the batch while training."""
        if not self.training:
            kernel, bias = self._plain()
            return conv2d(x, kernel, bias, self.stride, self.padding)
        y = conv2d(x, self.kernel(), None, self.stride, self.padding)
        # One mean and variance for the eight maps of a channel keeps the symmetry.
        n, maps, height, width = y.shape
        pixels = y.permute(0, 2, 3, 1).reshape(-1, maps // ORDER, ORDER)
        pixels = batch_norm(
            pixels, self.mean, self.variance, self.gain, self.shift, training=True, eps=EPSILON
        )
        return pixels.reshape(n, height, width, maps).permute(0, 3, 1, 2)


class D4(Network):
    """Stem, three residual stages, then mean and max over the image and over the eight views.

    `widths` are the channels of the stages, each for eight maps; `dim` is in px.
    """

    name = "d4"
    equivariant = True
    channels = 1
    recipes = (FourierCrop.name,)

    def __init__(self, widths: Sequence[int] = (4, 8, 16), dim: int = 48) -> None:
        super().__init__()
        bounded(dim, 16, LARGEST_DIM, "dim", refuse=ModelError)
        if dim % 8:
            raise ModelError(f"Network d4 takes images of 16, 24, 32 … px; found {dim}.")
        if len(widths) != 3:
            raise ModelError(f"Network d4 has three widths; found {len(widths)}.")
        for width in widths:
            bounded(width, 1, _LARGEST_WIDTH, "Network d4: a width", refuse=ModelError)
        first, second, third = widths
        self.dim = dim
        self.kwargs: dict[str, Any] = {"widths": list(widths), "dim": dim}
        self.feature_count = 4 * third
        self.stem = D4Conv(1, first, size=6, stride=2, lifting=True)
        self.blocks = nn.ModuleList(
            [
                D4Conv(first, first),
                D4Conv(first, second), D4Conv(second, second),
                D4Conv(second, third), D4Conv(third, third),
            ]
        )  # fmt: skip
        self.head = nn.Linear(self.feature_count, 1)

    def stemmed(self, x: Tensor) -> Tensor:
        """Return what the stem makes of images (n, 1, dim, dim)."""
        stemmed: Tensor = self.stem(plane(x, 0))
        return stemmed

    def features(self, x: Tensor) -> Tensor:
        """Return (n, 4·third): mean and max over pixels, each as mean and max over the views.

        Under autocast only the convolutions between the sums are in reduced precision.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = torch.relu_(self.stemmed(x))
        a, b, c, d, e = self.blocks
        x = torch.relu_(a(x).float().add_(x))
        x = torch.relu_(b(avg_pool2d(x, 2)))
        x = torch.relu_(c(x).float().add_(x))
        x = torch.relu_(d(avg_pool2d(x, 2)))
        x = torch.relu_(e(x).float().add_(x))
        maps = x.flatten(2)
        pooled = torch.cat([maps.mean(2), maps.amax(2)], dim=1)
        views = pooled.reshape(len(x), -1, ORDER)
        return torch.cat([views.mean(2), views.amax(2)], dim=1)

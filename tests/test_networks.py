"""The networks by name: shapes, parameters and what they look at."""

from __future__ import annotations

import pytest
import torch

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.nn.networks import NETWORKS, build_network, plane


@pytest.mark.parametrize("name", ["straight", "roberts"])
@pytest.mark.parametrize("kwargs", [{}, {"f": 4}, {"f": 3, "dim": 37}])
def test_every_network_gives_one_logit_and_its_features_per_image(name: str, kwargs) -> None:
    network = build_network(name, **kwargs)
    x = torch.randn(5, network.channels, network.dim, network.dim)

    logits, features = network.forward_with_features(x)

    assert logits.shape == (5,)
    assert features.shape == (5, network.feature_count)
    assert torch.equal(network(x), logits)
    assert torch.equal(network.features(x), features)


@pytest.mark.parametrize(("name", "towers"), [("straight", 1), ("roberts", 2)])
def test_the_2020_networks_have_as_many_weights_as_in_keras(name: str, towers: int) -> None:
    first, further, dense_inputs = 3 * 3 * 32 + 32, 3 * 3 * 32 * 32 + 32, 3 * 3 * 32
    expected = towers * (first + 5 * further) + towers * dense_inputs + 1
    assert sum(p.numel() for p in build_network(name).parameters()) == expected


def test_features_are_flattened_in_height_width_channel_order() -> None:
    network = build_network("straight", f=2, dim=16)
    x = torch.randn(1, 1, 16, 16)
    maps = network.towers[0](x)
    expected = [maps[0, c, y, x] for y in range(2) for x in range(2) for c in range(2)]
    torch.testing.assert_close(network.features(x)[0], torch.stack(expected))


def test_a_plane_is_one_channel_and_is_convolved_as_channels_last() -> None:
    x = torch.randn(2, 3, 12, 10)
    one = plane(x, 1)
    assert torch.equal(one, x[:, 1:2])
    assert one.stride() == (120, 1, 10, 1)
    maps = torch.nn.functional.conv2d(one, torch.randn(4, 1, 3, 3))
    assert maps.stride(1) == 1


def test_straight_ignores_a_second_channel() -> None:
    network = build_network("straight", f=2)
    x = torch.randn(3, 2, 28, 28)
    assert torch.equal(network(x), network(x[:, :1]))


def test_roberts_puts_the_features_of_the_image_first() -> None:
    network = build_network("roberts", f=2)
    x = torch.randn(3, 2, 28, 28)
    other_edges = torch.stack([x[:, 0], torch.randn(3, 28, 28)], dim=1)
    changed = network.features(x) != network.features(other_edges)
    assert not changed[:, :18].any()
    assert changed[:, 18:].any()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_can_be_built_again_from_its_name_and_parameters(name: str) -> None:
    sizes = {"widths": (2, 3, 4), "dim": 32} if name == "d4" else {"f": 3, "dim": 30}
    network = build_network(name, **sizes)
    again = build_network(network.name, **network.kwargs)
    again.load_state_dict(network.state_dict())
    assert again.kwargs == network.kwargs


def test_gradients_reach_every_weight() -> None:
    network = build_network("roberts", f=4)
    network(torch.randn(16, 2, 28, 28)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet", {}, "Network 'resnet' is unknown; known are .*roberts.*straight"),
        ("straight", {"filters": 3}, "straight has no parameter 'filters'; it has f, dim"),
        ("straight", {"f": 0}, "f is 0; expected a whole number from 1 to 256"),
        ("straight", {"dim": 7}, "dim is 7; expected a whole number from 8 to 256"),
        ("straight", {"dim": 28.0}, "dim is 28.0; expected a whole number"),
    ],
)
def test_an_unknown_network_or_parameter_is_named(name: str, kwargs, message: str) -> None:
    with pytest.raises(CryoFilterError, match=message):
        build_network(name, **kwargs)

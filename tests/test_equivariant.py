"""The D4 network gives all eight views of an image the same score, trained or folded."""

from __future__ import annotations

import copy

import pytest
import torch

from relion_cryofilter.errors import ModelError
from relion_cryofilter.images.preprocess import FourierCrop, d4_views
from relion_cryofilter.nn.d4 import D4, ORDER, TABLE
from relion_cryofilter.nn.model import Model, load_model


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = D4((2, 3, 4), dim=32)
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(5):
        optimiser.zero_grad()
        network(torch.randn(16, 1, 32, 32)).square().mean().backward()
        optimiser.step()
    return network.eval()


def test_the_table_is_that_of_a_group():
    assert [row[g] for g, row in enumerate(TABLE)] == [0] * ORDER
    assert all(sorted(row) == list(range(ORDER)) for row in TABLE)


@pytest.mark.parametrize("training", [True, False])
def test_all_eight_views_have_the_same_score_and_features(network, training):
    images = torch.randn(6, 1, 32, 32)
    network.train(training)
    with torch.no_grad():
        outputs = [network.forward_with_features(view.contiguous()) for view in d4_views(images)]
    for logits, features in outputs[1:]:
        assert torch.allclose(logits, outputs[0][0], atol=1e-5)
        assert torch.allclose(features, outputs[0][1], atol=1e-5)
    assert outputs[0][0].std() > 1e-3


def test_folding_the_batch_norm_changes_nothing(network):
    images = torch.randn(6, 1, 32, 32)
    with torch.no_grad():
        folded = network(images)
        for layer in (network.stem, *network.blocks):
            layer.train()
            layer.forward = slow(layer)
        assert torch.allclose(network(images), folded, atol=1e-5)


def slow(layer):
    """Return the layer's forward with running statistics, not folded."""

    def forward(x):
        y = torch.nn.functional.conv2d(x, layer.kernel(), None, layer.stride, layer.padding)
        scale = layer.gain / (layer.variance + 1e-5).sqrt()
        shift = layer.shift - layer.mean * scale
        scale, shift = (v.repeat_interleave(ORDER)[:, None, None] for v in (scale, shift))
        return y * scale + shift

    return forward


def test_kept_kernels_follow_the_weights(network):
    images = torch.randn(6, 1, 32, 32)
    with torch.inference_mode():
        before = network(images)
        state = {name: 1.1 * value for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    with torch.inference_mode():
        after = network(images)
    fresh = copy.deepcopy(network)
    with torch.inference_mode():
        assert not torch.allclose(after, before)
        assert torch.equal(fresh(images), after)


def test_a_model_file_brings_it_back(network, tmp_path):
    model = Model(network, FourierCrop(32), 0.4)
    model.save(tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    small = model.preprocess(torch.randn(9, 48, 48))
    assert torch.equal(again.probabilities(small), model.probabilities(small))
    assert again.hash == model.hash
    assert torch.allclose(
        model.probabilities(small, tta=True), model.probabilities(small), atol=1e-5
    )


@pytest.mark.parametrize(("widths", "dim"), [((2, 3, 4), 30), ((2, 3), 32), ((0, 1, 2), 32)])
def test_sizes_that_make_no_sense_are_refused(widths, dim):
    with pytest.raises(ModelError, match="Network d4"):
        D4(widths, dim)

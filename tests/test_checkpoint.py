"""Model files: what is saved is what scores, and every refusal says what to do."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.images.preprocess import BlurResize, FourierCrop, d4_views
from relion_cryofilter.nn import model as checkpoint
from relion_cryofilter.nn.model import Model, load_model
from relion_cryofilter.nn.networks import build_network


def make_model(name: str = "roberts", **values) -> Model:
    torch.manual_seed(1)
    network = build_network(name, f=4)
    values = {
        "threshold": 0.4,
        "temperature": 1.7,
        "provenance": {"seed": 1, "box_px": 64},
    } | values
    return Model(network, BlurResize(28, roberts=name == "roberts"), **values)


def small_images(n: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(n, channels, 28, 28, generator=torch.Generator().manual_seed(n))


MODEL = make_model()
IMAGES = small_images(70)


@pytest.mark.parametrize("name", ["straight", "roberts"])
def test_a_model_survives_its_file(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save(tmp_path / "model.safetensors")

    again = load_model(str(tmp_path / "model.safetensors"))

    assert torch.equal(again.probabilities(IMAGES), model.probabilities(IMAGES))
    assert again.hash == model.hash
    assert again.preprocess == model.preprocess
    assert again.network.kwargs == model.network.kwargs
    assert (again.threshold, again.temperature) == (0.4, 1.7)
    assert again.provenance == {"seed": 1, "box_px": 64}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_with_a_fourier_crop_survives_its_file(tmp_path: Path) -> None:
    model = Model(build_network("straight", f=2, dim=48), FourierCrop(48, 5), 0.5)
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert (again.preprocess, again.hash) == (model.preprocess, model.hash)


def test_the_hash_changes_with_what_changes_scores_and_with_nothing_else() -> None:
    assert len(MODEL.hash) == 12
    assert replace(MODEL, threshold=0.1, provenance={}).hash == MODEL.hash
    assert make_model().hash == MODEL.hash
    assert replace(MODEL, temperature=1.0).hash != MODEL.hash
    other = make_model()
    with torch.no_grad():
        other.network.head.bias.add_(1e-3)
    assert other.hash != MODEL.hash
    straight = make_model("straight")
    both_channels = replace(straight, preprocess=BlurResize(28, roberts=True))
    assert both_channels.hash != straight.hash


def test_a_score_is_the_sigmoid_of_the_logit_over_the_temperature() -> None:
    with torch.no_grad():
        expected = torch.sigmoid(MODEL.network(IMAGES) / 1.7)
    torch.testing.assert_close(MODEL.probabilities(IMAGES), expected, atol=1e-6, rtol=0)


def test_test_time_augmentation_averages_the_scores_of_the_eight_views() -> None:
    views = [MODEL.probabilities(view) for view in d4_views(IMAGES)]
    expected = torch.stack(views).mean(dim=0)
    torch.testing.assert_close(MODEL.probabilities(IMAGES, tta=True), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tta", [False, True])
def test_features_come_with_the_same_scores_and_from_the_image_as_it_stands(tta: bool) -> None:
    scores, features = MODEL.probabilities_and_features(IMAGES, tta=tta)
    assert torch.equal(scores, MODEL.probabilities(IMAGES, tta=tta))
    with torch.no_grad():
        expected = MODEL.network.features(IMAGES)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 70), max_size=4), tta=st.booleans())
def test_scores_do_not_depend_on_the_batch_size(cuts: list[int], tta: bool) -> None:
    edges = [0, *sorted(cuts), 70]
    parts = [MODEL.probabilities(IMAGES[a:b], tta) for a, b in pairwise(edges)]
    torch.testing.assert_close(
        torch.cat(parts), MODEL.probabilities(IMAGES, tta), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("tta", [False, True])
def test_an_image_of_nan_scores_nan_and_leaves_the_others_alone(tta: bool) -> None:
    images = IMAGES.clone()
    images[5] = torch.nan
    scores, expected = MODEL.probabilities(images, tta), MODEL.probabilities(IMAGES, tta)
    assert scores[5].isnan()
    others = torch.arange(70) != 5
    torch.testing.assert_close(scores[others], expected[others], atol=1e-6, rtol=0)


def test_no_images_give_no_scores() -> None:
    scores, features = MODEL.probabilities_and_features(IMAGES[:0])
    assert scores.shape == (0,)
    assert features.shape == (0, MODEL.network.feature_count)


def test_scores_can_be_changed_in_place() -> None:
    scores = MODEL.probabilities(IMAGES)
    scores[0] = 0
    assert scores[0] == 0


def test_several_threads_get_the_same_scores() -> None:
    expected = MODEL.probabilities(IMAGES)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(MODEL.probabilities, [IMAGES] * 16):
            torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_a_copy_on_a_device_scores_the_same() -> None:
    copy = MODEL.to("cpu")
    assert copy.network is not MODEL.network
    assert copy.hash == MODEL.hash


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1.2}, "threshold is 1.2; it must be 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"temperature": 0}, "temperature is 0; it must be above 0"),
        ({"preprocess": BlurResize(32, True)}, "takes 2 x 28 x 28 px, but .* makes 2 x 32 x 32"),
        ({"preprocess": BlurResize(28)}, "takes 2 x 28 x 28 px, but .* makes 1 x 28 x 28"),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(values, message: str) -> None:
    with pytest.raises(CryoFilterError, match=message):
        replace(MODEL, **values)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CryoFilterError, match=r"model.safetensors doesn't exist. Check the path"):
        load_model(tmp_path / "model.safetensors")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CryoFilterError, match="is a folder; expected a model file"):
        load_model(tmp_path)


def test_an_unwritable_place_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CryoFilterError, match=r"can't be written .* Check the folder"):
        MODEL.save(tmp_path / "missing" / "model.safetensors")


def test_a_failed_save_leaves_the_old_model_alone(tmp_path: Path, monkeypatch) -> None:
    MODEL.save(tmp_path / "model")
    before = (tmp_path / "model").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(CryoFilterError, match="No space left on device"):
        replace(MODEL, temperature=1.0).save(tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a whole safetensors file"),
        (b"data_particles\n", "expected a model, but this is a STAR file"),
        (b"PK\x03\x04" + bytes(100), "expected a model, but this is a zip archive"),
    ],
)
def test_a_file_of_another_kind_is_no_model(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CryoFilterError, match=said):
        load_model(tmp_path / "model.safetensors")


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    MODEL.save(tmp_path / "model")
    (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:-10])
    with pytest.raises(CryoFilterError, match="is not a whole safetensors file"):
        load_model(tmp_path / "model")


def test_safetensors_of_another_program_are_no_model(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CryoFilterError, match="but not a model of relion_cryofilter"):
        load_model(tmp_path / "other.safetensors")


def rewrite(path: Path, change_metadata=None, change_tensors=None) -> None:
    """Save MODEL to `path` with changed metadata or tensors."""
    MODEL.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[checkpoint.METADATA_KEY])
    tensors = {name: tensor.contiguous() for name, tensor in MODEL.network.state_dict().items()}
    text = json.dumps(metadata)
    if change_metadata is not None:
        text = change_metadata(metadata) or json.dumps(metadata)
    if change_tensors is not None:
        change_tensors(tensors)
    safetensors.torch.save_file(tensors, path, {checkpoint.METADATA_KEY: text})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2, package_version="9.1"), r"format 2 .*9\.1.*Update"),
        (lambda m: m.pop("format_version") and None, "metadata can't be read"),
        (lambda m: "{broken", "metadata can't be read"),
        (lambda m: "[1]", "metadata can't be read"),
        (lambda m: m.pop("threshold") and None, "incomplete or damaged .*'threshold'"),
        (lambda m: m.update(preprocess=None), "incomplete or damaged"),
        (lambda m: m.update(threshold="high"), "incomplete or damaged"),
        (lambda m: m.update(threshold=3), "model: The model's threshold is 3"),
        (lambda m: m["network"].update(name="resnet"), "model: Network 'resnet' is unknown"),
        (lambda m: m["network"]["kwargs"].update(g=1), "has no parameter 'g'"),
        (lambda m: m["preprocess"].update(name="wavelets"), "Preprocessing 'wavelets' is unknown"),
        (lambda m: m["network"]["kwargs"].update(f=8), r"needs tensor .* found \(4,"),
    ],
)
def test_metadata_that_cannot_be_used_are_refused(tmp_path: Path, change, message: str) -> None:
    rewrite(tmp_path / "model", change_metadata=change)
    with pytest.raises(CryoFilterError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"head.bias": torch.zeros(3)}),
            r"head.bias of shape \(1,\), found \(3",
        ),
        (lambda t: t.pop("head.bias"), r"head.bias of shape \(1,\), found nothing"),
        (lambda t: t.update(more=torch.zeros(3)), "has no tensor more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change, message: str) -> None:
    rewrite(tmp_path / "model", change_tensors=change)
    with pytest.raises(CryoFilterError, match=message):
        load_model(tmp_path / "model")


def in_each(change):
    """Return what changes the first value of the first convolution's weights."""

    def changed(tensors):
        name = next(name for name in tensors if name.endswith("weight"))
        tensors[name] = change(tensors[name].clone())

    return changed


def with_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_first(torch.nan), "holds NaN, infinity or values above 1e\\+06"),
        (with_first(-torch.inf), "holds NaN, infinity"),
        (with_first(1e20), "values above 1e\\+06"),
        (torch.Tensor.int, r"holds torch.int32; expected torch.float32"),
        (lambda t: t.to(torch.complex64), "holds torch.complex64; expected torch.float32"),
        (lambda t: t.half(), "holds torch.float16; expected torch.float32"),
        (lambda t: t.double(), "holds torch.float64; expected torch.float32"),
        (lambda t: 1e5 * t, "hash|no numbers"),
        (with_first(0.125), "its weights have the hash .* damaged or was edited"),
    ],
)
def test_weights_that_no_training_left_are_refused(tmp_path: Path, change, message: str) -> None:
    rewrite(tmp_path / "model", change_tensors=in_each(change))
    with pytest.raises(CryoFilterError, match=f"model: .*({message})"):
        load_model(tmp_path / "model")


def test_a_negative_variance_is_refused() -> None:
    network = build_network("d4")
    name = next(name for name in network.state_dict() if name.endswith("variance"))
    network.state_dict()[name][0] = -1.0
    with pytest.raises(CryoFilterError, match=f"{name} holds a negative variance"):
        Model(network, FourierCrop(network.dim), 0.5)


def test_weights_that_overflow_together_are_refused() -> None:
    network = build_network("straight", f=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0).add_(9e5)
    with pytest.raises(CryoFilterError, match="an image of noise are no numbers"):
        Model(network, BlurResize(28), 0.5)


def test_a_model_file_without_its_hash_is_read(tmp_path: Path) -> None:
    """As those of before."""
    rewrite(tmp_path / "model", change_metadata=lambda m: m.pop("hash") and None)
    assert load_model(tmp_path / "model").hash == MODEL.hash

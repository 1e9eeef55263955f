"""Keras files of the 2020 program, and what that program itself gave for the same images.

The reference folder holds a genuine 2020 weights file (`roberts`, 32 filters, Apache-2.0), one of
`straight` (64 filters), 70 images, and the scores (four decimals) and features that the 2020
program made of them with tensorflow-cpu 2.15.1 and scikit-image 0.26.0.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from making import SHARED, write_keras

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.nn.model import import_keras, load_model
from relion_cryofilter.nn.networks import Network, build_network

h5py = pytest.importorskip("h5py", reason="h5py is missing: Keras files can't be read")

REFERENCE = SHARED / "keras"
NETWORKS = {"roberts": ("hackathon_roberts.h5", 32), "straight": ("straight_f64.h5", 64)}
FOUR_DECIMALS = 6e-5

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the 2020 program's reference results (shared/keras) are missing"
)


@pytest.fixture(scope="module")
def raw_images() -> torch.Tensor:
    mrcfile = pytest.importorskip("mrcfile")
    with mrcfile.open(REFERENCE / "images.mrcs") as file:
        return torch.from_numpy(np.array(file.data))


@needs_reference
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("tta", "csv"), [(False, "scores.csv"), (True, "scores_tta.csv")])
def test_scores_equal_those_of_the_2020_program(name, tta, csv, raw_images) -> None:
    model = load_model(REFERENCE / NETWORKS[name][0])
    expected = np.loadtxt(REFERENCE / f"{name}_{csv}", delimiter=",")[:, 1]

    scores = model.probabilities(model.preprocess(raw_images), tta=tta)

    np.testing.assert_allclose(scores.numpy(), expected, atol=FOUR_DECIMALS, rtol=0)


@needs_reference
@pytest.mark.parametrize("name", NETWORKS)
def test_features_equal_those_of_the_2020_program(name, raw_images) -> None:
    model = load_model(REFERENCE / NETWORKS[name][0])
    expected = np.load(REFERENCE / f"{name}_features.npy")

    _, features = model.probabilities_and_features(model.preprocess(raw_images))

    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-4, atol=1e-5)


@needs_reference
@pytest.mark.parametrize("name", NETWORKS)
def test_an_imported_model_says_what_it_is_and_survives_its_file(name, tmp_path: Path) -> None:
    file, filters = NETWORKS[name]
    model = import_keras(REFERENCE / file)
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert (model.network.name, model.network.kwargs) == (name, {"f": filters, "dim": 28})
    assert model.threshold == 0.5
    assert model.provenance["file"] == file
    assert len(model.provenance["file_sha256"]) == 64
    assert (again.hash, again.provenance) == (model.hash, model.provenance)


def scores_of(network: Network) -> torch.Tensor:
    x = torch.randn(4, 2, network.dim, network.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "how", [{}, {"first": 7}, {"first": 95}, {"whole_model": True}, {"colons": False}]
)
def test_layers_are_sorted_by_number_wherever_they_lie(name, how, tmp_path: Path) -> None:
    network = build_network(name, f=3)
    write_keras(tmp_path / "weights.h5", network, **how)
    model = load_model(tmp_path / "weights.h5")
    torch.testing.assert_close(scores_of(model.network), scores_of(network))


def test_a_keras_file_is_recognised_whatever_its_name(tmp_path: Path) -> None:
    write_keras(tmp_path / "weights", build_network("straight", f=3))
    assert load_model(tmp_path / "weights").network.name == "straight"


def test_a_whole_model_tells_its_image_size(tmp_path: Path) -> None:
    write_keras(tmp_path / "model.h5", build_network("straight", f=3, dim=52), whole_model=True)
    model = load_model(tmp_path / "model.h5")
    assert (model.network.dim, model.preprocess.dim) == (52, 52)
    with pytest.raises(CryoFilterError, match=r"image size is 52 by the file's .* 64 was asked"):
        import_keras(tmp_path / "model.h5", dim=64)


def test_bare_weights_of_another_image_size_need_to_be_told_it(tmp_path: Path) -> None:
    write_keras(tmp_path / "weights.h5", build_network("straight", f=3, dim=52))
    with pytest.raises(CryoFilterError, match=r"image sizes of 48 to 55 px, not 28\. .*--img_dim"):
        load_model(tmp_path / "weights.h5")
    assert import_keras(tmp_path / "weights.h5", dim=52).network.dim == 52


def test_beliefs_that_agree_are_accepted(tmp_path: Path) -> None:
    write_keras(tmp_path / "weights.h5", build_network("straight", f=3))
    model = import_keras(tmp_path / "weights.h5", f=3, dim=28, network="straight")
    assert model.network.kwargs == {"f": 3, "dim": 28}


@pytest.mark.parametrize(
    ("beliefs", "message"),
    [
        ({"f": 32}, "f is 3 by the file's layers, but 32 was asked for"),
        ({"network": "roberts"}, "network is straight by the file's .* roberts was asked for"),
        ({"dim": 64}, "fits image sizes of 24 to 31 px, not 64"),
    ],
)
def test_beliefs_that_disagree_are_named(beliefs, message: str, tmp_path: Path) -> None:
    write_keras(tmp_path / "weights.h5", build_network("straight", f=3))
    with pytest.raises(CryoFilterError, match=message):
        import_keras(tmp_path / "weights.h5", **beliefs)


def drop(name: str):
    return lambda file: file.__delitem__(name)


def put(name: str, *shape: int):
    def change(file) -> None:
        if name in file:
            del file[name]
        file[name] = np.zeros(shape, np.float32)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("conv2d_3"), "holds 5 convolutions; expected the 2020 `straight`"),
        (drop("dense_1"), "holds 0 dense layers"),
        (drop("conv2d_3/conv2d_3/bias:0"), "layer 'conv2d_3/conv2d_3' with kernel"),
        (put("bn/gamma:0", 3), "layer 'bn' with gamma"),
        (put("other_3/kernel:0", 3), "layer 'other_3' with kernel"),
        (put("conv2d/conv2d/kernel:0", 5, 5, 1, 3), r"convolution 1 with a kernel of \(5, 5, 1, 3"),
        (put("conv2d_1/conv2d_1/kernel:0", 3, 3, 3, 4), r"instead of \(3, 3, 3, 3\)"),
        (put("dense_1/dense_1/kernel:0", 27, 2), "a dense layer of 27 x 2"),
        (put("dense_1/dense_1/kernel:0", 28, 1), "a dense layer of 28 x 1"),
        (put("dense_1/dense_1/bias:0", 2), r"a bias of \(2,\)"),
    ],
)
def test_other_keras_networks_are_refused(change, message: str, tmp_path: Path) -> None:
    write_keras(tmp_path / "weights.h5", build_network("straight", f=3))
    with h5py.File(tmp_path / "weights.h5", "a") as file:
        change(file)
    with pytest.raises(CryoFilterError, match=message):
        import_keras(tmp_path / "weights.h5")


def test_two_layers_of_one_number_are_refused(tmp_path: Path) -> None:
    write_keras(tmp_path / "weights.h5", build_network("straight", f=3))
    with h5py.File(tmp_path / "weights.h5", "a") as file:
        file.copy(file["conv2d_3"], file, "again_3")
        file.move("again_3/conv2d_3", "again_3/again_3")
    with pytest.raises(CryoFilterError, match="two layers numbered 3"):
        import_keras(tmp_path / "weights.h5")


def test_a_damaged_keras_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.h5").write_bytes(b"not HDF5")
    with pytest.raises(CryoFilterError, match=r"is not a readable Keras \.h5 file"):
        load_model(tmp_path / "weights.h5")


def test_a_missing_keras_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CryoFilterError, match=r"weights\.h5 doesn't exist"):
        import_keras(tmp_path / "weights.h5")


def test_without_h5py_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch) -> None:
    write_keras(tmp_path / "weights.h5", build_network("straight", f=3))
    real = importlib.import_module

    def without_h5py(name: str, *more: object) -> object:
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", without_h5py)
    with pytest.raises(CryoFilterError, match="pip install h5py"):
        import_keras(tmp_path / "weights.h5")


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "holds NaN"), (np.inf, "holds NaN, infinity"), (1e30, "values above"),
     ("int", "of type int64"), ("complex", "of type complex128")],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, message) -> None:
    write_keras(tmp_path / "a.h5", build_network("straight", f=2))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        head = file["dense_1/dense_1/kernel:0"]
        if isinstance(value, str):
            kept = np.zeros(head.shape, value)
            del file["dense_1/dense_1/kernel:0"]
            file["dense_1/dense_1/kernel:0"] = kept
        else:
            head[0, 0] = value
    with pytest.raises(CryoFilterError, match=f"a.h5.*{message}"):
        load_model(tmp_path / "a.h5")

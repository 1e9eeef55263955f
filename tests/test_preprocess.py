"""Raw boxes to network input, checked against scikit-image, numpy's FFT and symmetry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.images.preprocess import (
    BlurResize,
    FourierCrop,
    d4_views,
    fourier_crop_operator,
    preprocess_from_dict,
    roberts_cross,
)

RECIPES = [BlurResize(), BlurResize(dim=32, roberts=True), FourierCrop(), FourierCrop(28, 3.0)]


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape)).float()


def standardised(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / image.std()


@pytest.mark.parametrize(
    "shape", [(128, 128), (101, 101), (64, 64), (28, 28), (20, 20), (27, 40), (200, 24), (2, 3)]
)
@pytest.mark.parametrize("dim", [28, 33])
def test_blur_resize_equals_scikit_image(shape: tuple[int, int], dim: int) -> None:
    filters = pytest.importorskip("skimage.filters")
    transform = pytest.importorskip("skimage.transform")
    image = noise(*shape).numpy()
    small = transform.resize(filters.gaussian(image, sigma=3), (dim, dim))

    ours = BlurResize(dim)(torch.from_numpy(image)[None])[0, 0].numpy()

    np.testing.assert_allclose(ours, standardised(small), atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 128), (101, 101), (20, 20), (27, 40)])
def test_the_second_channel_is_the_roberts_cross_of_scikit_image(shape: tuple[int, int]) -> None:
    filters = pytest.importorskip("skimage.filters")
    transform = pytest.importorskip("skimage.transform")
    image = noise(*shape).numpy()
    edges = filters.roberts(transform.resize(filters.gaussian(image, sigma=3), (28, 28)))

    ours = BlurResize(28, roberts=True)(torch.from_numpy(image)[None])[0, 1].numpy()

    np.testing.assert_allclose(ours, standardised(edges), atol=1e-5)


def test_the_roberts_cross_repeats_the_last_row_and_column() -> None:
    image = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.5**0.5, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(roberts_cross(image), expected)


@pytest.mark.parametrize("box", [128, 101, 48, 47, 30])
@pytest.mark.parametrize("dim", [48, 33])
def test_the_views_of_a_fourier_crop_are_the_fourier_crops_of_the_views(box: int, dim: int) -> None:
    images = noise(3, box, box)
    crop = FourierCrop(dim)
    for of_small, raw in zip(d4_views(crop(images)), d4_views(images), strict=True):
        torch.testing.assert_close(of_small, crop(raw), atol=1e-5, rtol=0)


def test_the_eight_views_are_all_different_and_start_with_the_identity() -> None:
    image = noise(5, 5)
    views = list(d4_views(image))
    assert torch.equal(views[0], image)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


@pytest.mark.parametrize(("box", "dim"), [(128, 48), (101, 48), (128, 33), (30, 48), (31, 48)])
def test_a_fourier_crop_keeps_the_amplitude_of_low_frequencies(box: int, dim: int) -> None:
    for cycles in range(min(box, dim) // 2):
        if 2 * cycles + 1 >= min(box, dim):
            continue

        def wave(size: int, cycles: int = cycles) -> np.ndarray:
            return np.cos(2 * np.pi * cycles * (np.arange(size) + 0.5) / size + 0.3)

        cropped = fourier_crop_operator(box, dim) @ wave(box)
        np.testing.assert_allclose(cropped, wave(dim), atol=1e-9)


@pytest.mark.parametrize(("box", "dim"), [(128, 48), (101, 48), (101, 33)])
def test_a_fourier_crop_removes_all_above_the_new_nyquist(box: int, dim: int) -> None:
    for cycles in range(dim // 2 + 1, box // 2 + 1):
        wave = np.cos(2 * np.pi * cycles * np.arange(box) / box + 0.3)
        assert np.abs(fourier_crop_operator(box, dim) @ wave).max() < 1e-9


@pytest.mark.parametrize("box", [48, 33])
def test_a_fourier_crop_to_the_same_size_changes_nothing(box: int) -> None:
    np.testing.assert_allclose(fourier_crop_operator(box, box), np.eye(box), atol=1e-12)


def test_a_fourier_crop_equals_numpy_fft_for_odd_sizes() -> None:
    signal = np.random.default_rng(0).normal(size=101)
    spectrum = np.fft.fftshift(np.fft.fft(signal))[50 - 16 : 50 + 17]
    cycles = np.arange(-16, 17)
    half_pixels = np.exp(1j * np.pi * cycles * (1 / 33 - 1 / 101))
    cropped = np.fft.ifft(np.fft.ifftshift(spectrum * half_pixels)).real * 33 / 101
    np.testing.assert_allclose(fourier_crop_operator(101, 33) @ signal, cropped, atol=1e-12)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_map_has_the_promised_shape_zero_mean_and_unit_std(recipe) -> None:
    small = recipe(noise(4, 60, 70))
    assert small.shape == (4, recipe.channels, recipe.dim, recipe.dim)
    assert small.dtype == torch.float32
    assert small.mean(dim=(-2, -1)).abs().max() < 0.05
    assert (small.std(dim=(-2, -1)) - 1).abs().max() < 0.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_brightness_and_contrast_do_not_matter(recipe) -> None:
    images = noise(2, 60, 60)
    torch.testing.assert_close(recipe(images * 7 + 3), recipe(images), atol=2e-4, rtol=0)


def test_outliers_are_clipped() -> None:
    image = noise(1, 96, 96)
    image[0, 40:44, 40:44] = 1000
    assert FourierCrop(48, clip_sigma=4.0)(image).max() == 4.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pixel", [(0, 0), (31, 17), (63, 63)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_bad_pixel_makes_its_image_nan_and_leaves_the_others_alone(recipe, pixel, bad) -> None:
    images = noise(5, 64, 64)
    expected = recipe(images)
    images[2][pixel] = bad

    small = recipe(images)

    assert small[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(small[others], expected[others])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e6, 1e-6])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_constant_image_comes_out_as_nan(recipe, value: float) -> None:
    images = torch.stack([torch.full((64, 64), value), noise(64, 64)])
    small = recipe(images)
    assert small[0].isnan().all()
    assert small[1].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_images_give_no_small_images(recipe) -> None:
    assert recipe(torch.zeros(0, 64, 64)).shape == (0, recipe.channels, recipe.dim, recipe.dim)


@pytest.mark.parametrize("recipe", RECIPES)
def test_half_precision_boxes_are_worked_on_in_single_precision(recipe) -> None:
    half = noise(2, 64, 64).half()
    assert torch.equal(recipe(half), recipe(half.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ny", "nx"), [(24, 24), (75, 60), (256, 256), (450, 450)])
def test_a_small_image_does_not_depend_on_its_company(ny, nx, dtype) -> None:
    recipe, images = FourierCrop(dim=16), torch.randn(19, ny, nx)
    together = recipe(images, dtype)
    for first, last in ((0, 1), (3, 4), (0, 7), (2, 19), (10, 15)):
        assert torch.equal(recipe(images[first:last], dtype), together[first:last])


@pytest.mark.parametrize(("ny", "nx"), [(24, 24), (75, 60), (256, 256), (450, 450)])
def test_a_crop_is_two_matrix_products(ny, nx) -> None:
    images = torch.randn(9, ny, nx)
    rows, columns = (torch.from_numpy(fourier_crop_operator(n, 16)) for n in (ny, nx))
    product = rows @ images.double() @ columns.T
    spread = product.std(dim=(1, 2), unbiased=False, keepdim=True)
    expected = (product - product.mean(dim=(1, 2), keepdim=True)) / spread
    torch.testing.assert_close(
        FourierCrop(dim=16, clip_sigma=99)(images)[:, 0].double(), expected, atol=1e-5, rtol=0
    )


def test_boxes_need_not_lie_side_by_side() -> None:
    recipe, images = FourierCrop(dim=16), torch.randn(64, 64, 64)
    turned = images.transpose(1, 2)
    assert torch.equal(recipe(turned), recipe(turned.contiguous()))


def test_the_kept_operators_serve_training_after_inference() -> None:
    with torch.inference_mode():
        FourierCrop(29)(noise(1, 61, 61))
    images = noise(1, 61, 61).requires_grad_()
    FourierCrop(29)(images).sum().backward()
    assert images.grad is not None


def test_a_single_image_without_its_batch_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(64, 64\); expected \(n, ny, nx\)"):
        FourierCrop()(noise(64, 64))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_its_dictionary(recipe) -> None:
    assert preprocess_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "wavelets"}, "Preprocessing 'wavelets' is unknown; known are blur_resize, four"),
        ({"dim": 28}, "Preprocessing None is unknown"),
        ({"name": "blur_resize", "sigma": 2}, "blur_resize has no field 'sigma'; it has dim, rob"),
        ({"name": "fourier_crop", "dim": 0}, "side is 0; expected a whole number from 2"),
        ({"name": "fourier_crop", "dim": "48"}, "side is '48'; expected a whole number"),
        ({"name": "fourier_crop", "clip_sigma": 0}, "clip_sigma is 0; it must be above 0"),
    ],
)
def test_an_unknown_recipe_or_a_senseless_value_is_named(recipe, message: str) -> None:
    with pytest.raises(CryoFilterError, match=message):
        preprocess_from_dict(recipe)

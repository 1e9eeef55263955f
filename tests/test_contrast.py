"""Inverted contrast is refused, with advice; what is right or can't be told goes on."""

from __future__ import annotations

import mrcfile
import numpy as np
import pytest
import torch

from relion_cryofilter.images.contrast import centre_contrast, looks_dark
from relion_cryofilter.images.preprocess import BlurResize, FourierCrop
from relion_cryofilter.relion import job
from relion_cryofilter.simulate import simulate_images

PARTICLES = "Extract/job001/particles.star"


@pytest.fixture(scope="module")
def images():
    return simulate_images(5, 420, 48, 0.05, pixel_size_angstrom=4.0)


@pytest.mark.parametrize("recipe", [FourierCrop(48), BlurResize(28)], ids=["crop", "blur"])
def test_white_and_dark_are_told_apart(images, recipe):
    raw = torch.from_numpy(images.images)
    for kept in (images.labels >= 0, images.labels == 1):
        micrographs = np.arange(420)[kept] // 30
        assert not looks_dark(centre_contrast(recipe(raw[kept])).numpy(), micrographs)
        assert looks_dark(centre_contrast(recipe(-raw[kept])).numpy(), micrographs)


def test_a_shell_is_not_taken_for_dark():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48] - 23.5
    ring = np.exp(-((np.hypot(x, y) - 13) ** 2) / 8)
    shells = rng.normal(size=(200, 48, 48)) + ring - 0.3 * (np.hypot(x, y) < 8)
    small = FourierCrop(48)(torch.from_numpy(shells.astype(np.float32)))
    contrast = centre_contrast(small)
    assert contrast.mean(0).min() < 0, "the middle is dark at one scale"
    assert not looks_dark(contrast.numpy(), np.arange(200) // 20)


def test_noise_and_few_images_tell_nothing():
    noise = FourierCrop(48)(torch.randn(400, 48, 48, generator=torch.Generator().manual_seed(0)))
    contrast = centre_contrast(noise).numpy()
    assert not looks_dark(contrast, np.arange(400) // 20)
    assert not looks_dark(contrast[:20] - 1, np.arange(20)), "too few"
    assert looks_dark(contrast - 1, np.arange(400) // 20)
    contrast[::2] = np.nan
    assert looks_dark(contrast - 1, np.arange(400) // 20), "NaN is left out"


@pytest.fixture
def dark_project(project):
    """A project whose images are turned over; chdir is the project."""
    for path in project.glob("Extract/job001/Mics/*.mrcs"):
        with mrcfile.open(path, "r+", permissive=True) as file:
            file.set_data(np.repeat(-file.data - 4 * file.data.mean(), 1, axis=0))
    return project


def test_a_dark_set_is_refused_with_advice(dark_project, capsys):
    many = dark_project / PARTICLES
    lines = many.read_text().splitlines(keepends=True)
    rows = [line for line in lines if "@" in line]
    many.write_text("".join([*lines[: lines.index(rows[0])], *rows * 2]))
    words = ["score", "--o", "External/job002/", "--in_parts", PARTICLES, "--j", "1"]
    code = job.main(words)
    printed = capsys.readouterr()
    assert code != 0
    assert "Invert contrast" in printed.err + printed.out
    assert "--any_contrast" in printed.err + printed.out
    assert (dark_project / "External/job002/RELION_JOB_EXIT_FAILURE").exists()
    assert not (dark_project / "External/job002/particles.star").exists()
    assert job.main([*words, "--any_contrast"]) == 0

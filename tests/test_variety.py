"""Varied simulation: the same numbers give the same images, and everything promised occurs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from making import ROOT
from scipy.fft import rfft2

from relion_cryofilter import simulate

sys.path.insert(0, str(ROOT / "benchmarks/pretraining"))

from shapes import SHAPE_SHARES, filament, random_shape
from textures import ARTEFACTS, DETECTORS, artefact, detector, frequencies, process, pure_noise
from variety import BESIDE, CENTRED, CONTAMINANTS, VariedImages, simulate_varied


@pytest.fixture(scope="module")
def varied() -> VariedImages:
    return simulate_varied(3, range(80), picks=20, box_px=32)


def test_a_micrograph_depends_on_its_number_alone(varied: VariedImages) -> None:
    again = simulate_varied(3, [7], picks=20, box_px=32)
    rows = varied.micrographs == 7
    assert np.array_equal(again.images, varied.images[rows])
    assert np.array_equal(again.kinds, varied.kinds[rows])
    other = simulate_varied(4, [7], picks=20, box_px=32)
    assert not np.array_equal(again.images, other.images)


def test_every_kind_occurs_and_labels_say_what_is_a_particle(
    varied: VariedImages,
) -> None:
    assert set(varied.kinds) == {*simulate.KINDS, *ARTEFACTS, *CONTAMINANTS}
    assert np.array_equal(varied.labels == 1, varied.kinds == "particle")
    assert np.isfinite(varied.images).all()


def test_targets_fall_from_good_to_bad_as_a_pick_leaves_the_centre(varied: VariedImages) -> None:
    targets, kinds = varied.targets, varied.kinds
    assert (targets[kinds == "particle"] >= 0.5).all()
    assert (targets[kinds == "off_centre"] < 0.5).all()
    assert not targets[~np.isin(kinds, ["particle", "off_centre"])].any()
    between = (targets > 0) & (targets < 1)
    assert 0.02 < between.mean() < 0.3
    assert CENTRED >= 0.1
    assert BESIDE <= 0.25


@pytest.mark.parametrize("kind", SHAPE_SHARES)
def test_every_shape_has_the_diameter_asked_for_and_is_centred(kind: str) -> None:
    shape = random_shape(np.random.default_rng(5), 120.0, kind)
    assert shape.diameter_angstrom == pytest.approx(120)
    assert np.abs(np.average(shape.atoms, axis=0, weights=shape.weights)).max() < 12
    assert (shape.weights > 0).all()


def test_a_filament_runs_through_its_middle_along_x() -> None:
    atoms = filament(np.random.default_rng(6), 500.0, 60.0).atoms
    assert np.ptp(atoms[:, 0]) > 450
    near = np.abs(atoms[:, 0]) < 20
    assert np.linalg.norm(atoms[near, 1:], axis=1).max() < 60


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_dampen_high_frequencies_and_nothing_else(name: str) -> None:
    f = frequencies((32, 32))
    for _ in range(5):
        mtf, nps = detector(np.random.default_rng(7), f, name)
        assert mtf[0, 0] == pytest.approx(1, abs=0.05)
        assert (mtf > 0).all()
        assert (nps > 0).all()
        assert mtf[f > 0.9].mean() <= mtf[f < 0.3].mean()


def test_noise_has_many_spectra_and_processing_keeps_what_it_is_given() -> None:
    """The share of power beyond half of Nyquist, 0.8 of white noise, goes from little to all."""
    rng, shares = np.random.default_rng(8), []
    for _ in range(40):
        boxes = pure_noise(rng, 4, 32)
        assert boxes.shape == (4, 32, 32)
        assert np.isfinite(boxes).all()
        power = (np.abs(rfft2(boxes - boxes.mean((1, 2), keepdims=True))) ** 2).mean(0)
        shares.append(power[frequencies((32, 32)) > 0.5].sum() / power.sum())
    assert min(shares) < 0.2
    assert max(shares) > 0.7
    boxes = rng.normal(size=(3, 32, 32))
    kept = [np.corrcoef(process(rng, boxes).ravel(), boxes.ravel())[0, 1] for _ in range(40)]
    assert max(kept) > 0.99
    assert min(kept) > 0


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_an_artefact_leaves_its_mark(kind: str) -> None:
    rng = np.random.default_rng(9)
    noise = rng.normal(size=(32, 32)).astype(np.float32)
    marked = [artefact(rng, noise, kind) for _ in range(4)]
    assert all(np.isfinite(image).all() for image in marked)
    assert not any(np.array_equal(image, noise) for image in marked)


def test_a_composite_is_its_background_where_nothing_stands() -> None:
    backgrounds = np.random.default_rng(10).normal(size=(20, 32, 32)).astype(np.float32)
    made = simulate_varied(3, range(6), picks=20, box_px=32, backgrounds=backgrounds)
    found = np.array([image.std() for image in made.images])
    assert set(made.kinds) <= {*simulate.KINDS, *CONTAMINANTS}
    assert np.median(found[made.kinds == "empty"]) < 1.1
    assert found[made.kinds == "particle"].max() > found[made.kinds == "empty"].mean()


def test_a_bent_molecule_keeps_one_part_and_its_size() -> None:
    rng = np.random.default_rng(0)
    rigid = simulate.random_molecule(rng, 100.0)
    bent = simulate.Molecule(rigid.atoms, rigid.weights, bend_degrees=30.0)
    views = np.eye(3)[None]
    pose = simulate.Molecule(rigid.atoms, rigid.weights, views=views).pose(rng)[0]
    # Up to 10 degrees out of the plane: heights change by no more than sin(10°) of the radius.
    assert np.abs(pose[:, 2] - rigid.atoms[:, 2]).max() < 50 * (np.sin(np.deg2rad(10)) + 0.02)
    distances = [
        np.linalg.norm(atoms[:500] - atoms[500:1000], axis=1)
        for atoms in (rigid.atoms, rigid.pose(rng)[0], bent.pose(rng)[0])
    ]
    assert np.allclose(distances[0], distances[1])
    assert not np.allclose(distances[0], distances[2])


def test_jitter_and_crowding_are_what_was_asked_for() -> None:
    molecule = simulate.random_molecule(np.random.default_rng(1), 60.0)
    side = {}
    for spacing in (0.9, 1.8):
        field = simulate.Field(spacing=spacing, jitter=0.0)
        image, picks = simulate.simulate_micrograph(
            np.random.default_rng(2), molecule, ["particle"] * 12, box_px=32, field=field
        )
        places = np.stack([picks.x, picks.y], 1)
        apart = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(12)
        assert apart.min() > 0.9 * spacing * 20
        side[spacing] = len(image)
    assert side[0.9] < side[1.8]

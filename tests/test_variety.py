"""Varied simulation: the same numbers give the same images, and everything promised occurs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from making import ROOT

from relion_cryofilter import simulate

sys.path.insert(0, str(ROOT / "benchmarks/pretraining"))

from variety import ARTEFACTS, simulate_varied


@pytest.fixture(scope="module")
def varied() -> simulate.SimulatedImages:
    return simulate_varied(3, range(60), picks=20, box_px=32)


def test_a_micrograph_depends_on_its_number_alone(varied: simulate.SimulatedImages) -> None:
    again = simulate_varied(3, [7], picks=20, box_px=32)
    rows = varied.micrographs == 7
    assert np.array_equal(again.images, varied.images[rows])
    assert np.array_equal(again.kinds, varied.kinds[rows])
    other = simulate_varied(4, [7], picks=20, box_px=32)
    assert not np.array_equal(again.images, other.images)


def test_every_kind_occurs_and_labels_say_what_is_a_particle(
    varied: simulate.SimulatedImages,
) -> None:
    assert set(varied.kinds) == {*simulate.KINDS, *ARTEFACTS}
    assert np.array_equal(varied.labels == 1, varied.kinds == "particle")
    assert np.isfinite(varied.images).all()


def test_a_bent_molecule_keeps_one_part_and_its_size() -> None:
    rng = np.random.default_rng(0)
    rigid = simulate.random_molecule(rng, 100.0)
    bent = simulate.Molecule(rigid.atoms, rigid.weights, bend_degrees=30.0)
    views = np.eye(3)[None]
    pose = simulate.Molecule(rigid.atoms, rigid.weights, views=views).pose(rng)
    # Up to 10 degrees out of the plane: heights change by no more than sin(10°) of the radius.
    assert np.abs(pose[:, 2] - rigid.atoms[:, 2]).max() < 50 * (np.sin(np.deg2rad(10)) + 0.02)
    distances = [
        np.linalg.norm(atoms[:500] - atoms[500:1000], axis=1)
        for atoms in (rigid.atoms, rigid.pose(rng), bent.pose(rng))
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

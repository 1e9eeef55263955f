"""The public names are there, and the command line does not pay for them."""

from __future__ import annotations

import numpy as np
import pytest

import relion_cryofilter
from relion_cryofilter import ScoreOptions, score


@pytest.mark.parametrize("name", relion_cryofilter.__all__)
def test_every_public_name_exists_and_is_documented(name):
    assert getattr(relion_cryofilter, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        relion_cryofilter.nonsense  # noqa: B018


def test_score_works_from_python_without_a_job(project):
    outputs = score(
        ScoreOptions(
            in_parts="Extract/job001/particles.star", o="out/", weights="model.safetensors"
        )
    )
    assert {output.file_name for output in outputs} >= {"particles.star"}
    assert np.loadtxt("out/scores.csv", delimiter=",").shape == (48, 2)

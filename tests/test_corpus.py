"""Public STAR files of many dialects: verbatim, or refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from making import SHARED, without_score

from relion_cryofilter.errors import StarError
from relion_cryofilter.particles.particles import read_particles

FILES = sorted((SHARED / "star_corpus").glob("*.star"))
REFUSED = {"sample.star": "no particles found"}


@pytest.mark.shared("star_corpus")
@pytest.mark.parametrize("path", FILES or [None], ids=lambda path: path.name if path else "none")
def test_every_file_of_the_corpus_comes_back_or_is_refused_with_a_reason(path, tmp_path):
    if path.name in REFUSED:
        with pytest.raises(StarError, match=REFUSED[path.name]):
            read_particles(path)
        return
    particles = read_particles(path)
    scores = np.linspace(0, 1, len(particles))
    out = tmp_path / "out.star"
    particles.table.write({out: scores >= 0}, scores)
    assert without_score(out.read_bytes()) == path.read_bytes()


@pytest.mark.shared("relion_projects")
@pytest.mark.parametrize("version", ["v31", "v5"])
def test_every_particle_file_of_the_relion_projects_comes_back(shared, version, tmp_path):
    found = 0
    for path in (shared / "relion_projects" / version).rglob("*.star"):
        if path.name != "particles.star" and not path.name.endswith("_data.star"):
            continue
        particles = read_particles(path)
        scores = np.linspace(0, 1, len(particles))
        out = tmp_path / "out.star"
        particles.table.write({out: scores >= 0}, scores)
        assert without_score(out.read_bytes()) == path.read_bytes()
        assert all(stack.is_file() for stack in particles.stacks)
        found += 1
    assert found == 3

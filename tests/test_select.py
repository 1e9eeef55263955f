"""A scored file is sorted again by another threshold, without images and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from making import JOB

from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.relion import job


@pytest.fixture
def scores(scored):
    """The scores of S/; its images are gone."""
    Path(JOB).rename("S")
    for stack in Path("Extract/job001/Mics").iterdir():
        stack.unlink()
    return np.loadtxt("S/scores.csv", delimiter=",")[:, 1]


@pytest.mark.parametrize(
    ("request_text", "count"), [("keep=0.25", 12), ("count=20", 20), ("keep=100%", 48)]
)
def test_a_share_or_a_number_is_kept(scores, request_text, count, capsys):
    words = f"select --in_parts S/particles.star --threshold {request_text} --o T/"
    assert job.main(words.split()) == 0
    assert len(read_particles(Path("T/particles_accepted.star"))) == count
    assert f"{count} accepted" in capsys.readouterr().out
    assert Path("T/RELION_JOB_EXIT_SUCCESS").exists()
    if count < 48:
        assert len(read_particles(Path("T/particles_rejected.star"))) == 48 - count
        assert "particles_rejected.star" in Path("T/RELION_OUTPUT_NODES.star").read_text()
    else:
        assert not Path("T/particles_rejected.star").exists()


def test_rows_are_copied_byte_for_byte(scores):
    assert (
        job.main(
            [
                "--mode",
                "select",
                "--in_parts",
                "S/particles.star",
                "--threshold",
                "0.5",
                "--o",
                "T/",
            ]
        )
        == 0
    )
    source = Path("S/particles.star").read_text().splitlines()
    parts = [Path(f"T/particles_{name}.star").read_text() for name in ("accepted", "rejected")]
    rows = [line for part in parts for line in part.splitlines() if "@" in line]
    assert sorted(rows) == sorted(line for line in source if "@" in line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--in_parts S/particles.star --o T/", "Give --in_parts scored.star, --threshold"),
        (
            "--in_parts Extract/job001/particles.star --o T/ --threshold 0.5",
            "has no column rlnPart",
        ),
        (
            "--in_parts S/particles.star --o T/ --threshold recall=0.9",
            "needs the model that scored: --weights",
        ),
        (
            "--in_parts S/particles.star --o T/ --threshold recall=0.9 --weights model.safetensors",
            "has no validation curve",
        ),
        (
            "--in_parts S/particles_accepted.star --o S/ --threshold 0.9",
            "would overwrite the input",
        ),
        ("--in_parts S/particles.star --o T/ --threshold best", "'best' is not understood"),
    ],
)
def test_what_cannot_be_selected_is_said(scores, words, message, capsys):
    assert job.main(["select", *words.split()]) != 0
    assert message in capsys.readouterr().err


def test_select_does_not_wait_for_torch(scores):
    code = (
        "import sys\nfrom relion_cryofilter.relion.job import main\n"
        "assert main('select --in_parts S/particles.star --threshold 0.5 --o T/'.split()) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def with_bad_images(scored):
    """Say of the last twelve images of S/ that they can't be used, as --skip_bad does."""
    Path(JOB).rename("S")
    particles = read_particles(Path("S/particles.star"))
    names = [particles.image_name(row) for row in range(36, 48)]
    lines = (f"{row},{name},missing" for row, name in enumerate(names, 36))
    Path("S/bad_images.csv").write_text("row,image,reason\n" + "\n".join(lines) + "\n")
    return set(names)


def names_in(star):
    particles = read_particles(Path(star))
    return {particles.image_name(row) for row in range(len(particles))}


def test_images_that_cannot_be_used_are_neither_accepted_nor_drawn(with_bad_images, capsys):
    words = "select --in_parts S/particles.star --threshold keep=1 --random --o T/"
    assert job.main(words.split()) == 0
    assert "lists 12 images of these" in capsys.readouterr().out
    for name in ("accepted", "random"):
        assert len(names_in(f"T/particles_{name}.star")) == 36
        assert not names_in(f"T/particles_{name}.star") & with_bad_images
    assert names_in("T/particles_rejected.star") == with_bad_images


def test_images_that_cannot_be_used_are_not_classified(with_bad_images):
    assert job.main(["job", "--mode", "check", "--in_parts", "S/"]) == 0
    left = names_in("S/particles_rejected.star") - with_bad_images
    assert names_in("S/particles_rejected_sample.star") == left
    assert "S/particles_rejected_sample.star" in Path("job.star").read_text()

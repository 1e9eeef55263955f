"""Which image each row names: RELION's path rules, micrographs, optics groups."""

from __future__ import annotations

from pathlib import Path

import making
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relion_cryofilter.errors import ImageError, StarError
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.particles.particles import (
    concatenate,
    parse_image_name,
    parse_image_names,
    particles_of_stacks,
    read_particles,
)

HEAD = "data_particles\n\nloop_\n_rlnImageName #1\n"


def star(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("000012@a/x.mrcs", (11, "a/x.mrcs")),
        ("1@x.mrc:mrcs", (0, "x.mrc")),
        ("7@odd:name.mrcs", (6, "odd:name.mrcs")),
        ("x.mrc", (0, "x.mrc")),
    ],
)
def test_image_names_are_one_based_outside_and_zero_based_inside(name, place):
    assert parse_image_name(name) == place


@example(["1@2@3", "c"])
@example(["1@a", "2@b"])
@given(st.lists(st.text("1@:/\nm", min_size=1), max_size=6))
def test_many_image_names_are_split_like_each_one(names):
    try:
        each = [parse_image_name(name) for name in names]
    except ValueError:
        with pytest.raises(StarError, match="here"):
            parse_image_names(names, lambda row: f"here {row}")
    else:
        places, stacks = parse_image_names(names, lambda row: f"here {row}")
        assert list(zip(places, stacks)) == each


@pytest.mark.parametrize("name", ["0@x.mrcs", "x@y.mrcs", "-1@x.mrcs", "1@", "1.5@x.mrcs"])
def test_an_image_name_that_makes_no_sense_is_refused_with_its_line(tmp_path, name):
    with pytest.raises(StarError, match=r"\(line 5\): the image name is .*expected N@stack"):
        read_particles(star(tmp_path / "a.star", HEAD + f"{name}\n"))


def test_optics_groups_are_looked_up_row_by_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    particles = read_particles(making.write_project(tmp_path, boxes=(32, 64)))
    mics = [particles.micrographs[number] for number in particles.micrograph_of]
    pixel_sizes = [particles.optics[number].pixel_size_angstrom for number in particles.optics_of]
    even = ("Mics/mic0.mrc", "Mics/mic2.mrc")
    assert pixel_sizes == [3.0 if mic in even else 1.5 for mic in mics]


def test_optics_may_come_after_the_particles(tmp_path):
    text = HEAD + "_rlnOpticsGroup #2\n1@a.mrcs 4\n\n"
    text += "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n4 1.25\n"
    particles = read_particles(star(tmp_path / "a.star", text))
    assert particles.optics[particles.optics_of[0]].pixel_size_angstrom == 1.25


def test_an_optics_group_without_entry_is_refused(tmp_path):
    text = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n\n" + HEAD
    path = star(tmp_path / "a.star", text + "_rlnOpticsGroup #2\n1@a.mrcs 1\n2@a.mrcs 3\n")
    with pytest.raises(
        StarError, match=r"row 2 \(line 13\): optics group 3 is not in data_optics, .* has 1"
    ):
        read_particles(path)


def test_a_part_of_a_set_has_no_table_and_names_its_images(tmp_path):
    particles = read_particles(star(tmp_path / "a.star", HEAD + "1@a.mrcs\n7@b.mrcs\n"))
    part = particles.take(np.array([1]))
    assert part.table is None
    assert particles.table.labels == ("rlnImageName",)
    assert particles.place(1) == f"{tmp_path}/a.star, row 2 (line 6)"
    assert part.place(0) == "000007@b.mrcs"


def test_the_pixel_size_of_relion_30_comes_from_the_magnification(tmp_path):
    text = HEAD + "_rlnMagnification #2\n_rlnDetectorPixelSize #3\n1@a.mrcs 40000 5\n"
    particles = read_particles(star(tmp_path / "a.star", text))
    assert particles.optics[0].pixel_size_angstrom == pytest.approx(1.25)


def test_without_micrograph_names_the_stacks_stand_in(tmp_path):
    particles = read_particles(star(tmp_path / "a.star", HEAD + "1@a.mrcs\n1@b.mrcs\n2@a.mrcs\n"))
    assert particles.micrograph_of.tolist() == [0, 1, 0]
    assert particles.micrographs == ("a.mrcs", "b.mrcs")


def test_paths_are_relative_to_the_project_wherever_one_stands(tmp_path, monkeypatch):
    path = making.write_project(tmp_path / "project")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert all(stack.is_file() for stack in read_particles(path).stacks)
    monkeypatch.chdir(tmp_path / "project")
    assert str(read_particles(path).stacks[0]).startswith("Extract/")


def test_a_stack_beside_its_star_file_is_found(tmp_path):
    making.write_stack(tmp_path / "here" / "a.mrcs", making.blobs(2, 8))
    particles = read_particles(star(tmp_path / "here" / "a.star", HEAD + "1@a.mrcs\n"))
    assert particles.stacks[0].is_file()


def test_plain_stacks_give_their_images_in_order(tmp_path):
    for name, n in (("b", 3), ("a", 2)):
        making.write_stack(tmp_path / f"{name}.mrcs", making.blobs(n, 8))
    particles = particles_of_stacks([tmp_path / "b.mrcs", tmp_path / "a.mrcs"])
    assert particles.index.tolist() == [0, 1, 2, 0, 1]
    assert np.array_equal(particles.stack_of, [0, 0, 0, 1, 1])


def two_projects(tmp_path, monkeypatch):
    """Make two projects whose stacks have the same names; work in the first."""
    stars = [
        making.write_project(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))
    ]
    monkeypatch.chdir(tmp_path / "a")
    return stars


def test_a_stack_that_is_here_and_in_the_star_files_project_is_not_guessed(tmp_path, monkeypatch):
    ours, theirs = two_projects(tmp_path, monkeypatch)
    with pytest.raises(StarError, match=r"in the working directory.* and another of that name in"):
        read_particles(theirs)
    assert read_particles(ours).stacks[0].is_file()
    monkeypatch.chdir(tmp_path / "b")
    assert read_particles(theirs).stacks[0].is_file()


def test_one_stack_by_two_names_is_no_question(tmp_path, monkeypatch):
    _, theirs = two_projects(tmp_path, monkeypatch)
    for path in (tmp_path / "a/Extract/job001/Mics").iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "b/Extract/job001/Mics" / path.name)
    assert len(read_particles(theirs)) == 48


def test_a_list_is_a_table_of_one_row(tmp_path):
    optics = 'data_optics\n\n_rlnOpticsGroup 1\n_rlnImagePixelSize "0.8" # Å\n_rlnImageSize 64\n\n'
    text = optics + "data_particles\n\nloop_\n_rlnImageName\n_rlnOpticsGroup\n1@a.mrcs 1\n"
    (group,) = read_particles(star(tmp_path / "a.star", text)).optics
    assert (group.name, group.pixel_size_angstrom, group.box_px) == ("1", 0.8, 64)
    volumes = text.replace("_rlnImageSize 64", "_rlnImageDimensionality 3")
    with pytest.raises(StarError, match="the images are volumes"):
        read_particles(star(tmp_path / "b.star", volumes))
    other = text.replace("a.mrcs 1", "a.mrcs 2")
    with pytest.raises(StarError, match="optics group 2 is not in data_optics"):
        read_particles(star(tmp_path / "c.star", other))


@pytest.mark.parametrize("label", ["rlnCoordinateZ", "rlnCtfImage"])
def test_subtomograms_of_old_files_are_refused(tmp_path, label):
    text = f"data_\n\nloop_\n_rlnImageName\n_{label}\nsubtomo/1.mrc 5\n"
    with pytest.raises(StarError, match="holds subtomograms"):
        read_particles(star(tmp_path / "a.star", text))


def test_a_name_without_a_number_is_of_one_image_and_no_volume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    making.write_stack(tmp_path / "1.mrc", making.blobs(1, 8))
    making.write_stack(tmp_path / "2.mrc", making.blobs(8, 8))
    path = star(tmp_path / "a.star", HEAD + "1.mrc\n")
    assert not len(check_stacks(read_particles(path))[1])
    particles = read_particles(star(path, HEAD + "1.mrc\n2.mrc\n"))
    for found in (particles, concatenate([particles, particles])):
        with pytest.raises(ImageError, match=r"2.mrc: .*without an image number.* 8 sections"):
            check_stacks(found)

"""Images come out of stacks as another program put them in, whatever the MRC dialect."""

from __future__ import annotations

import struct

import making
import mrcfile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relion_cryofilter.errors import ImageError
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.particles.particles import particles_of_stacks, read_particles
from relion_cryofilter.particles.stacks import StackReader, plan_batches, read_header


def read_all(path, batch_size=3):
    """Read the images of one stack through plans and a reader, into stack order."""
    header = read_header(path)
    rows = np.arange(header.n_images)
    images = np.empty((header.n_images, header.ny, header.nx))
    reader = StackReader()
    for plan in plan_batches(rows, np.zeros_like(rows), rows, [header], batch_size):
        images[plan.rows] = reader.read(plan)
    return images


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", [0, 1, 2, 6, 12])
@pytest.mark.parametrize("extended", [0, 1024])
def test_every_mode_byte_order_and_extended_header_is_read(tmp_path, mode, order, extended):
    images = np.round(making.blobs(7, 10) * 10 + 50)
    making.write_stack(tmp_path / "a.mrcs", images, mode=mode, order=order, extended=extended)
    assert np.array_equal(read_all(tmp_path / "a.mrcs"), images)


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_missing_machine_stamp_does_not_matter(tmp_path, mode, order):
    images = np.round(making.blobs(4, 10) * 10)
    making.write_stack(tmp_path / "a.mrcs", images, mode=mode, order=order, stamp=False)
    assert np.array_equal(read_all(tmp_path / "a.mrcs"), images)


@pytest.mark.parametrize("mode", [0, 1, 2, 6, 12])
def test_a_machine_stamp_of_the_other_byte_order_does_not_matter(tmp_path, mode):
    images = np.round(making.blobs(4, 10) * 10 + 50)
    making.write_stack(tmp_path / "a.mrcs", images, mode=mode, order=">")
    data = bytearray((tmp_path / "a.mrcs").read_bytes())
    data[212:214] = b"\x44\x44"
    (tmp_path / "a.mrcs").write_bytes(data)
    assert np.array_equal(read_all(tmp_path / "a.mrcs"), images)


@pytest.mark.parametrize("kind", ["stack", "volume", "one image", "2-D"])
def test_what_mrcfile_wrote_is_read_the_same(tmp_path, kind):
    images = making.blobs(1 if kind in ("one image", "2-D") else 5, 12)
    with mrcfile.new(tmp_path / "a.mrcs") as file:
        file.set_data(images[0] if kind == "2-D" else images)
        if kind != "2-D":
            file.set_volume() if kind == "volume" else file.set_image_stack()
        file.voxel_size = 1.5
    assert np.array_equal(read_all(tmp_path / "a.mrcs"), images)
    assert read_header(tmp_path / "a.mrcs").pixel_size_angstrom == pytest.approx(1.5)


def test_images_that_are_not_square_keep_their_shape(tmp_path):
    images = making.blobs(3, 12)[:, :8]
    making.write_stack(tmp_path / "a.mrcs", images)
    assert np.array_equal(read_all(tmp_path / "a.mrcs"), images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an MRC stack"),
        (b"x" * 2000, "not an MRC stack"),
        (None, r"can't be read \(No such file"),
    ],
)
def test_what_is_no_stack_is_refused(tmp_path, content, message):
    path = tmp_path / "a.mrcs"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"a\.mrcs: {message}"):
        read_header(path)


def test_complex_images_are_refused_by_their_mode(tmp_path):
    making.write_stack(tmp_path / "a.mrcs", making.blobs(1, 8))
    data = bytearray((tmp_path / "a.mrcs").read_bytes())
    data[12] = 4
    (tmp_path / "a.mrcs").write_bytes(data)
    with pytest.raises(ImageError, match="MRC mode 4; expected one of 0, 1, 2, 6, 12"):
        read_header(tmp_path / "a.mrcs")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 40))
def test_each_row_gets_its_image_whatever_the_order_and_batch_size(
    tmp_path_factory, seed, batch_size
):
    folder = tmp_path_factory.getbasetemp() / "orders"
    shapes = {"a": (9, 8), "b": (4, 12), "c": (6, 8)}
    stacks = {name: making.blobs(n, box, n) for name, (n, box) in shapes.items()}
    if not folder.exists():
        for name, images in stacks.items():
            making.write_stack(folder / f"{name}.mrcs", images)
    rng = np.random.default_rng(seed)
    rows = [(name, int(rng.integers(shapes[name][0]))) for name in rng.choice(list(stacks), 30)]
    star = folder / "a.star"
    names = "".join(f"{image + 1}@{folder}/{name}.mrcs\n" for name, image in rows)
    star.write_text("data_particles\nloop_\n_rlnImageName\n" + names)
    particles = read_particles(star)
    headers, bad = check_stacks(particles)
    assert not len(bad)
    seen, reader = [], StackReader()
    for plan in plan_batches(
        np.arange(30), particles.stack_of, particles.index, headers, batch_size
    ):
        assert len(plan.rows) <= batch_size
        for row, image in zip(plan.rows, reader.read(plan)):
            assert np.array_equal(image, stacks[rows[row][0]][rows[row][1]])
            seen.append(row)
    assert sorted(seen) == list(range(30))


def test_missing_past_end_and_truncated_images_are_named_with_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        making.write_stack(tmp_path / f"{name}.mrcs", making.blobs(4, 8))
    with (tmp_path / "b.mrcs").open("r+b") as file:
        file.truncate(1024 + 2 * 8 * 8 * 4 + 5)
    (tmp_path / "c.mrcs").unlink()
    names = [f"{i}@{name}.mrcs\n" for name in "abc" for i in range(1, 6)]
    (tmp_path / "a.star").write_text("data_\nloop_\n_rlnImageName\n" + "".join(names))
    _, bad = check_stacks(read_particles(tmp_path / "a.star"))
    assert bad.rows.tolist() == [4, 7, 8, 9, 10, 11, 12, 13, 14]
    with pytest.raises(ImageError) as caught:
        bad.refuse()
    text = str(caught.value)
    assert "9 of 15 images can't be used: 5 in stacks that can't be read; 2 past the end" in text
    assert "row 5 (line 8): 000005@a.mrcs: a.mrcs holds 4 images but image 5 is asked for" in text
    assert "b.mrcs is truncated: its header says 4 images, the file holds 2" in text
    assert "--skip_bad" in text


def test_a_stack_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    making.write_stack(tmp_path / "a.mrcs", making.blobs(4, 8))
    particles = particles_of_stacks([tmp_path / "a.mrcs"])
    headers, _ = check_stacks(particles)
    with (tmp_path / "a.mrcs").open("r+b") as file:
        file.truncate(1100)
    plans = plan_batches(np.arange(4), particles.stack_of, particles.index, headers, 4)
    with pytest.raises(ImageError, match="became shorter while it was read"):
        StackReader().read(next(plans))


def header_says(path, nx=None, nz=None):
    """Change what the header says of its sizes, and nothing else."""
    content = bytearray(path.read_bytes())
    for offset, value in ((0, nx), (8, nz)):
        if value is not None:
            struct.pack_into("<i", content, offset, value)
    path.write_bytes(content)


@pytest.mark.parametrize("shape", [(1, 40, 30), (3, 1, 20), (1, 2048, 2048)], ids=str)
def test_what_holds_no_particle_images_is_refused_with_what_it_looks_like(tmp_path, shape):
    making.write_stack(tmp_path / "a.mrcs", np.zeros(shape), mode=0)
    _, bad = check_stacks(particles_of_stacks([tmp_path / "a.mrcs"]))
    size = f"{shape[2]} x {shape[1]} px; it looks like a micrograph"
    with pytest.raises(ImageError, match=f"in files that hold no particle images.*\\n.*{size}"):
        bad.refuse()


def test_a_map_is_no_stack(tmp_path):
    making.write_stack(tmp_path / "a.mrc", making.blobs(8, 8), volume=True)
    with pytest.raises(ImageError, match="looks like a map"):
        particles_of_stacks([tmp_path / "a.mrc"])
    making.write_stack(tmp_path / "a.mrc", making.blobs(8, 8))
    assert len(particles_of_stacks([tmp_path / "a.mrc"])) == 8


def test_a_header_that_says_far_more_images_than_the_file_holds_makes_no_rows(tmp_path):
    making.write_stack(tmp_path / "a.mrcs", making.blobs(20, 8))
    header_says(tmp_path / "a.mrcs", nz=10_000_000)
    with pytest.raises(ImageError, match="says 10,000,000 images, the file holds 20"):
        particles_of_stacks([tmp_path / "a.mrcs"])


def test_a_box_other_than_the_optics_table_says_is_not_scored(tmp_path, monkeypatch):
    """A damaged header of a size that the file would hold scrambles every image."""
    monkeypatch.chdir(tmp_path)
    star = making.write_project(tmp_path, boxes=(32, 24))
    assert not len(check_stacks(read_particles(star))[1])
    path = tmp_path / "Extract/job001/Mics/mic0.mrcs"
    content = bytearray(path.read_bytes())
    struct.pack_into("<2i", content, 0, 16, 16)
    path.write_bytes(content)
    _, bad = check_stacks(read_particles(star))
    assert len(bad) == 12
    with pytest.raises(ImageError, match=r"mic0.mrcs has boxes of 16 px, not of 32 px"):
        bad.refuse()

"""Numbers, sizes and names in files from outside are judged before they cost time or memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase

import making
import numpy as np
import pytest
import safetensors.torch
from making import JOB, ROOT

from relion_cryofilter.errors import CryoFilterError, CryoSparcError, ModelError, StarError, bounded
from relion_cryofilter.inputs import open_input
from relion_cryofilter.nn.model import load_model, read_models
from relion_cryofilter.nn.score_cache import ScoreCache
from relion_cryofilter.particles import star
from relion_cryofilter.particles.cryosparc import load_cs
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.star import read_star, tokens
from relion_cryofilter.particles.tables import read_particle_file
from relion_cryofilter.processes import memory_left
from relion_cryofilter.relion import job
from relion_cryofilter.thresholds import METADATA_KEY, read_curve

HUGE = 10**9


@contextmanager
def bounds(seconds=3.0, megabytes=200):
    """Allow so much processor time, and so much memory, for a block."""
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < seconds


def with_metadata(path, change):
    """Write a model whose metadata was changed."""
    model = making.tiny_model(provenance={"seen": ["a"], "pixel_sizes_angstrom": [1.5]})
    model.save(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = change(about)
    text = json.dumps(about) if text is None else text
    safetensors.torch.save_file(tensors, path, {METADATA_KEY: text})
    return path


def putting(*keys_and_value):
    """Return a change of metadata: the last of the arguments under the keys before it."""
    *keys, last, value = keys_and_value

    def change(about):
        for key in keys:
            about = about[key]
        about[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        putting("network", "kwargs", {"f": HUGE, "dim": 28}),
        putting("network", "kwargs", {"f": 4, "dim": HUGE}),
        putting("network", "kwargs", {"f": 4.0, "dim": 28}),
        putting("network", "kwargs", {"f": True, "dim": 28}),
        putting("network", "kwargs", [1]),
        putting("network", {"name": "d4", "kwargs": {"widths": [HUGE, HUGE, HUGE]}}),
        putting("network", {"name": "d4", "kwargs": {"widths": [4] * 10**5}}),
        putting("network", {"name": "d4", "kwargs": {"widths": "abc"}}),
        putting("network", {"name": "d4", "kwargs": {"dim": 8 * HUGE}}),
        putting("network", "name", ["straight"]),
        putting("network", None),
        putting("preprocess", "dim", HUGE),
        putting("preprocess", "dim", "28"),
        putting("preprocess", "roberts", "yes"),
        putting("preprocess", "clip_sigma", "6"),
        putting("preprocess", "clip_sigma", float("nan")),
        putting("preprocess", []),
        putting("threshold", "0.5"),
        putting("threshold", True),
        putting("threshold", float("nan")),
        putting("threshold", 10**400),
        putting("temperature", None),
        putting("temperature", [1]),
        putting("provenance", []),
        putting("provenance", "text"),
        putting("provenance", None),
        putting("provenance", "pixel_sizes_angstrom", "1.5"),
        putting("provenance", "pixel_sizes_angstrom", [None]),
        putting("provenance", "pixel_sizes_angstrom", 1.5),
        putting("provenance", "seen", [["a"]]),
        putting("provenance", "boxes_px", [{}]),
        putting("provenance", "threshold_estimate", {"recall": "high"}),
        putting("provenance", "threshold_estimate", [1]),
        putting("provenance", "operating_curve", []),
        putting("provenance", "operating_curve", {"positives": [float("inf")]}),
        putting(
            "provenance", "operating_curve",
            {"positives": [], "negatives": [], "n_positive": float("inf"), "n_negative": 0,
             "n_groups": 0},
        ),
        putting("format_version", "new"),
        lambda about: "[" * 200_000,
        lambda about: '{"a":' * 200_000,
        lambda about: "[]",
        lambda about: "1" * 5000,
    ],
)  # fmt: skip
def test_odd_metadata_of_a_model_is_one_sentence_and_costs_nothing(tmp_path, change):
    path = with_metadata(tmp_path / "model.safetensors", change)
    with bounds(), pytest.raises(ModelError) as caught:
        load_model(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert len(said) < 1000


def test_a_model_of_another_length_than_it_says_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 90 << 20) + b"{" + b" " * 1000)
    os.truncate(path, 100 << 20)
    for read in (load_model, read_curve):
        with bounds(), pytest.raises(ModelError, match="the length of its header is 94371840"):
            read(path)


def test_tensors_of_other_shapes_are_refused_before_they_are_read(tmp_path):
    model = making.tiny_model()
    model.save(tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin = max(item["data_offsets"][1] for key, item in header.items() if key != "__metadata__")
    path = tmp_path / "bomb.safetensors"
    for n, said in ((HUGE, "its size"), (HUGE // 20, "has no tensor more")):
        header["more"] = {"dtype": "F32", "shape": [n], "data_offsets": [begin, begin + 4 * n]}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        os.truncate(path, 8 + len(text) + begin + 4 * n)  # no room on the disk
        with bounds(megabytes=500), pytest.raises(ModelError, match=said):
            load_model(path)


def keras_file(path, change):
    """Write 2020 weights with one thing changed by `change(file, h5py)`."""
    import h5py

    making.write_keras(path, making.tiny_model().network, whole_model=True)
    with h5py.File(path, "r+") as file:
        change(file["model_weights"], h5py)
    return path


def replaced(name="conv2d/conv2d/kernel:0", **how):
    def change(file, h5py):
        del file[name]
        file.create_dataset(name, **how)

    return change


def referring(file, h5py):
    del file["conv2d/conv2d/kernel:0"]
    file["conv2d/conv2d/kernel:0"] = np.array([file.ref], dtype=h5py.ref_dtype)


def without_space(file, h5py):
    del file["conv2d/conv2d/kernel:0"]
    file["conv2d/conv2d/kernel:0"] = h5py.Empty("f4")


def configured(value):
    return lambda file, h5py: file.parent.attrs.__setitem__("model_config", value)


@pytest.mark.parametrize(
    "change",
    [
        replaced(shape=(3, 3, 1, 400_000_000), dtype="f4"),
        replaced(shape=(HUGE,), dtype="f8", chunks=(10**6,), compression="gzip"),
        replaced(data=np.array(["a"] * 36, dtype=object)),
        replaced(data=np.zeros(36, [("a", "f4")])),
        replaced(data=np.zeros((3, 3, 1, 4), complex)),
        replaced(shape=(), dtype="f4"),
        replaced("conv2d/conv2d/bias:0", shape=(HUGE, 0), dtype="f4"),
        referring,
        without_space,
        configured("[" * 50_000),
        configured("[]"),
        configured("1"),
        configured('{"config": 5}'),
        configured('{"config": {"layers": 1}}'),
        configured('{"config": {"layers": [1]}}'),
        configured('{"config": {"layers": [{"config": []}]}}'),
        configured('{"config": [{"config": {"batch_shape": [0, 1000000000, 1000000000, 1]}}]}'),
        configured('{"config": [{"config": {"batch_shape": [0, "a", "a", 1]}}]}'),
        configured(np.zeros(5)),
    ],
)  # fmt: skip
def test_odd_keras_files_are_one_sentence_and_cost_nothing(tmp_path, change):
    path = keras_file(tmp_path / "w.h5", change)
    with bounds(), pytest.raises(ModelError) as caught:
        read_models([path])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_keras_file_of_very_many_items_is_refused(tmp_path):
    def crowd(file, h5py):
        for number in range(1100):
            file.create_group(f"g{number}")

    path = keras_file(tmp_path / "w.h5", crowd)
    with bounds(), pytest.raises(ModelError, match="the number of items is 1001"):
        read_models([path])


@pytest.fixture(scope="module")
def cs_project(tmp_path_factory):
    """A folder with stacks, in which these tests write and read one file after the other."""
    folder = tmp_path_factory.mktemp("cs")
    making.write_project(folder)
    return folder


@pytest.fixture
def cs_fields(cs_project, monkeypatch):
    """The fields of a .cs file of the particles in the working directory."""
    monkeypatch.chdir(cs_project)
    return making.particles_of(Path("Extract/job001/particles.star"))


def packed_parts(fields, compression):
    """Return the parts of a compressed .cs file: mark, length, header, then columns, the heap."""
    from cryosparc.dataset import Dataset

    return [bytes(part) for part in Dataset(dict(fields)).stream(compression=compression)]


def with_header(parts, **values):
    """Return a compressed .cs file whose header says something else."""
    text = json.dumps({**json.loads(parts[2]), **values}).encode()
    return b"".join([parts[0], len(text).to_bytes(4, "little"), text, *parts[3:]])


def of_places(parts, place):
    """Return a compressed .cs file whose first text is at another place of the heap."""
    fields = [field[0] for field in json.loads(parts[2])["dtype"]]
    column = 4 + 2 * fields.index("blob/path")
    changed = struct.pack("<Q", place) + parts[column][8:]
    return b"".join([*parts[:column], changed, *parts[column + 1 :]])


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_a_compressed_cs_file_reads_as_cryosparc_tools_reads_it(cs_fields, compression):
    from cryosparc.dataset import Dataset

    Path("p.cs").write_bytes(b"".join(packed_parts(cs_fields, compression)))
    ours, theirs = load_cs(Path("p.cs")).dataset, Dataset.load("p.cs")
    assert ours.descr() == theirs.descr()
    for name in theirs.fields():
        assert np.array_equal(np.asarray(ours[name]), np.asarray(theirs[name]))


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: of_places(parts, 2**40),
        lambda parts: of_places(parts, 2**64 - 1),
        lambda parts: with_header(parts, length=HUGE),
        lambda parts: with_header(parts, length=-1),
        lambda parts: with_header(parts, length=10**30),
        lambda parts: with_header(parts, length=47),
        lambda parts: with_header(parts, dtype=[]),
        lambda parts: with_header(parts, dtype=[["uid", "<u8", [HUGE, HUGE]]]),
        lambda parts: with_header(parts, dtype=[["uid", "O8"]]),
        lambda parts: with_header(parts, dtype=[["uid", 5]]),
        lambda parts: with_header(parts, dtype=[[["uid"], "<u8"]]),
        lambda parts: with_header(parts, compressed_fields=[[]]),
        lambda parts: with_header(parts, compressed_fields=["uid", "blob/idx"]),
        lambda parts: parts[0] + (100 << 20).to_bytes(4, "little") + b" " * 1000,
        lambda parts: parts[0] + (200_000).to_bytes(4, "little") + b"[" * 200_000,
        lambda parts: parts[0],
    ],
)
def test_odd_compressed_cs_files_are_one_sentence_and_cost_nothing(cs_fields, change):
    path = Path("p.cs")
    path.write_bytes(change(packed_parts(cs_fields, None)))
    with bounds(), pytest.raises(CryoSparcError, match=r"^p.cs: can't be read as") as caught:
        read_particle_file(path)
    assert len(str(caught.value)) < 500


def test_compressed_cs_files_with_random_bytes_are_read_or_refused(cs_fields):
    """cryosparc-tools itself ends the process for one in two of them."""
    rng, whole = np.random.default_rng(0), b"".join(packed_parts(cs_fields, "lz4"))
    for _ in range(500):
        data = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(700, len(data), 3)
        data[places] = rng.integers(0, 256, 3)
        Path("p.cs").write_bytes(data.tobytes())
        with suppress(CryoSparcError):
            read_particle_file(Path("p.cs"))


def test_a_cs_file_with_a_header_of_a_hundred_megabytes_is_refused(cs_fields):
    path = Path("p.cs")
    path.write_bytes(b"\x93NUMPY\x02\x00" + (100 << 20).to_bytes(4, "little") + b"{" * 1000)
    os.truncate(path, 101 << 20)
    with bounds(), pytest.raises(CryoSparcError, match="the length of its header is 104857600"):
        load_cs(path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("blob/idx", np.full(48, np.nan, np.float32)),
        ("blob/idx", np.zeros((48, 2), np.uint32)),
        ("blob/path", np.ones(48, np.float32)),
        ("blob/psize_A", ["x"] * 48),
        ("blob/sign", ["x"] * 48),
        ("location/micrograph_path", np.ones(48, np.uint32)),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_cs_field_of_another_type_is_named(cs_fields, name, values, compressed):
    path = making.write_cs(Path("p.cs"), {**cs_fields, name: values}, compressed=compressed)
    with pytest.raises(CryoSparcError, match=f"its field {name} has the type .* one a row"):
        read_particle_file(path)


@pytest.mark.parametrize(
    "text",
    [
        "results: " + "[" * 1000,
        "results: {a: " * 900,
        "a: &a [x, x]\n"
        + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in pairwise(ascii_lowercase))
        + "results: {blob: {metafile: *z, type: t}}\n",
        "results: {blob: {metafile: 2024-99-99, type: 1}}",
        "results: {blob: {metafile: " + "9" * 5000 + ", type: 1}}",
        "created: 2024-99-99\nresults: {blob: {metafile: [], type: 1}}",
        "results: {blob: {metafile: " + "x" * 70_000 + ", type: 1}}",
        "results: {? [a] : b}",
        "results: 5",
        "\0",
    ],
)  # fmt: skip
def test_odd_result_groups_are_one_sentence_and_cost_nothing(cs_fields, text):
    Path("p.csg").write_text(text)
    with bounds(), pytest.raises(CryoSparcError) as caught:
        read_particle_file(Path("p.csg"))
    assert len(str(caught.value)) < 7000


@pytest.mark.parametrize("line", ["created: 2024-99-99", "num_items: " + "9" * 5000, "a: 0b2"])
def test_dates_and_numbers_of_a_result_group_are_not_read(cs_fields, line):
    making.write_cs(Path("p.cs"), cs_fields)
    Path("p.csg").write_text(f"{line}\nresults:\n  blob: {{metafile: '>p.cs', type: t}}\n")
    assert len(read_particle_file(Path("p.csg"))) == 48


def particles_with(tmp_path, *rows, head="data_\nloop_\n_rlnImageName\n"):
    path = tmp_path / "p.star"
    path.write_bytes(head.encode() + b"".join(rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        b"9" * 5000 + b"@x.mrcs\n",
        b"99999999999@x.mrcs\n",
        b"1_0@x.mrcs\n",
        "²@x.mrcs\n".encode(),
        b"x" * (2 << 20) + b"\n",
        b"1@\0.mrcs\n",
        b'"' * 30_000 + b"\n",
        b'"a ' * 30_000 + b"\n",
        b"'a " * 300_000 + b"\n",
        b"\"a '" * 100_000 + b"\n",
    ],
)
def test_rows_that_no_program_writes_are_refused_in_time(tmp_path, monkeypatch, capsys, row):
    monkeypatch.chdir(tmp_path)
    path = particles_with(tmp_path, b"1@x.mrcs\n", row)
    with bounds(megabytes=900):
        assert job.main(["score", "--in_parts", str(path), "--o", "out/"]) != 0
    said = capsys.readouterr().err
    assert said.startswith("ERROR: ")
    assert "This is a bug" not in said
    assert "p.star" in said


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("data_\n" + "loop_\n_a\n" * 1001, "tables"),
        ("data_\nloop_\n" + "".join(f"_a{n}\n" for n in range(2001)), "labels"),
        ("data_\n" + "".join(f"_a{n} 1\n" for n in range(1001)), "values"),
    ],
)
def test_a_star_file_of_endless_structure_is_refused(tmp_path, monkeypatch, text, most):
    monkeypatch.setattr(star, "_MOST_TABLES", 1000)
    (tmp_path / "p.star").write_text(text)
    with bounds(), pytest.raises(StarError, match=f"the number of {most} is"):
        read_star(tmp_path / "p.star")


def test_a_file_that_is_one_line_is_refused_after_a_megabyte(tmp_path):
    path = tmp_path / "zeros.star"
    path.touch()
    os.truncate(path, 5 << 30)
    with (
        bounds(1),
        pytest.raises(StarError, match="a STAR file, but this is a binary"),
    ):
        read_star(path)


@pytest.mark.parametrize("option", ["--in_parts", "--mrc", "--weights"])
@pytest.mark.parametrize("source", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_no_files(project, capsys, option, source):
    os.mkfifo("pipe")
    given = {"--in_parts": "Extract/job001/particles.star", "--weights": "model.safetensors"}
    given = {**given, option: source}
    if option == "--mrc":
        del given["--in_parts"]
    words = [word for pair in given.items() for word in pair]
    with bounds(megabytes=900):
        assert job.main(["score", "--o", JOB, *words]) == 1
    said = capsys.readouterr().err
    assert source in said
    assert "it is a pipe or device, no file" in said or "doesn't exist" in said


def test_a_class_number_beyond_all_classes_is_refused(tmp_path):
    path = particles_with(
        tmp_path, b"1@x.mrcs 1e300\n", head="data_\nloop_\n_rlnImageName\n_rlnClassNumber\n"
    )
    with pytest.raises(StarError, match="rlnClassNumber is '1e300'"):
        read_particles(path).table.classes()


def test_a_quote_that_is_closed_later_is_told_from_one_that_is_not():
    assert tokens(b'"a b" \'c\' "d #e') == [b'"a b"', b"'c'", b'"d']
    assert tokens(b"'a 'b' \"c\"d\" #e") == [b"'a 'b'", b'"c"d"']
    assert tokens(b"a\"b 'c d") == [b'a"b', b"'c", b"d"]


def journal_of(body):
    """Return the bytes of a record with `body`, its length and checksum right."""
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


@pytest.mark.parametrize(
    ("record", "cut"),
    [
        (journal_of(b"no JSON\n"), False),
        (journal_of(b"[1]\n"), False),
        (journal_of(b"[" * 100_000 + b"\n"), False),
        (journal_of(b""), False),
        (journal_of(b'{"stack": "x", "identity": [1, 2], "n": 5}\nshort'), False),
        (journal_of(b'{"stack": "x", "identity": [1, 2], "n": -1}\n'), False),
        (journal_of(b'{"stack": "x", "identity": [1, 2], "n": 1e9}\n'), False),
        (journal_of(b'{"stack": "x", "identity": 3, "n": 0}\n'), False),
        (struct.pack("<II", 2**32 - 1, 0) + b"x", True),
        (b"far", True),
        (b"\0" * 100_000, False),
    ],
)
def test_records_that_are_none_are_dropped_and_cost_nothing(scored, record, cut):
    """With a wrong checksum they end the journal; with a right one they are passed over."""
    particles, path = read_particles("Extract/job001/particles.star"), Path(JOB)
    journal = next(path.glob("*.journal"))
    key = json.loads(journal.read_bytes().partition(b"\n")[0])["key"]
    whole = journal.read_bytes()
    journal.write_bytes(whole + record)
    with bounds():
        values = ScoreCache(path, key, particles).values
    assert np.isfinite(values).all()
    assert journal.read_bytes() == whole + record * (not cut)


def test_records_of_places_beyond_the_set_are_of_no_use_and_cost_nothing(scored):
    particles, path = read_particles("Extract/job001/particles.star"), Path(JOB)
    journal = next(path.glob("*.journal"))
    head, _, records = journal.read_bytes().partition(b"\n")
    length, _ = struct.unpack_from("<II", records)
    about = json.loads(records[8 : 8 + length].partition(b"\n")[0])
    body = json.dumps({**about, "n": 1}).encode() + b"\n" + struct.pack("<Id", 2**32 - 1, 0.5)
    journal.write_bytes(journal.read_bytes() + journal_of(body))
    with bounds():
        values = ScoreCache(path, json.loads(head)["key"], particles).values
    assert np.isfinite(values).all()


def test_a_journal_that_is_one_line_is_not_read(scored):
    journal = next(Path(JOB).glob("*.journal"))
    os.truncate(journal, 0)
    os.truncate(journal, 5 << 30)
    with bounds():
        ScoreCache(Path(JOB), "x", read_particles("Extract/job001/particles.star"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("score --batch_size 1e20", "--batch_size is '1e20'"),
        ("score --batch_size 100000000000000000000", "--batch_size is 100000000000000000000"),
        (f"score --batch_size {'1' * 5000}", "--batch_size is '111"),
        ("train --f 100000", "--f is 100000; expected from 1 to 256"),
        ("train --model d4 --img_dim 1000000", "--img_dim is 1000000; expected from 8 to 256"),
        ("train --epochs 10000000000", "--epochs is 10000000000"),
        ("train --pos_classes 1,99999999999999999999", "--pos_classes is 99999999999999999999"),
        ("train --learning_rate 1e20", "--learning_rate is 1e+20"),
        ("train --max_memory nan", "--max_memory is nan"),
        ("train --seed -1", "--seed is -1"),
        ("score --threshold count=1e20", "is not a number that fits count"),
        ("score --threshold keep=1e999", "keep must be above 0"),
    ],
)
def test_options_beyond_all_sense_are_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    with bounds():
        assert job.main([*words.split(), "--o", JOB]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert len(text) < 1500


def test_bounded_takes_whole_numbers_of_any_make_and_nothing_else():
    assert bounded(np.int64(3), 1, 3, "x") == 3
    for value in (0, 4, 2.0, True, "2", None, 10**5000, [1] * 10**5):
        with pytest.raises(CryoFilterError, match=r"^x is .{1,70}; expected a whole number from 1"):
            bounded(value, 1, 3, "x")


def test_a_name_with_a_zero_byte_is_no_file(tmp_path):
    with pytest.raises(OSError, match="zero byte"):
        open_input(tmp_path / "a\0b")


def test_memory_left_is_what_the_limit_leaves():
    with bounds(megabytes=500):
        assert 400e6 < memory_left() < 600e6


@pytest.mark.slow
def test_ten_seconds_of_fuzzing_find_nothing(tmp_path):
    words = ["--seconds", "10", "--seed", "1", "--keep", str(tmp_path / "finds")]
    command = [sys.executable, str(ROOT / "benchmarks/fuzz.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 finds, seed 1" in done.stdout

"""One cause, one line, the right cure: what users are told when something is odd or wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import making
import numpy as np
import pytest
from making import JOB, ROOT, blobs, make_select_job, tiny_model, write_stack

from relion_cryofilter.errors import CryoFilterError, StarError, readable
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.nn.model import Models
from relion_cryofilter.particles.labels import read_labels
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.splits import clusters_of
from relion_cryofilter.particles.stacks import read_header
from relion_cryofilter.relion.advice import advice_on
from relion_cryofilter.relion.job import main

STAR = Path("Extract/job001/particles.star")
STACK = "Extract/job001/Mics/mic0.mrcs"


def said(capsys, words, code=1):
    """Run a command line; return what it said in all, and on stderr."""
    assert main(words.split()) == code
    out, err = capsys.readouterr()
    return out + err, err


def score_words(more="", source=f"--in_parts {STAR}"):
    return f"score --o {JOB} {source} --weights model.safetensors --j 1 {more}"


# What a file is, by its first bytes.

FIRST_BYTES = {
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 2000, "HDF5", "--weights"),
    "NumPy": (b"\x93NUMPY\x01\0" + b"\r\n" * 40, "CryoSPARC", ""),
    "gzip": (b"\x1f\x8b\x08\0\r\n\r\n", "gzip", "gunzip"),
    "zip": (b"PK\x03\x04\r\n" * 20, "zip", "Unpack"),
    "safetensors": (b'\x40\0\0\0\0\0\0\0{"__metadata__":\r\n', "a model file", "--weights"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "PNG", "MRC stacks"),
    "TIFF": (b"II*\0" + b"\r\n" * 50, "TIFF", "MRC stacks"),
    "UTF-16": ("data_\n\nloop_\n".encode("utf-16"), "UTF-16", "UTF-8"),
    "binary": (b"\x01\x02\0\0\r\n" * 9, "a binary file", ""),
}


@pytest.mark.parametrize("name", FIRST_BYTES)
def test_what_is_no_star_file_is_named_by_its_first_bytes(tmp_path, name):
    content, words, cure = FIRST_BYTES[name]
    (tmp_path / "odd.star").write_bytes(content)
    with pytest.raises(StarError) as caught:
        read_particles(tmp_path / "odd.star")
    assert re.search(rf"odd\.star: expected a STAR file, but.*{words}.*{cure}", str(caught.value))
    assert "dos2unix" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.map", "a.star"])
def test_image_files_of_any_name_are_images(project, capsys, name):
    write_stack(Path(name), blobs(4, 32))
    text, _ = said(capsys, score_words(source=f"--in_parts {name}"), 2)
    assert "is an image stack. Give it as --mrc" in text
    text, _ = said(capsys, f"train --o {JOB} --in_parts {name} --j 1", 2)
    assert "image stack; give stacks as --pos and --neg" in text
    assert len(read_labels(None, [Path(name)], [Path(STACK)])) == 16


def test_complex_images_given_as_particles_are_images_too(project):
    write_stack(Path("a.map"), blobs(4, 32))
    data = bytearray(Path("a.map").read_bytes())
    data[12] = 4
    Path("a.map").write_bytes(data)
    with pytest.raises(StarError, match=r"an MRC image file. Give it as --mrc"):
        read_particles(Path("a.map"))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (f"score --o {JOB} --mrc {STAR}", "it is a STAR file. Give it as --in_parts"),
        (f"score --o {JOB} --mrc model.safetensors", "it is a model file .* Give it as --weights"),
        (f"score --o {JOB} --in_parts {STAR} --weights {STAR}", "a model, but this is a STAR"),
        (f"score --o {JOB} --in_parts {STAR} --weights {STACK}", "this is an MRC image file"),
        (f"select --o {JOB} --threshold 0.5 --in_parts {STACK}", "this is an MRC image file"),
    ],
)  # fmt: skip
def test_a_file_in_the_wrong_place_is_answered_with_the_right_option(project, capsys, words, found):
    assert re.search(found, said(capsys, words)[0])


# Micrographs, and where stacks are.


@pytest.mark.parametrize("name", ["null", '""', "None", "N/A"])
def test_micrograph_names_that_are_none_leave_stacks_to_stand_in(project, name):
    text = STAR.read_text()
    STAR.write_text(re.sub(r"Mics/mic\d\.mrc ", f"{name} ", text))
    particles = read_particles(STAR)
    assert not particles.has_micrographs
    assert particles.micrographs == particles.stack_names
    # And where only some are none, their stacks stand in for those.
    STAR.write_text(re.sub(r"Mics/mic[01]\.mrc ", f"{name} ", text))
    particles = read_particles(STAR)
    assert particles.has_micrographs
    assert len(np.unique(clusters_of(particles)[0])) == 4
    of = {(int(s), int(m)) for s, m in zip(particles.stack_of, particles.micrograph_of)}
    assert len(of) == 4


def test_cryosparcs_mark_before_paths_is_taken_off(project):
    names = read_particles(STAR).stack_names
    STAR.write_text(STAR.read_text().replace("@Extract", "@>Extract"))
    particles = read_particles(STAR)
    assert particles.stack_names == names
    assert not len(check_stacks(particles)[1])


def test_the_folder_of_stacks_is_decided_by_many_rows(project, tmp_path_factory, monkeypatch):
    first = read_particles(STAR)
    Path("default_pipeline.star").unlink()
    first.stacks[first.stack_of[0]].unlink()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    particles = read_particles(project / STAR)
    assert sum(path.is_file() for path in particles.stacks) == 3


# Images.


@pytest.mark.parametrize("how", ["maximum", "IMOD"])
def test_bytes_without_sign_are_read_as_such_and_said_once(project, capsys, how):
    for path in Path("Extract").rglob("*.mrcs"):
        with path.open("rb") as file:
            file.seek(1024)
            images = np.frombuffer(file.read(), np.float32).reshape(-1, 32, 32)
        grey = np.clip(127 + 30 * images, 0, 255).astype(np.uint8)
        write_stack(path, grey.view(np.int8), mode=0)
        data = bytearray(path.read_bytes())
        if how == "maximum":
            data[80:84] = np.float32(grey.max()).tobytes()
        else:
            data[152:160] = np.array([1146047817, 0], np.int32).tobytes()
        path.write_bytes(data)
    assert read_header(path).dtype == np.uint8
    text, _ = said(capsys, score_words(), 0)
    assert text.count("Read as bytes from 0 to 255 (MRC mode 0): 4 stacks.") == 1


def test_bytes_with_sign_stay_so(tmp_path):
    write_stack(tmp_path / "a.mrcs", np.round(20 * blobs(3, 16)), mode=0)
    data = bytearray((tmp_path / "a.mrcs").read_bytes())
    data[152:160] = np.array([1146047817, 1], np.int32).tobytes()
    (tmp_path / "a.mrcs").write_bytes(data)
    assert read_header(tmp_path / "a.mrcs").dtype == np.int8


def test_values_that_overflow_are_called_too_large(project, capsys):
    images = blobs(12, 32)
    images[3] *= 1e30
    write_stack(Path(STACK), images)
    text, _ = said(capsys, score_words())
    assert "1 with values too large" in text


def test_one_bad_stack_takes_one_line_and_others_are_named_too(project, capsys):
    for name, size in (("mic0", 1100), ("mic1", 1200)):
        with Path(f"Extract/job001/Mics/{name}.mrcs").open("r+b") as file:
            file.truncate(size)
    text, _ = said(capsys, score_words())
    assert text.count("mic0.mrcs is truncated") == text.count("mic1.mrcs is truncated") == 1
    assert text.count(" and 8 more of this stack)") == 2


@pytest.mark.parametrize(
    ("mode", "hint"),
    [("score", "scores such images 0 and lists them"), ("metrics", "leaves them out"),
     ("train", "leaves them out")],
)  # fmt: skip
def test_the_way_past_bad_images_is_that_of_the_mode(project, capsys, mode, hint):
    Path("Extract/job001/Mics/mic3.mrcs").unlink()
    labels = "--pos Extract/job001/Mics/mic0.mrcs --neg neg.star"
    making.half_star(Path(), "neg.star", lambda line: "mic0.mrcs" not in line)
    words = score_words() if mode == "score" else f"{mode} --o {JOB} {labels} --j 1"
    text, _ = said(capsys, words)
    assert f"--skip_bad {hint}" in text
    assert text.count("--skip_bad") == 1


# Warnings.


def test_hundreds_of_optics_groups_that_are_off_are_one_line(project, caplog):
    making.write_project(Path(), boxes=[32] * 40, n_micrographs=40, per_micrograph=1)
    text = STAR.read_text()
    sizes = iter(np.linspace(4, 6, 40))
    STAR.write_text(re.sub(r" 3\.000000 32 ", lambda _: f" {next(sizes):.6f} 32 ", text))
    model = tiny_model(provenance={"pixel_sizes_angstrom": [3.0], "boxes_px": [32]})
    with caplog.at_level("WARNING", logger="relion_cryofilter"):
        Models((model, model), ("a", "b")).check(read_particles(STAR))
    assert len(caplog.records) == 1
    assert "optics group 1 has 4 Å/px (and 39 more: 4 to 6)" in caplog.text


def test_libraries_warnings_reach_neither_run_out_nor_run_err(project, capsys):
    text = STAR.read_text().replace(" Mics/mic", " Mics/粒子")
    STAR.write_text(text.replace("15000.000000 15000.000000", "1e+300 15000.000000"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "relion_cryofilter", *score_words().split()]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "Glyph" not in run.stdout
    assert "RuntimeWarning" not in run.stdout


def test_a_library_that_warns_is_heard_with_verbose(project, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for more, count in (("", 0), ("--verbose", 1)):
        assert main([*score_words().split(), "--rescore", *more.split()]) == 0
        warnings.showwarning("odd", UserWarning, "lib.py", 3)
        out, err = capsys.readouterr()
        assert (out.count("UserWarning: odd"), err) == (count, "")


# Names.


def test_names_of_megabytes_are_shortened(project, capsys):
    STAR.write_text(STAR.read_text().replace(STACK, f"{'x' * 5_000_000}.mrcs", 1))
    text, _ = said(capsys, score_words())
    assert len(text) < 5000
    STAR.write_text(STAR.read_text().replace("@xxx", "@@xxx", 1).replace("000001@", "0@"))
    assert len(said(capsys, score_words())[0]) < 5000


@pytest.mark.parametrize("sign", ["\x1b[2J\x1b[31m", "\u202e", "\udcff"])
def test_escapes_in_names_are_made_visible(project, capsys, sign):
    path = STAR.read_bytes().replace(
        STACK.encode(), f"{sign}x.mrcs".encode(errors="surrogateescape")
    )
    STAR.write_bytes(path)
    for more, code in (("", 1), ("--skip_bad", 0)):
        text, _ = said(capsys, score_words(more), code)
        assert sign not in text
        assert "\x1b" not in text
        assert f"\\{repr(sign[0])[2]}" in text or "\\xff" in text


def test_messages_for_python_are_readable_too():
    assert str(CryoFilterError("a\x1bb\n" + "y" * 9999)).startswith("a\\x1bb\nyyy")
    assert len(str(CryoFilterError("y " * 99999))) < 5000
    assert readable("Å, 粒子 …, 90 %") == "Å, 粒子 …, 90 %"


# CryoSPARC's files.


def write_cs(change):
    fields = making.particles_of(STAR)
    change(fields)
    return making.write_cs(Path("J2/p.cs"), fields)


def test_an_empty_path_in_a_cs_file_is_named_by_its_row(project, capsys):
    pytest.importorskip("cryosparc")

    def spoil(fields):
        fields["blob/path"][6] = ""

    text, _ = said(capsys, score_words(source=f"--in_parts {write_cs(spoil)}"))
    assert "p.cs, row 7: blob/path is empty" in text
    assert "directory" not in text


def test_a_heterogeneous_refinement_is_answered_with_its_classes(project):
    pytest.importorskip("cryosparc")

    def spoil(fields):
        del fields["alignments2D/class"]
        fields["alignments3D_multi/class_posterior"] = np.zeros((48, 3), np.float32)

    with pytest.raises(CryoFilterError, match=r"as --pos and those of the others as --neg"):
        read_labels(write_cs(spoil), pos_classes=[1])


# The environment.


@pytest.mark.parametrize(
    ("code", "name"),
    [("print 'old'", "SyntaxError"), ("import sys\nsys.no_such_thing", "AttributeError"),
     ("raise TypeError('odd')", "TypeError"), ("__version__ = '1'", "AttributeError")],
)  # fmt: skip
def test_foreign_packages_are_told_from_bugs(project, tmp_path, code, name):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/numpy.py").write_text(code + "\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/foreign{os.pathsep}{ROOT}"}
    words = [sys.executable, "-m", "relion_cryofilter", *score_words().split()]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "This is a bug" not in run.stderr
    assert f"foreign{os.pathsep}" in run.stderr
    assert "-E ignores PYTHONPATH" in run.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                     "allocate memory: you tried to allocate 9 bytes. Error code 12"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        MemoryError("Unable to allocate 5.0 GiB for an array"),
    ],
)  # fmt: skip
def test_too_little_memory_is_called_that(project, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("relion_cryofilter.commands.run", fail)
    text, _ = said(capsys, score_words())
    assert "out of memory" in text
    assert "--j" in text
    assert "bug" not in text
    assert "install" not in text


def test_bugs_of_our_own_stay_bugs():
    for error in (AttributeError("x", obj=sys.modules["relion_cryofilter"]), RuntimeError("odd"),
                  KeyError("x"), ImportError("x", name="relion_cryofilter.nn")):  # fmt: skip
        assert advice_on(error) == ""


@pytest.mark.parametrize("mode", ["train", "score"])
def test_help_is_shown_where_letters_are_ascii(mode):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
    }
    words = [sys.executable, "-m", "relion_cryofilter", mode, "--help"]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "--in_parts" in run.stdout


# Results.


def test_a_star_file_whose_name_is_no_utf8_has_a_report(project, capsys):
    name = os.fsdecode(b"p\xff.star")
    shutil.copy(STAR, name)
    words = score_words(source="--in_parts X").split()
    assert main([name if word == "X" else word for word in words]) == 0
    assert "No report" not in capsys.readouterr().out
    assert Path(JOB, "logfile.pdf").is_file()


@pytest.mark.parametrize("name", ["report.html", "logfile.pdf", "features.npy", "bad_images.csv"])
def test_a_folder_in_the_place_of_a_by_product_costs_no_results(project, capsys, name):
    Path(JOB, name).mkdir(parents=True)
    code = 2 if name == "bad_images.csv" else 0
    text, _ = said(capsys, score_words(), code)
    assert name in text
    assert Path(JOB, "particles.star").is_file() == (code == 0)
    if name == "features.npy":
        assert f"{JOB}features.npy is a folder" in said(capsys, score_words("--features"), 2)[0]


@pytest.mark.parametrize("name", ["report.html", "logfile.pdf", "score_cache.journal"])
def test_scores_are_not_written_where_another_result_goes(project, capsys, name):
    text, _ = said(capsys, score_words(f"--out_file {JOB}{name}"), 2)
    assert "another result" in text


def test_the_classes_of_a_large_classification_are_not_all_listed(project):
    job = make_select_job(project)
    data = Path("Class2D/job002/run_it012_data.star")
    numbers = iter(range(1, 49))
    data.write_text(re.sub(r"\d+ $", lambda _: f"{next(numbers)} ", data.read_text(), flags=re.M))
    with pytest.raises(CryoFilterError, match="and 28 smaller"):
        read_labels(job.parents[1] / data)

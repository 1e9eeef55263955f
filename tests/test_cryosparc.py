"""CryoSPARC's .cs and .csg files: read, scored, written again with nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
from making import (
    CSG_GROUP,
    SHARED,
    blobs,
    invert_contrast,
    part,
    particles_of,
    write_cs,
    write_stack,
)

from relion_cryofilter.commands.score import score
from relion_cryofilter.commands.select import select
from relion_cryofilter.errors import CryoFilterError, CryoSparcError, ImageError, UsageError
from relion_cryofilter.images.bad import check_stacks
from relion_cryofilter.options import ScoreOptions, SelectOptions
from relion_cryofilter.particles.cryosparc import SCORE_FIELD, read_cs
from relion_cryofilter.particles.labels import read_labels
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.tables import read_particle_file
from relion_cryofilter.relion.job import FAILURE, main
from relion_cryofilter.simulate import simulate_project

dataset = pytest.importorskip("cryosparc.dataset")
yaml = pytest.importorskip("yaml")
REAL = sorted((SHARED / "star_corpus").glob("*.cs"))


@pytest.fixture
def star(project):
    """The STAR file of a small project in the working directory."""
    return project / "Extract/job001/particles.star"


@pytest.fixture
def fields(star):
    return particles_of(star)


def scored(path, folder, **options):
    """Score with the project's model; return scores.csv."""
    options = {"threshold": 0.5, "j": 1, "weights": "model.safetensors", **options}
    score(ScoreOptions(in_parts=path, o=folder, quiet=True, **options))
    return (folder / "scores.csv").read_text()


def records(path):
    return np.load(path, allow_pickle=False)


def assert_same_but_score(out, source, rows):
    """All fields, types, values and the order of `source` are in `out`, and a float32 score."""
    before, after = records(source), records(out)
    assert after.dtype.descr == [*before.dtype.descr, (SCORE_FIELD, "<f4")]
    for name in before.dtype.names:
        assert after[name].tobytes() == before[name][rows].tobytes(), name


@pytest.mark.shared("star_corpus")
@pytest.mark.parametrize("path", REAL or [None], ids=lambda path: path.name if path else "none")
def test_a_real_cs_file_comes_back_with_every_field_type_and_uid(path, tmp_path):
    table = read_cs(path)
    scores = np.linspace(0, 1, len(table)).round(6)
    rows = scores >= 0.4
    out, good = tmp_path / "particles.cs", tmp_path / "particles_accepted.cs"
    table.write({out: scores >= 0, good: rows}, scores)
    assert_same_but_score(out, path, slice(None))
    assert_same_but_score(good, path, rows)
    assert read_cs(out).scores().tolist() == scores.tolist()
    before, after = (dataset.Dataset.load(file) for file in (path, out))
    after.drop_fields([SCORE_FIELD])
    assert before == after
    table.write({out: scores >= 0})
    assert records(out).dtype == records(path).dtype
    assert records(out).tobytes() == records(path).tobytes()


@pytest.mark.shared("star_corpus")
def test_the_real_images_have_the_contrast_that_their_blob_sign_says(shared, tmp_path):
    from relion_cryofilter.images.batches import map_batches
    from relion_cryofilter.images.contrast import centre_contrast
    from relion_cryofilter.images.preprocess import FourierCrop

    particles = read_particle_file(shared / "star_corpus/empiar_10076_7.cs")
    assert particles.inverted == (True,)
    headers, _ = check_stacks(particles)

    def contrast(images):
        return centre_contrast(FourierCrop(48)(images.float())).numpy()

    [(_, values)] = map_batches(contrast, particles, np.arange(7), headers)
    assert (values.mean(axis=0) > 0).all()
    csv = scored(particles.source, tmp_path, weights=())
    scores = np.sort(np.loadtxt(csv.splitlines(), delimiter=",")[:, 1])
    assert scores[0] > 0.25
    assert scores[1] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_simulated_project_scores_the_same_as_star_and_as_cs(sign, tmp_path):
    star = simulate_project(tmp_path / "P1", n_micrographs=3, particles_per_micrograph=30)
    before = scored(star, tmp_path / "as_star", weights=())
    path = write_cs(tmp_path / "P1/J2/particles.cs", particles_of(star, sign))
    if sign < 0:
        invert_contrast(read_particles(star))
    after = scored(path, tmp_path / "as_cs", weights=())
    assert after == before
    assert_same_but_score(tmp_path / "as_cs/particles.cs", path, slice(None))
    values = records(tmp_path / "as_cs/particles.cs")[SCORE_FIELD]
    expected = [float(line.split(", ")[1]) for line in before.splitlines()]
    assert np.abs(values - expected).max() < 6e-5


def test_accepted_and_rejected_split_the_uids_in_order(project, fields):
    path = write_cs(project / "J2/particles.cs", fields)
    scored(path, project / "out")
    parts = [records(project / f"out/particles_{name}.cs") for name in ("accepted", "rejected")]
    good, bad = (set(rows["uid"].tolist()) for rows in parts)
    assert good
    assert bad
    order = fields["uid"].tolist()
    assert parts[0]["uid"].tolist() == [uid for uid in order if uid in good]
    assert parts[1]["uid"].tolist() == [uid for uid in order if uid not in good]
    assert (parts[0][SCORE_FIELD] >= 0.5).all()
    assert not list((project / "out").glob(".*"))


@pytest.mark.parametrize("mode", [12, 0, 1, 6])
def test_the_contrast_of_stacks_of_every_mode_is_inverted_exactly(mode, tmp_path):
    from relion_cryofilter.images.batches import map_batches

    images = blobs(5, 16) * (10 if mode != 12 else 1) + (60 if mode == 6 else 0)
    write_stack(tmp_path / "S1/a.mrc", images, mode=mode)
    cs = {"uid": np.arange(1, 6, dtype=np.uint64), "blob/path": [">S1/a.mrc"] * 5,
          "blob/idx": np.arange(5, dtype=np.uint32),
          "blob/sign": np.array([1, -1, 1, -1, 1], np.float32)}  # fmt: skip
    particles = read_particle_file(write_cs(tmp_path / "J2/particles.cs", cs))
    assert len(particles.stacks) == 2
    headers, bad = check_stacks(particles)
    assert not len(bad)
    found = np.zeros((5, 16, 16))
    for rows, result in map_batches(lambda x: x.float().numpy(), particles, np.arange(5), headers):
        found[rows] = result
    stored = images.astype({12: "f2", 0: "i1", 1: "i2", 6: "u2"}[mode]).astype(np.float32)
    assert (found == stored * cs["blob/sign"][:, None, None]).all()


def test_what_a_cs_file_says_of_micrographs_and_pixel_sizes_is_kept(project, star, fields):
    particles = read_particle_file(write_cs(project / "J2/particles.cs", fields))
    expected = read_particles(star)
    assert particles.micrographs == expected.micrographs
    assert particles.micrograph_of.tolist() == expected.micrograph_of.tolist()
    assert particles.has_micrographs
    [group] = particles.optics
    assert group.pixel_size_angstrom == pytest.approx(3.0)
    names = [particles.image_name(row) for row in range(len(particles))]
    assert names == [expected.image_name(row) for row in range(len(expected))]


@pytest.mark.slow
def test_a_passthrough_file_in_another_order_is_joined_by_uid(project, fields):
    path = write_cs(project / "J2/particles.cs", part(fields, "alignments2D", "ctf"))
    rest = part(fields, "blob", "location")
    extra = {name: [*list(values)[::-1], next(iter(values))] for name, values in rest.items()}
    extra["uid"][-1] = np.uint64(7)
    extra["uid"] = np.array(extra["uid"], np.uint64)
    passthrough = write_cs(project / "J2/P3_J2_passthrough_particles.cs", extra)
    whole = write_cs(project / "J3/particles.cs", fields)
    expected = scored(whole, project / "whole")
    assert scored(path, project / "out", passthrough=passthrough) == expected
    assert_same_but_score(project / "out/particles.cs", path, slice(None))
    rest = records(project / "out/particles_passthrough.cs")
    assert rest["uid"].tolist() == fields["uid"].tolist()
    assert [text.decode() for text in rest["blob/path"]] == fields["blob/path"]


@pytest.mark.slow
def test_a_result_group_is_read_and_written_so_that_it_is_read_again(project, fields):
    job = project / "J12"
    main_file = part(fields, "alignments2D", "blob", "ctf")
    write_cs(job / "particles_selected.cs", main_file)
    write_cs(job / "P3_J12_passthrough_particles_selected.cs", part(fields, "location"))
    (job / "particles_selected.csg").write_text(CSG_GROUP.format(n=len(fields["uid"])))
    first = scored(job / "particles_selected.csg", project / "out")
    group = yaml.safe_load((project / "out/particles_accepted.csg").read_text())
    accepted = records(project / "out/particles_accepted.cs")
    slots = {"alignments2D", "blob", "ctf", "location"}
    assert set(group["results"]) == slots
    assert group["group"]["type"] == "particle"
    assert group["results"]["blob"] == {
        "metafile": ">particles_accepted.cs", "num_items": len(accepted), "type": "particle.blob"
    }  # fmt: skip
    where = group["results"]["location"]["metafile"]
    assert where == ">particles_accepted_passthrough.cs"
    assert scored(project / "out/particles.csg", project / "again") == first


def test_a_compressed_cs_file_stays_compressed(project, fields):
    path = write_cs(project / "J2/particles.cs", fields, compressed=True)
    scored(path, project / "out")
    assert (project / "out/particles.cs").read_bytes().startswith(b"\x95CSDAT")
    before, after = (dataset.Dataset.load(file) for file in (path, project / "out/particles.cs"))
    after.drop_fields([SCORE_FIELD])
    assert before == after


@pytest.mark.slow
def test_a_scored_file_is_scored_and_selected_again(project, fields):
    path = write_cs(project / "J2/particles.cs", fields)
    scored(path, project / "out")
    scored(project / "out/particles.cs", project / "again")
    assert (project / "again/particles.cs").read_bytes() == (
        project / "out/particles.cs"
    ).read_bytes()
    select(SelectOptions(in_parts="out/particles.cs", o="strict", threshold="keep=0.25"))
    kept = records(project / "strict/particles_accepted.cs")
    assert len(kept) == len(fields["uid"]) // 4
    rest = records(project / "strict/particles_rejected.cs")[SCORE_FIELD]
    assert kept[SCORE_FIELD].min() >= rest.max()


@pytest.mark.slow
def test_an_empty_subset_is_not_written_and_its_older_files_go(project, fields):
    path = write_cs(project / "J2/particles.cs", fields)
    scored(path, project / "out")
    scored(path, project / "out", threshold=1.0)
    assert not list((project / "out").glob("particles_accepted*"))
    assert (project / "out/particles_rejected.csg").exists()


def test_labels_come_from_the_two_cs_files_of_a_select_2d_job(project, fields):
    good = fields["alignments2D/class"] < 2
    for name, rows in (("selected", good), ("excluded", ~good)):
        chosen = {k: np.array(v, object if isinstance(v, list) else None)[rows]
                  for k, v in fields.items()}  # fmt: skip
        write_cs(project / f"J4/particles_{name}.cs", chosen)
    labelled = read_labels(
        None, pos=[project / "J4/particles_selected.cs"], neg=[project / "J4/particles_excluded.cs"]
    )
    assert labelled.labels.sum() == good.sum()
    assert len(labelled) == len(good)
    path = write_cs(project / "J3/particles.cs", fields)
    of_classes = read_labels(path, pos_classes=[0, 1])
    assert of_classes.labels.tolist() == good.tolist()
    table = read_particle_file(path).table
    assert set(table.labels) == {*fields} - {"uid"}
    assert table.place(2) == f"{path}, row 3"
    assert table.numbers(["rlnDefocusU"]) == {}
    with pytest.raises(CryoSparcError, match=r"no field cryofilter/score .* of a score job"):
        table.scores()
    no_classes = write_cs(project / "J5/particles.cs", part(fields, "blob"))
    with pytest.raises(CryoSparcError, match="has no field alignments2D/class"):
        read_labels(no_classes, pos_classes=[0])
    with pytest.raises(UsageError, match="holds no labels"):
        read_labels(path)


def bad_input(kind, project, fields):
    """Return the words after --in_parts for a broken input, and what shall be said."""
    job = project / "J2"
    if kind == "missing passthrough":
        return [write_cs(job / "p.cs", part(fields, "ctf"))], "has no field blob/path"
    if kind == "absent passthrough":
        path = write_cs(job / "p.cs", part(fields, "ctf"))
        return [path, "--passthrough", "no.cs"], "no.cs: can't be read"
    if kind == "uid mismatch":
        path = write_cs(job / "p.cs", part(fields, "ctf"))
        other = {**part(fields, "blob"), "uid": fields["uid"] + np.uint64(1)}
        extra = write_cs(job / "q.cs", other)
        return [path, "--passthrough", extra], "has no row for 48 of the 48 particles"
    if kind == "blob path":
        fields["blob/path"] = [">S9/none.mrc"] * len(fields["uid"])
        return [write_cs(job / "p.cs", fields)], "S9/none.mrc is in none of the folders above"
    if kind == "no dataset":
        (job).mkdir()
        (job / "p.cs").write_bytes(b"data_\n")
        return [job / "p.cs"], "can't be read as a CryoSPARC dataset"
    if kind == "no rows":
        empty = {name: values[:0] for name, values in fields.items()}
        return [write_cs(job / "p.cs", empty)], "holds no particles"
    (job).mkdir()
    if kind == "group without its file":
        write_cs(job / "particles_selected.cs", part(fields, "alignments2D", "blob"))
        (job / "p.csg").write_text(CSG_GROUP.format(n=48))
        return [job / "p.csg"], "P3_J12_passthrough_particles_selected.cs: can't be read"
    (job / "p.csg").write_text("results: 3\n")
    return [job / "p.csg"], "is not a CryoSPARC result group"


@pytest.mark.parametrize(
    "kind",
    ["missing passthrough", "absent passthrough", "uid mismatch", "blob path", "no dataset",
     "no rows", "no group", "group without its file"],
)  # fmt: skip
def test_a_bad_input_gets_one_sentence_and_leaves_the_job_failed(kind, project, fields, capsys):
    words, said = bad_input(kind, project, fields)
    code = main(["score", "--in_parts", *map(str, words), "--o", "out/", "--j", "1",
                 "--weights", "model.safetensors"])  # fmt: skip
    err = capsys.readouterr().err
    assert code == 1
    assert said in err
    assert err.count("ERROR") == 1
    assert "Traceback" not in err
    assert [path.name for path in (project / "out").iterdir()] == [FAILURE]


def test_a_file_with_very_many_fields_comes_back(project, fields):
    more = {f"alignments_class_{i}/pose_of_component": fields["ctf/df1_A"] for i in range(400)}
    path = write_cs(project / "J2/particles.cs", {**fields, **more})
    table = read_cs(path)
    table.write({project / "out.cs": np.ones(len(table), bool)}, np.zeros(len(table)))
    after = np.load(project / "out.cs", max_header_size=1 << 30)
    assert len(after.dtype.names) == len(fields) + 401


def test_a_stack_that_is_gone_is_named(project, fields):
    path = write_cs(project / "J2/particles.cs", fields)
    (project / "Extract/job001/Mics/mic1.mrcs").unlink()
    with pytest.raises(ImageError, match=r"mic1\.mrcs: can't be read"):
        scored(path, project / "out")
    assert not (project / "out/particles.cs").exists()


def test_without_cryosparc_tools_the_cure_is_named(project, fields, monkeypatch):
    path = write_cs(project / "J2/particles.cs", fields)
    monkeypatch.setitem(__import__("sys").modules, "cryosparc.dataset", None)
    with pytest.raises(CryoSparcError, match="pip install cryosparc-tools"):
        read_particle_file(path)


def test_cs_options_are_refused_for_star_files_and_inputs_are_never_overwritten(project, fields):
    path = write_cs(project / "J2/particles.cs", fields)
    with pytest.raises(UsageError, match=r"are for \.cs files"):
        scored(project / "Extract/job001/particles.star", project / "out", passthrough=path)
    with pytest.raises(UsageError, match="--score_label is for STAR files"):
        scored(path, project / "out", score_label="cryofilterScore")
    with pytest.raises(CryoFilterError, match="would overwrite"):
        scored(path, project / "J2")


@pytest.mark.parametrize(
    ("index", "message"),
    [(np.array([-1, 0, 3], np.int32), "holds 3 images but image 0 is asked for"),
     (np.array([2**64 - 1, 0, 3], np.uint64), "is asked for"),
     (np.array([0.5, 0, 1]), "blob/idx has the type float64 .*; expected whole numbers")],
)  # fmt: skip
def test_an_image_before_the_first_is_a_bad_one(tmp_path, index, message):
    """The bytes before it are those of the header."""
    write_stack(tmp_path / "S1/a.mrc", blobs(3, 16), extended=4096)
    cs = {"uid": np.arange(1, 4, dtype=np.uint64), "blob/path": [">S1/a.mrc"] * 3,
          "blob/idx": index}  # fmt: skip
    with pytest.raises(CryoFilterError, match=message):
        check_stacks(read_particle_file(write_cs(tmp_path / "J2/particles.cs", cs)))[1].refuse()


def test_a_box_other_than_the_dataset_says_is_not_scored(tmp_path):
    write_stack(tmp_path / "S1/a.mrc", blobs(3, 16))
    cs = {"uid": np.arange(1, 4, dtype=np.uint64), "blob/path": [">S1/a.mrc"] * 3,
          "blob/idx": np.arange(3, dtype=np.uint32),
          "blob/shape": np.array([[16, 16], [16, 16], [24, 24]], np.uint32)}  # fmt: skip
    _, bad = check_stacks(read_particle_file(write_cs(tmp_path / "J2/particles.cs", cs)))
    assert bad.rows.tolist() == [2]


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.5, -0.1])
def test_a_score_that_is_none_is_refused(tmp_path, value):
    cs = {"uid": np.arange(1, 4, dtype=np.uint64),
          SCORE_FIELD: np.array([0.5, value, 0.25], np.float32)}  # fmt: skip
    table = read_cs(write_cs(tmp_path / "J2/particles.cs", cs))
    with pytest.raises(CryoSparcError, match=r"row 2: cryofilter/score is .* from 0 to 1"):
        table.scores()

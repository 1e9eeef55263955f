"""Labels that a project holds already, with counts that equal what its files say."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from making import half_star, make_select_job

from relion_cryofilter.errors import CryoFilterError, StarError
from relion_cryofilter.particles.labels import read_labels
from relion_cryofilter.particles.particles import concatenate, read_particles
from relion_cryofilter.particles.splits import folds_by_micrograph, split_by_micrograph


@pytest.fixture
def select_job(project):
    """Add a Class2D job and a Select job that kept class 3, as RELION 3.1 and 5 write them."""
    return make_select_job(project)


@pytest.mark.parametrize("relion", ["3.1", "5"])
@pytest.mark.parametrize("numbers", [True, False])
def test_a_select_job_gives_its_kept_class_as_positives(project, relion, numbers):
    make_select_job(project, relion=relion, numbers=numbers)
    labelled = read_labels(Path("Select/job003/particles.star"))
    good = {labelled.particles.image_name(row) for row in np.flatnonzero(labelled.labels)}
    assert good == {
        f"{i:06d}@Extract/job001/Mics/mic{m}.mrcs" for i in range(1, 13) for m in (2, 3)
    }
    assert (~labelled.labels).sum() == 24


@pytest.mark.shared("relion_projects")
@pytest.mark.parametrize("version", ["v31", "v5"])
def test_the_select_jobs_of_real_projects_agree_with_their_class_files(shared, version):
    root = shared / "relion_projects" / version
    labelled = read_labels(root / "Select/job003/particles.star")
    kept = read_particles(root / "Select/job003/particles.star")
    names = {kept.image_name(row) for row in range(len(kept))}
    good = {labelled.particles.image_name(row) for row in np.flatnonzero(labelled.labels)}
    everything = {labelled.particles.image_name(row) for row in range(len(labelled))}
    with (root / "truth.csv").open() as file:
        truth = {row["image"] for row in csv.DictReader(file)}
    assert good == names
    assert everything == truth
    assert len(labelled.notes) == 1, "particles.star or the backup differ from the classes"


def test_a_stale_backup_selection_and_a_filtered_selection_are_noted(select_job):
    (select_job / "backup_selection.star").write_text("data_\n\nloop_\n_rlnSelected #1\n1\n0\n1\n")
    text = (select_job / "particles.star").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(text) if "@" in line)
    del text[first]
    (select_job / "particles.star").write_text("".join(text))
    notes = read_labels(select_job / "particles.star").notes
    assert any("has 23 particles, the kept classes 24 (1 missing there" in note for note in notes)
    assert any("names other classes (1, 3)" in note for note in notes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda job: (job / "job.star").unlink(), "no labels here. Expected the particles.star of"),
        (lambda job: (job / "particles.star").unlink(), "does not exist"),
        (
            lambda job: (job / "class_averages.star").write_bytes(b""),
            r"class_averages\.star: no table found",
        ),
        (
            lambda job: (job / "job.star").write_text(
                (job / "job.star").read_text().replace("Class2D/job002/run_it012_model.star", '""')
            ),
            "fn_model is '', so this Select job did not choose classes",
        ),
        (
            lambda job: (job.parents[1] / "Class2D/job002/run_it012_data.star").unlink(),
            "run_it012_data.star is missing",
        ),
    ],
)
def test_a_select_job_that_lacks_something_is_refused_by_name(select_job, spoil, message):
    spoil(select_job)
    with pytest.raises(CryoFilterError, match=message):
        read_labels(select_job / "particles.star")


DATA = Path("Class2D/job002/run_it012_data.star")


def test_named_classes_give_labels_and_leave_the_others_out(select_job):
    labelled = read_labels(DATA, pos_classes=[3], neg_classes=[1])
    assert (labelled.labels.sum(), len(labelled)) == (24, 36)
    assert "12 particles of classes that are not named are left out." in labelled.notes
    assert len(read_labels(DATA, pos_classes=[3])) == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pos_classes": [9]}, r"in class 9. Classes \(particles\): 1 \(12\), 2 \(12\), 3 \(24\)"),
        ({"pos_classes": [1], "neg_classes": [1, 2]}, "Class 1 is in --pos_classes and in"),
        ({"neg_classes": [1]}, "--neg_classes is given without --pos_classes"),
        ({"pos_classes": [1, 2, 3]}, "No negative particles are left"),
    ],
)
def test_classes_that_make_no_sense_are_refused(select_job, options, message):
    with pytest.raises(CryoFilterError, match=message):
        read_labels(DATA, **options)


def test_a_file_without_classes_is_refused(project):
    with pytest.raises(CryoFilterError, match="has no column rlnClassNumber"):
        read_labels(Path("Extract/job001/particles.star"), pos_classes=[1])


@pytest.mark.parametrize(
    ("reference", "kept"),
    [("Class3D/job002/run_it025_class003.mrc", 24), ("000003@x_classes.mrcs", 24)],
)
def test_the_class_is_read_from_the_reference(select_job, reference, kept):
    text = (select_job / "class_averages.star").read_text()
    text = text.replace("_rlnClassNumber #2\n", "").replace(" 3\n", "\n")
    text = text.replace("000003@Class2D/job002/run_it012_classes.mrcs", reference)
    (select_job / "class_averages.star").write_text(text)
    assert read_labels(select_job / "particles.star").labels.sum() == kept


def test_a_job_star_with_odd_options_is_read(select_job):
    with (select_job / "job.star").open("a") as file:
        file.write("qsub_extra1 \"-p 'big mem' --comment='a#b'\"\nother_args nan\n")
    assert read_labels(select_job / "particles.star").labels.sum() == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"data_\n\nloop_\n_rlnReferenceImage #1\n\n", "lists no classes"),
        (b"data_\n\nloop_\n_rlnSelected #1\n1\n", "lists no classes"),
        (b"data_\n_rlnReferenceImage\n", "can't be read as a STAR table"),
        (b"data_\n\nloop_\n_rlnReferenceImage #1\nx\ny z\n", "can't be read as a STAR table"),
        (b"data_\n\nloop_\n_rlnReferenceImage #1\n1@\xff.mrcs\n", "no table found"),
        (
            b"data_\n\nloop_\n_rlnReferenceImage #1\nx.mrcs\n",
            "rlnReferenceImage is 'x.mrcs'; expected",
        ),
    ],
)
def test_class_averages_that_say_nothing_are_refused_until_they_are_corrected(
    select_job, text, message
):
    path = select_job / "class_averages.star"
    good = path.read_bytes()
    path.write_bytes(text)
    with pytest.raises(CryoFilterError, match=rf"class_averages\.star: {message}"):
        read_labels(select_job / "particles.star")
    path.write_bytes(good)
    assert read_labels(select_job / "particles.star").labels.sum() == 24


@pytest.mark.parametrize("number", ["abc", "nan", "1.5"])
def test_a_class_number_that_is_none_is_refused(select_job, number):
    text = (select_job / "class_averages.star").read_text()
    (select_job / "class_averages.star").write_text(text.replace(" 3\n", f" {number}\n"))
    with pytest.raises(CryoFilterError, match=r"rlnClassNumber is .*expected a number"):
        read_labels(select_job / "particles.star")


def test_a_selection_of_other_particles_is_refused(select_job):
    text = (select_job / "class_averages.star").read_text()
    (select_job / "class_averages.star").write_text(text.replace(" 3\n", " 1\n"))
    with pytest.raises(CryoFilterError, match="has none of the 12 particles of the kept classes"):
        read_labels(select_job / "particles.star")


def test_rows_that_contradict_each_other_are_left_out(select_job):
    text = DATA.read_text()
    row = next(line for line in text.splitlines() if "@" in line and line.rstrip().endswith(" 3"))
    DATA.write_text(text.rstrip() + f"\n{row.rstrip()[:-1]}1 \n{row}\n\n")
    labelled = read_labels(DATA, pos_classes=[3])
    assert len(labelled) == 47
    assert any("1 particles are named as good and as bad" in note for note in labelled.notes)


def test_files_of_both_kinds_mix_star_and_stacks_and_count_doubles(project):
    good = half_star(project, "good.star", lambda line: "mic0" in line or "mic1" in line)
    bad = half_star(project, "bad.star", lambda line: "mic1" in line and "000001@" in line)
    labelled = read_labels(None, [good, good], [bad, Path("Extract/job001/Mics/mic3.mrcs")])
    assert labelled.labels.sum() == 23
    assert (~labelled.labels).sum() == 12
    assert any("1 particles are named as good and as bad" in n for n in labelled.notes)
    assert any("23 rows name a particle again" in note for note in labelled.notes)


@pytest.mark.parametrize(
    ("pos", "neg", "in_parts", "message"),
    [
        (["good.star"], [], None, "--neg names no file"),
        ([], ["good.star"], None, "--pos names no file"),
        (["good.star"], ["good.star"], None, "No positive particles are left"),
        (["good.star"], ["good.star"], Path("good.star"), "not from both"),
        ([], [], None, "Labels are needed"),
    ],
)
def test_files_that_give_one_kind_only_are_refused(project, pos, neg, in_parts, message):
    half_star(project, "good.star", lambda line: "mic0" in line)
    with pytest.raises(CryoFilterError, match=message):
        read_labels(in_parts, [Path(path) for path in pos], [Path(path) for path in neg])


def test_a_bad_label_file_is_refused_by_name_and_line(project):
    (project / "broken.star").write_text("data_\nloop_\n_rlnImageName #1\n_x #2\n1@a.mrcs\n")
    with pytest.raises(StarError, match=r"broken\.star, line 5: 1 values"):
        read_labels(None, [project / "broken.star"], [project / "broken.star"])


def test_sets_that_share_stacks_are_joined_without_mixing_rows(project):
    particles = read_particles(Path("Extract/job001/particles.star"))
    some, rest = particles.take(np.arange(7, 20)), particles.take(np.arange(7))
    joined = concatenate([some, rest])
    names = [particles.image_name(row) for row in [*range(7, 20), *range(7)]]
    assert [joined.image_name(row) for row in range(20)] == names
    assert len(joined.stacks) == 4


def particles_of(n_micrographs, per_micrograph, tmp_path, named=True, n_stacks=None):
    rows = []
    for mic in range(n_micrographs):
        for image in range(per_micrograph):
            stack = mic % (n_stacks or n_micrographs)
            place = image + 1 + per_micrograph * (mic // (n_stacks or n_micrographs))
            rows.append(f"{place}@s{stack}.mrcs" + (f" m{mic}.mrc" if named else ""))
    labels = "_rlnImageName #1\n" + ("_rlnMicrographName #2\n" if named else "")
    path = tmp_path / "p.star"
    path.write_text("data_\n\nloop_\n" + labels + "\n".join(rows) + "\n")
    return read_particles(path)


@pytest.mark.parametrize("seed", range(5))
def test_no_micrograph_is_on_two_sides_and_every_side_has_both_kinds(tmp_path, seed):
    particles = particles_of(30, 20, tmp_path)
    labels = np.random.default_rng(seed).random(600) < 0.3
    split = split_by_micrograph(particles, labels, 0.7, seed)
    sides = [set(particles.micrograph_of[rows]) for rows in split.parts.values()]
    assert split.unit == "micrograph"
    assert not any(a & b for i, a in enumerate(sides) for b in sides[:i])
    assert sum(map(len, split.parts.values())) == 600
    assert abs(len(split.train) / 600 - 0.7) < 0.05
    assert all(0 < labels[rows].sum() < len(rows) for rows in split.parts.values())
    again = split_by_micrograph(particles, labels, 0.7, seed)
    assert all(np.array_equal(a, b) for a, b in zip(split.parts.values(), again.parts.values()))


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path):
    particles = particles_of(30, 20, tmp_path)
    labels = np.random.default_rng(0).random(600) < 0.3
    first = split_by_micrograph(particles, labels, 0.7, 3)
    order = np.random.default_rng(1).permutation(600)
    again = split_by_micrograph(particles.take(order), labels[order], 0.7, 3)
    shuffled = concatenate([particles.take(order[300:]), particles.take(order[:300])])
    third = split_by_micrograph(shuffled, np.roll(labels[order], 300), 0.7, 3)
    for a, b, c in zip(*(split.parts.values() for split in (first, again, third))):
        names = {particles.image_name(row) for row in a}
        assert names == {particles.image_name(order[row]) for row in b}
        assert names == {shuffled.image_name(row) for row in c}
    single = split_by_micrograph(particles.take(np.arange(40)), labels[:40], 0.7, 0)
    assert single.unit == "particle"


def test_neighbours_are_those_of_one_micrograph_whatever_the_split_is_by(tmp_path):
    particles = particles_of(2, 50, tmp_path)
    split = split_by_micrograph(particles, np.arange(100) % 2 == 0, 0.7, 0)
    assert (split.unit, split.cluster_unit) == ("particle", "micrograph")
    assert set(split.clusters) == {0, 1}


def test_without_micrograph_names_the_split_is_by_stack(tmp_path):
    particles = particles_of(12, 10, tmp_path, named=False)
    labels = np.arange(120) % 2 == 0
    assert split_by_micrograph(particles, labels, 0.7, 0).unit == "stack"


def test_where_no_group_holds_both_kinds_the_split_is_by_particle(tmp_path):
    particles = particles_of(2, 50, tmp_path)
    labels = np.arange(100) < 50
    split = split_by_micrograph(particles, labels, 0.7, 0)
    assert split.unit == "particle"
    assert [len(rows) for rows in split.parts.values()] == [70, 14, 16]
    assert np.array_equal(np.sort(np.concatenate(list(split.parts.values()))), np.arange(100))


def test_too_few_of_a_kind_is_an_error(tmp_path):
    labels = np.arange(40) < 2
    with pytest.raises(CryoFilterError, match="Only 2 positive particles"):
        split_by_micrograph(particles_of(4, 10, tmp_path), labels, 0.7, 0)


@pytest.mark.parametrize("seed", range(3))
def test_folds_hold_every_row_once_and_no_micrograph_twice(tmp_path, seed):
    particles = particles_of(30, 20, tmp_path)
    labels = np.random.default_rng(seed).random(600) < 0.3
    folds = folds_by_micrograph(particles, labels, seed)
    assert (folds.unit, len(folds.held)) == ("micrograph", 5)
    assert np.array_equal(folds.rows, np.arange(600))
    sides = [set(particles.micrograph_of[rows]) for rows in folds.held]
    assert not any(a & b for i, a in enumerate(sides) for b in sides[:i])
    assert all(90 < len(rows) < 150 and 0 < labels[rows].sum() < len(rows) for rows in folds.held)
    for number, rows in enumerate(folds.held):
        assert np.all(folds.fold_of[rows] == number)
        assert np.array_equal(folds.others(number), np.setdiff1d(np.arange(600), rows))
    left = folds_by_micrograph(particles, labels, seed, np.arange(10))
    assert np.array_equal(left.rows, np.arange(10, 600))


def test_folds_do_not_depend_on_the_order_of_the_rows(tmp_path):
    for number, particles in enumerate((particles_of(30, 20, tmp_path),
                                        particles_of(2, 60, tmp_path, named=False))):  # fmt: skip
        n = len(particles)
        labels = np.random.default_rng(0).random(n) < 0.3
        if number:  # each stack of one kind: folds are by particle
            labels = particles.stack_of == 0
        folds = folds_by_micrograph(particles, labels, 3)
        order = np.random.default_rng(1).permutation(n)
        again = folds_by_micrograph(particles.take(order), labels[order], 3)
        assert folds.unit == again.unit == ("particle" if number else "micrograph")
        for a, b in zip(folds.held, again.held):
            assert set(a.tolist()) == set(order[b].tolist())


def test_few_micrographs_give_fewer_folds_and_then_stacks_or_particles(tmp_path):
    particles = particles_of(3, 40, tmp_path)
    folds = folds_by_micrograph(particles, np.arange(120) % 2 == 0, 0)
    assert (folds.unit, len(folds.held)) == ("micrograph", 3)
    one_kind_each = particles.micrograph_of == 0
    folds = folds_by_micrograph(particles, one_kind_each, 0)
    assert (folds.unit, len(folds.held), folds.cluster_unit) == ("particle", 5, "micrograph")
    by_stack = particles_of(12, 10, tmp_path, named=False)
    assert folds_by_micrograph(by_stack, np.arange(120) % 2 == 0, 0).unit == "stack"

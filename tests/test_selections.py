"""Select jobs of every kind give the labels that their class files give, or say what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import make_select_job

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.particles.labels import read_labels
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.star import particle_loop, read_star

PARTICLES = Path("Select/job003/particles.star")
DATA = "Class2D/job002/run_it012_data.star"
AVERAGES, BACKUP = (
    PARTICLES.with_name("class_averages.star"),
    PARTICLES.with_name("backup_selection.star"),
)


@pytest.fixture
def select_job(project):
    """A Class2D job of 48 particles in classes 1, 2 and 3, and a Select job that kept class 3."""
    return make_select_job(project)


def good_and_bad(path=PARTICLES):
    """Return the names of the good and of the bad particles."""
    labelled = read_labels(Path(path))
    names = [labelled.particles.image_name(row) for row in range(len(labelled))]
    good = {name for name, label in zip(names, labelled.labels) if label}
    return good, set(names) - good


def in_classes(data_star, kept):
    """Return the names of the particles of a classification in the classes `kept`, and the rest."""
    loop = particle_loop(read_star(Path(data_star)))
    rows = list(loop.columns(["rlnImageName", "rlnClassNumber"]))
    good = {name for name, number in rows if int(number) in kept}
    return good, {name for name, _ in rows} - good


def write_job(folder, kind, **options):
    """Write the job.star of a job that did not choose classes itself."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{name} {value or chr(34) * 2}\n" for name, value in options.items())
    Path(folder, "job.star").write_text(
        f"data_job\n\n_rlnJobTypeLabel {kind}\n\ndata_joboptions_values\n\nloop_\n"
        f"_rlnJobOptionVariable #1\n_rlnJobOptionValue #2\n{lines}\n"
    )


def second_classification(job="job008", select="job009", stacks="mic", classes=(5, 6, 6, 5)):
    """Add another Class2D job, whose classes differ, and a Select job that kept class 6."""
    head = [line for line in Path(DATA).read_text().splitlines() if "@" not in line]
    rows = [line for line in Path(DATA).read_text().splitlines() if "@" in line]
    number = {row: classes[int(re.search(r"mic(\d)\.mrcs", row)[1])] for row in rows}
    rows = [row.rstrip()[:-1] + f"{number[row]} " for row in rows if re.search(stacks, row)]
    kept = [row for row in rows if row.rstrip().endswith(" 6")]
    root, chosen = Path("Class2D", job), Path("Select", select)
    for folder in (root, chosen):
        folder.mkdir(parents=True)
    (root / "run_it200_data.star").write_text("\n".join([*head, *rows, "", ""]))
    (chosen / "particles.star").write_text("\n".join([*head, *kept, "", ""]))
    write_job(chosen, "relion.select.interactive", fn_model=f"{root}/run_it200_model.star")
    return root / "run_it200_data.star", chosen / "particles.star"


def averages(*references, numbers=()):
    """Write class_averages.star."""
    labels = "_rlnReferenceImage #1\n" + ("_rlnClassNumber #2\n" if numbers else "")
    rows = zip(references, numbers) if numbers else zip(references)
    text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    AVERAGES.write_text(f"data_\n\nloop_\n{labels}{text}\n")


def backup(*flags):
    """Write backup_selection.star."""
    rows = "".join(f"           {flag} \n" for flag in flags)
    BACKUP.write_text(f"\n# version 30001\n\ndata_\n\nloop_ \n_rlnSelected #1 \n{rows} \n")


@pytest.mark.parametrize("with_backup", [True, False])
def test_without_class_averages_the_particles_say_which_classes_were_kept(select_job, with_backup):
    AVERAGES.unlink()
    if with_backup:
        backup(0, 0, 1)
    assert good_and_bad() == in_classes(DATA, {3})


def test_without_class_numbers_of_their_own_particles_are_found_by_their_names(select_job):
    AVERAGES.unlink()
    text = PARTICLES.read_text().replace("_rlnClassNumber #8\n", "")
    PARTICLES.write_text(re.sub(r" +3 \n", " \n", text))
    assert good_and_bad() == in_classes(DATA, {3})


@pytest.mark.parametrize(
    "reference",
    ["000001@Select/job003/class_averages.mrcs", "000001@elsewhere/run_it025_classes.mrcs"],
)
def test_places_in_a_stack_of_another_job_are_no_class_numbers(select_job, reference):
    averages(reference)
    assert good_and_bad() == in_classes(DATA, {3})


def test_recentred_averages_that_tell_their_classes_are_a_witness(select_job):
    averages("000001@Select/job003/class_averages.mrcs", numbers=[3])
    assert good_and_bad() == in_classes(DATA, {3})
    averages("000001@Select/job003/class_averages.mrcs", numbers=[2])
    with pytest.raises(CryoFilterError, match="has none of the 12 particles of the kept classes"):
        read_labels(PARTICLES)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda: averages("1@Class2D/job002/run_it012_classes.mrcs",
                          "3@Class2D/job002/run_it012_classes.mrcs"), "names the classes 1, 3"),
        (lambda: [AVERAGES.unlink(), backup(1, 0, 1)], "names the classes 1, 3"),
        (lambda: PARTICLES.write_text(PARTICLES.read_text().replace(" 3 \n", " 2 \n", 5)),
         "5 of its particles are in other classes than in"),
    ],
)  # fmt: skip
def test_witnesses_that_disagree_are_refused_with_what_to_do(select_job, spoil, found):
    spoil()
    with pytest.raises(CryoFilterError, match=found) as caught:
        read_labels(PARTICLES)
    assert "Select again, or name the good classes" in str(caught.value)
    assert f"--in_parts {DATA} --pos_classes" in str(caught.value)


def test_classes_without_particles_are_no_disagreement(select_job):
    averages(*(f"{n}@Class2D/job002/run_it012_classes.mrcs" for n in (3, 9)))
    backup(0, 0, 1, 0, 0, 0, 1, 0, 1)
    assert good_and_bad() == in_classes(DATA, {3})


@pytest.mark.parametrize("kind", ["relion.select.interactive", "relion.select.class2dauto"])
def test_the_class_rankers_choice_and_one_by_hand_on_its_optimiser_are_read(select_job, kind):
    ranked = Path("Select/job004")
    ranked.mkdir()
    shutil.copy(DATA, ranked / "rank_data.star")
    (ranked / "rank_optimiser.star").write_text(
        "data_optimiser_general\n\n_rlnOutputRootName  Class2D/job002/run\n"
        "_rlnModelStarFile  Select/job004/rank_model.star\n"
        "_rlnExperimentalDataStarFile  Select/job004/rank_data.star\n"
    )
    write_job("Select/job003", kind, fn_model="Select/job004/rank_optimiser.star")
    for write in (AVERAGES.unlink, lambda: averages("3@Class2D/job002/run_it012_classes.mrcs")):
        write()
        assert good_and_bad() == in_classes(DATA, {3})


def test_a_regrouped_selection_is_read(select_job):
    text = PARTICLES.read_text().replace(
        "_rlnClassNumber #8\n", "_rlnClassNumber #8\n_rlnGroupName #9\n"
    )
    PARTICLES.write_text(text.replace(" 3 \n", " 3 group_1 \n"))
    assert good_and_bad() == in_classes(DATA, {3})


@pytest.mark.parametrize("kind", ["relion.select.split", "relion.select.onvalue", "7"])
def test_a_split_or_filtered_selection_has_the_classes_of_what_it_was_made_of(select_job, kind):
    lines = PARTICLES.read_text().splitlines(keepends=True)
    rows = [line for line in lines if "@" in line]
    write_job("Select/job005", kind, fn_model="", fn_data=str(PARTICLES), select_label="rlnX")
    half = Path("Select/job005/particles_split1.star")
    half.write_text("".join(line for line in lines if "@" not in line or line in rows[:12]))
    assert good_and_bad(half) == in_classes(DATA, {3})
    assert any("12 missing there" in note for note in read_labels(half).notes)


def test_a_selection_by_class_number_chose_classes(select_job):
    write_job(
        "Select/job003", "relion.select.onvalue", fn_model="", fn_data=DATA,
        do_select_values="Yes", select_label="rlnClassNumber", select_minval=3, select_maxval=3,
    )  # fmt: skip
    AVERAGES.unlink()
    assert good_and_bad() == in_classes(DATA, {3})


def test_selections_that_were_joined_have_the_classes_of_each(select_job):
    data, other = second_classification(stacks="mic[01]", classes=(5, 6, 0, 0))
    first = Path(DATA).read_text().splitlines(keepends=True)
    Path(DATA).write_text("".join(line for line in first if not re.search("mic[01].mrcs", line)))
    # Class 3 is all of what is left there, so one of its micrographs becomes class 2.
    for path in (Path(DATA), PARTICLES):
        lines = path.read_text().splitlines(keepends=True)
        if path == PARTICLES:
            lines = [line for line in lines if "mic2.mrcs" not in line]
        moved = [re.sub("3 $", "2 ", x) if "mic2.mrcs" in x else x for x in lines]
        path.write_text("".join(moved))
    write_job("JoinStar/job010", "relion.joinstar.particles", do_part="Yes",
              fn_part1=str(PARTICLES), fn_part2=str(other), fn_part3="")  # fmt: skip
    rows = [x for path in (PARTICLES, other) for x in path.read_text().splitlines() if "@" in x]
    head = [x for x in PARTICLES.read_text().splitlines() if "@" not in x]
    joined = "\n".join([*head, *rows, "", ""])
    expected = [a | b for a, b in zip(in_classes(DATA, {3}), in_classes(data, {6}))]
    Path("JoinStar/job010/join_particles.star").write_text(joined)
    assert good_and_bad("JoinStar/job010/join_particles.star") == tuple(expected)
    # The same by hand, in a Select job's files.
    PARTICLES.write_text(joined)
    averages("3@Class2D/job002/run_it012_classes.mrcs", "6@Class2D/job008/run_it200_classes.mrcs")
    assert good_and_bad() == tuple(expected)
    averages("2@Class2D/job002/run_it012_classes.mrcs", "6@Class2D/job008/run_it200_classes.mrcs")
    with pytest.raises(CryoFilterError, match="12 of its 24 particles are in none of the classes"):
        read_labels(PARTICLES)
    # And without averages: what is not of the job's own classification is left out, and said.
    AVERAGES.unlink()
    assert good_and_bad() == in_classes(DATA, {3})
    assert any(
        "12 particles of" in note and "--pos" in note for note in read_labels(PARTICLES).notes
    )


def test_jobs_that_feed_each_other_are_refused(select_job):
    for one, other in (("job005", "job006"), ("job006", "job005")):
        source = f"Select/{other}/particles.star"
        write_job(f"Select/{one}", "relion.select.onvalue", fn_data=source)
        shutil.copy(PARTICLES, f"Select/{one}/particles.star")
    with pytest.raises(CryoFilterError, match="is made of its output"):
        read_labels(Path("Select/job005/particles.star"))


@pytest.mark.parametrize("job_star", [True, False])
def test_a_classification_is_answered_with_its_classes_and_their_sizes(select_job, job_star):
    if job_star:
        write_job("Class2D/job002", "relion.class2d", fn_img="Extract/job001/particles.star")
    with pytest.raises(CryoFilterError, match=r"--pos_classes .*1 \(12\), 2 \(12\), 3 \(24\)"):
        read_labels(Path(DATA))


@pytest.mark.shared("cases")
@pytest.mark.parametrize(
    ("version", "case", "select", "kept"),
    [
        ("v31", "select_on_class3d", "job004", {3}),
        ("v5", "select_on_class_ranker", "job004", {3, 4, 5}),
        ("v31", "select_on_class_ranker", "job006", {3, 4, 5}),
    ],
)
def test_real_selections_on_class3d_and_on_the_class_ranker_are_read(
    shared, tmp_path, monkeypatch, version, case, select, kept
):
    shutil.copytree(shared / "relion_projects" / version, tmp_path, dirs_exist_ok=True)
    for folder in sorted((shared / "cases" / case).iterdir()):
        place = folder.name.replace("Select_", "Select/")
        shutil.copytree(folder, tmp_path / place, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = Path("Select", select, "particles.star")
    good, bad = good_and_bad(path)
    chosen = read_particles(path)
    assert good == {chosen.image_name(row) for row in range(len(chosen))}
    assert len(good | bad) == 200
    data = {"job004": next(Path().glob("Class?D/*/run_it0[25][05]_data.star")),
            "job006": Path("Select/job004/rank_data.star")}[select]  # fmt: skip
    assert np.array_equal(*(sorted(map(len, x)) for x in ((good, bad), in_classes(data, kept))))

"""Kept shares by class and over the sphere, and good particles lost."""

from __future__ import annotations

import re
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from making import JOB, particles_of, run_to_end, score_project, write_cs, write_project
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.poses import views_of_angles, views_of_poses
from relion_cryofilter.particles.tables import read_particle_file
from relion_cryofilter.relion import job
from relion_cryofilter.results.loss_charts import CLASSES, VIEWS
from relion_cryofilter.results.summaries import classes_of, good_lost
from relion_cryofilter.results.views import views_of


def posed(path, rot, tilt):
    """Write a STAR file of particles with these angles, and read it."""
    rows = "".join(f"{k + 1}@a.mrcs {a:.4f} {b:.4f}\n" for k, (a, b) in enumerate(zip(rot, tilt)))
    labels = "_rlnImageName #1\n_rlnAngleRot #2\n_rlnAngleTilt #3\n"
    path.write_text(f"data_particles\n\nloop_\n{labels}{rows}\n")
    return read_particles(path)


def rows_of_cs(name):
    return len(read_particle_file(Path(name)))


def random_angles(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-180, 180, n), np.rad2deg(np.arccos(rng.uniform(-1, 1, n)))


@pytest.mark.relion
@pytest.mark.parametrize(("rot", "tilt"), [(0, 0), (30, 60), (-120, 40), (75, 130)])
def test_relion_projects_what_is_in_the_viewing_direction_onto_the_middle(tmp_path, rot, tilt):
    (direction,) = views_of_angles([rot], [tilt])
    z, y, x = np.mgrid[:32, :32, :32] - 16
    blob = np.exp(-sum((axis - 9 * part) ** 2 for axis, part in zip((x, y, z), direction)) / 4)
    with mrcfile.new(tmp_path / "map.mrc") as file:
        file.set_data(blob.astype(np.float32))
        file.voxel_size = 3.0
    angles = ["--rot", str(rot), "--tilt", str(tilt), "--psi", "20"]
    done = run_to_end(
        ["relion_project", "--i", "map.mrc", "--o", "p.mrc", "--angpix", "3", *angles], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    projection = np.squeeze(mrcfile.read(tmp_path / "p.mrc"))
    assert np.unravel_index(projection.argmax(), projection.shape) == (16, 16)


def test_a_cone_that_loses_its_particles_is_found_and_said(tmp_path):
    rot, tilt = random_angles(6000)
    centre = views_of_angles([60], [50])[0]
    inside = views_of_angles(rot, tilt) @ centre > np.cos(np.deg2rad(15))
    accepted = np.random.default_rng(1).random(6000) < np.where(inside, 0.3, 0.8)
    views = views_of(views_of_angles(rot, tilt), accepted)
    assert len(views.cones) == 1
    (cone,) = views.cones
    found = views_of_angles([cone.rot_degrees], [cone.tilt_degrees])[0]
    assert np.rad2deg(np.arccos(found @ centre)) < 12
    assert cone.share < 0.5 < 0.7 < cone.others
    assert "may lose them: rot" in views.warning()
    assert views.total.sum() == 6000
    assert views.kept.sum() == accepted.sum()
    VIEWS.of(views).draw(axes := Figure().subplots())
    assert len(axes.lines) == 1


@pytest.mark.parametrize("seed", range(5))
def test_chance_makes_no_warning(tmp_path, seed):
    rot, tilt = random_angles(3000, seed)
    accepted = np.random.default_rng(seed + 99).random(3000) < 0.6
    views = views_of(views_of_angles(rot, tilt), accepted)
    assert views.cones == ()
    assert views.warning() == ""


def test_cells_have_one_area(tmp_path):
    rot, tilt = random_angles(40_000)
    views = views_of(views_of_angles(rot, tilt), np.ones(40_000, bool))
    expected = 40_000 / views.total.size
    assert np.abs(views.total - expected).max() < 6 * np.sqrt(expected)


def test_without_poses_there_are_no_views(tmp_path):
    zeros = np.zeros(5)
    assert views_of(posed(tmp_path / "a.star", zeros, zeros).table.views(), zeros == 0) is None
    (tmp_path / "b.star").write_text("data_\n\nloop_\n_rlnImageName #1\n1@a.mrcs\n\n")
    assert read_particles(tmp_path / "b.star").table.views() is None
    assert views_of(None, np.array([True])) is None


def test_poses_of_cryosparc_are_seen_from_where_relion_sees_them(project):
    """As pyem converts them: RELION's matrix is that of the pose turned back."""
    rng = np.random.default_rng(0)
    poses = np.append(rng.normal(size=(47, 3)), [[0, 0, 0]], axis=0).astype(np.float32)
    fields = particles_of(Path("Extract/job001/particles.star"))
    write_cs(Path("all.cs"), {**fields, "alignments3D/pose": poses})
    matrices = Rotation.from_rotvec(-poses).as_matrix()
    tilt = np.rad2deg(np.arccos(matrices[:, 2, 2]))
    rot = np.rad2deg(np.arctan2(matrices[:, 2, 1], matrices[:, 2, 0]))
    seen = read_particle_file(Path("all.cs")).table.views()
    assert np.allclose(seen, views_of_angles(rot, tilt), atol=1e-5)
    assert np.allclose(seen, views_of_poses(poses))
    score_project("--threshold keep=0.5", source="--in_parts all.cs")
    assert "Acceptance by view" in Path(JOB, "report.html").read_text()


def test_classes_are_counted():
    numbers, accepted = np.array([3, 1, 3, 3, 7]), np.array([True, False, True, False, True])
    classes = classes_of(numbers, accepted)
    assert classes.numbers.tolist() == [1, 3, 7]
    assert classes.total.tolist() == [1, 3, 1]
    assert classes.accepted.tolist() == [0, 2, 1]
    assert classes.table()[2].split() == ["3", "3", "2", "66.7", "%"]
    CLASSES.of(classes).draw(axes := Figure().subplots())
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0, 200 / 3, 100])
    assert classes_of(np.ones(4, int), accepted[:4]) is None


def test_classes_of_a_cs_file_are_in_the_report_and_what_is_found_good_comes_back(project):
    fields = particles_of(Path("Extract/job001/particles.star"))
    write_cs(Path("all.cs"), fields)
    score_project("--threshold keep=0.5", source="--in_parts all.cs")
    assert "Acceptance by class" in Path(JOB, "report.html").read_text()
    words = f"select --in_parts {JOB}particles.cs --add {JOB}particles_rejected.cs --random --o T/"
    assert job.main(words.split()) == 0
    assert rows_of_cs("T/particles_accepted.cs") == rows_of_cs("T/particles_random.cs") == 48


def test_the_good_that_are_lost_are_what_their_scores_say():
    rng = np.random.default_rng(0)
    scores, micrographs = rng.random(20_000), rng.integers(50, size=20_000)
    good = rng.random(20_000) < scores  # calibrated
    accepted = scores >= 0.4
    lost = good_lost(scores, accepted, micrographs)
    assert lost.number.low < (good & ~accepted).sum() < lost.number.high
    assert lost.share.value == pytest.approx((good & ~accepted).sum() / good.sum(), abs=0.01)
    assert str(lost).startswith(f"About {lost.number.value:,.0f} [")
    one = good_lost(scores, accepted, np.zeros(20_000, int))
    assert "[" not in str(one)
    assert one.share.value == pytest.approx(lost.share.value)
    assert good_lost(np.zeros(5), accepted[:5], micrographs[:5]) is None


def test_the_report_tells_what_was_lost_before_the_rest(project):
    star, rng = write_project(Path(), per_micrograph=24), np.random.default_rng(0)
    text = star.read_text().replace(
        "_rlnDefocusAngle #7\n",
        "_rlnDefocusAngle #7\n_rlnClassNumber #8\n_rlnAngleRot #9\n_rlnAngleTilt #10\n",
    )
    rows = [
        f"{line.rstrip()} {rng.integers(1, 4)} {rng.uniform(-180, 180):.3f} "
        f"{rng.uniform(0, 180):.3f} \n" if "@" in line else line
        for line in text.splitlines(keepends=True)
    ]  # fmt: skip
    star.write_text("".join(rows))
    score_project("--threshold keep=0.5")
    titles = re.findall(r"<h2>(.*?)</h2>", Path(JOB, "report.html").read_text())
    assert titles == [
        "Scores", "Averages of rejected particles", "Averages of other particles",
        "Acceptance by class", "Micrographs", "Acceptance by view", "Good particles lost",
        "Classes", "Particles at the job's threshold", "Nearest the cut", "Features",
        "This run",
    ]  # fmt: skip
    # The same of labelled particles.
    words = f"metrics --in_parts {star} --pos_classes 1,2 --weights model.safetensors --j 1 --o M/"
    assert job.main(f"{words} --threshold keep=0.5".split()) == 0
    found = re.findall(r"<h2>(.*?)</h2>", Path("M", "report.html").read_text())
    assert set(titles) - set(found) <= {"Particles at the job's threshold", "Features"}

"""The simulator: reproducible, RELION-readable, and without labels that leak through statistics."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
from making import PATIENCE_S
from sklearn.metrics import roc_auc_score

from relion_cryofilter import simulate
from relion_cryofilter.errors import UsageError
from relion_cryofilter.simulate.micrograph import ctf
from relion_cryofilter.simulate.specimen import deposit

N_MICROGRAPHS, N_PICKS, BOX = 3, 20, 32


def _project(folder: Path, **options: object) -> Path:
    boxes = {"box_px": BOX, "pixel_size_angstrom": 6.0}
    for item in dataclasses.fields(simulate.Boxes):
        if item.name in options:
            boxes[item.name] = options.pop(item.name)
    settings = {
        "n_micrographs": N_MICROGRAPHS,
        "particles_per_micrograph": N_PICKS,
        "boxes": simulate.Boxes(**boxes),
        **options,
    }
    return simulate.simulate_project(folder, **settings)


@pytest.fixture(scope="module", params=["3.1", "5"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    _project(folder, relion_version=request.param)
    return folder


@pytest.fixture(scope="module")
def hard() -> simulate.SimulatedImages:
    """2,000 images at the default signal-to-noise ratio of 0.05."""
    return simulate.simulate_images(0, 2000, molecules=6)


@pytest.fixture(scope="module")
def easy() -> simulate.SimulatedImages:
    return simulate.simulate_images(1, 504, snr=1.0)


def _truth(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "truth.csv").open(newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        _project(tmp_path / name, seed=seed)
    first, second, other = (_digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == other.keys()
    assert first["Extract/job001/particles.star"] != other["Extract/job001/particles.star"]
    assert not any(name.endswith(".part") for name in first)


def test_labels_and_kinds_come_in_the_numbers_asked_for() -> None:
    simulated = simulate.simulate_images(2, 100, 32, junk_fraction=0.3, pixel_size_angstrom=6.0)
    assert simulated.images.shape == (100, 32, 32)
    assert simulated.images.dtype == np.float32
    assert simulated.labels.sum() == 59 + 11  # of micrographs of 84 and 16 images
    assert np.bincount(simulated.micrographs).tolist() == [84, 16]
    assert np.array_equal(simulated.labels == 1, simulated.kinds == "particle")


def test_every_kind_of_junk_occurs(easy: simulate.SimulatedImages) -> None:
    assert set(easy.kinds) == set(simulate.KINDS) - {"other"}
    carbon = set(easy.micrographs[easy.kinds == "carbon"])
    assert carbon == {1, 4}


def test_only_particles_or_only_junk_can_be_asked_for() -> None:
    for fraction, label in ((0.0, 1), (1.0, 0)):
        simulated = simulate.simulate_images(3, 9, 32, junk_fraction=fraction)
        assert np.unique(simulated.labels).tolist() == [label]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("diameter", [30.0, 120.0, 260.0])
def test_a_crowd_of_carbon_picks_finds_room_in_any_field(n: int, diameter: float) -> None:
    rng = np.random.default_rng(n)
    molecule = simulate.random_molecule(rng, diameter)
    image, picks = simulate.simulate_micrograph(rng, molecule, ["carbon"] * n + ["off_centre"] * n)
    assert simulate.extract(image, picks, 64).shape == (2 * n, 64, 64)


def test_the_star_file_and_the_stacks_agree_with_truth_csv(project: Path) -> None:
    tables = starfile.read(project / "Extract/job001/particles.star")
    particles, truth = tables["particles"], _truth(project)
    assert set(particles["rlnImageName"]) == set(truth)
    assert len(particles) == len(truth) == N_MICROGRAPHS * N_PICKS
    assert sum(row["real"] == "1" for row in truth.values()) == N_MICROGRAPHS * N_PICKS // 2
    assert all((row["real"] == "1") == (row["kind"] == "particle") for row in truth.values())
    optics = tables["optics"]
    optics = optics if isinstance(optics, dict) else optics.iloc[0]
    assert optics["rlnImagePixelSize"] == 6.0
    assert optics["rlnImageSize"] == BOX
    for name in set(particles["rlnImageName"].str.split("@").str[1]):
        with mrcfile.open(project / name) as stack:
            assert stack.data.shape == (N_PICKS, BOX, BOX)
            assert stack.header.mode == 2
            assert stack.voxel_size.x == pytest.approx(6.0)
            assert stack.is_image_stack()
        assert mrcfile.validate(project / name)


def test_rows_of_different_stacks_are_interleaved(project: Path) -> None:
    names = starfile.read(project / "Extract/job001/particles.star")["particles"]["rlnImageName"]
    stacks = names.str.split("@").str[1]
    assert (stacks != stacks.shift()).sum() > 2 * N_MICROGRAPHS


def test_star_files_are_laid_out_as_relion_writes_them(project: Path) -> None:
    text = (project / "Extract/job001/particles.star").read_text()
    pipeline = (project / "default_pipeline.star").read_text()
    version = "50001" if "TypeLabel" in pipeline else "30001"
    assert text.startswith(f"\n# version {version}\n\ndata_optics\n\nloop_ \n")
    assert text.endswith(" \n \n")
    assert pipeline.startswith(f"\n# version {version}\n\ndata_pipeline_general\n")


def test_relion_reads_the_particles(tmp_path: Path) -> None:
    program = shutil.which("relion_star_handler")
    if program is None:
        pytest.skip("relion_star_handler is not installed")
    star = _project(tmp_path)
    command = [program, "--i", str(star.relative_to(tmp_path)), "--o", "out.star"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    ours, relions = (starfile.read(path)["particles"] for path in (star, tmp_path / "out.star"))
    assert ours["rlnImageName"].tolist() == relions["rlnImageName"].tolist()
    assert set(ours.columns) == set(relions.columns)
    assert np.allclose(ours["rlnDefocusU"], relions["rlnDefocusU"])


def test_relion_reads_the_stacks_as_normalised_images(tmp_path: Path) -> None:
    program = shutil.which("relion_image_handler")
    if program is None:
        pytest.skip("relion_image_handler is not installed")
    _project(tmp_path)
    stack = "Extract/job001/Micrographs/mic001.mrcs"
    command = [program, "--i", stack, "--stats"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    means = [float(value) for value in re.findall(r"avg= *(\S+)", done.stdout)]
    with mrcfile.open(tmp_path / stack) as file:
        assert means == pytest.approx(file.data.mean((1, 2)).tolist(), abs=1e-4)
    assert done.stdout.count("angpix = 6\n") == N_PICKS


def test_relions_own_normalisation_changes_nothing(tmp_path: Path) -> None:
    program = shutil.which("relion_preprocess")
    if program is None:
        pytest.skip("relion_preprocess is not installed")
    _project(tmp_path)
    stack = "Extract/job001/Micrographs/mic001.mrcs"
    command = [program, "--operate_on", stack, "--operate_out", "out", "--norm"]
    command += ["--bg_radius", str(3 * BOX // 8)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert np.allclose(
        mrcfile.read(tmp_path / "out.mrcs"), mrcfile.read(tmp_path / stack), atol=1e-5
    )


def test_relion_runs_a_job_in_the_project(tmp_path: Path) -> None:
    program = shutil.which("relion_pipeliner")
    if program is None:
        pytest.skip("relion_pipeliner is not installed")
    _project(tmp_path)
    script = tmp_path / "job.sh"
    body = 'while [ "$1" != --o ]; do shift; done; touch "$2/RELION_JOB_EXIT_SUCCESS"'
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    (tmp_path / "job.star").write_text(
        "data_job\n\n_rlnJobType 99\n_rlnJobIsContinue 0\n\ndata_joboptions_values\n\nloop_\n"
        "_rlnJobOptionVariable #1\n_rlnJobOptionValue #2\n"
        f"fn_exe {script}\nin_part Extract/job001/particles.star\n"
    )
    for arguments in (
        ["--addJobFromStar", "job.star"],
        ["--RunJobs", "External/job002/", "--sec_wait_after", "1"],
    ):
        command = [program, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=PATIENCE_S)
    assert (tmp_path / "External/job002/RELION_JOB_EXIT_SUCCESS").exists()
    pipeline = starfile.read(tmp_path / "default_pipeline.star")
    assert "External/job002/" in set(pipeline["pipeline_processes"]["rlnPipeLineProcessName"])
    edges = (tmp_path / "default_pipeline.star").read_text().split("data_pipeline_input_edges")[1]
    assert "Extract/job001/particles.star External/job002/" in edges


def test_backgrounds_have_mean_0_and_standard_deviation_1(easy: simulate.SimulatedImages) -> None:
    v, u = np.indices((64, 64)) - 32
    background = easy.images[:, np.hypot(u, v) > 24]
    assert np.abs(background.mean(1)).max() < 1e-5
    assert np.abs(background.std(1) - 1).max() < 1e-5


def test_extraction_removes_a_ramp_and_centres_the_pick() -> None:
    rng = np.random.default_rng(0)
    row, column = np.indices((80, 100))
    image = rng.normal(size=(80, 100)) + 0.3 * row - 0.2 * column
    image[40, 60] -= 100
    picks = simulate.Picks(np.array([60.4]), np.array([39.6]), np.array(["particle"]))
    box = simulate.extract(image, picks, 32)[0]
    assert np.unravel_index(box.argmax(), box.shape) == (16, 16)
    assert abs(np.polyfit(np.arange(32), box.mean(0), 1)[0]) < 0.02


def test_a_box_that_leaves_the_micrograph_is_an_error() -> None:
    picks = simulate.Picks(np.array([8.0]), np.array([40.0]), np.array(["particle"]))
    with pytest.raises(IndexError, match="leaves the micrograph"):
        simulate.extract(np.zeros((80, 80)), picks, 32)


def test_protein_is_white_in_boxes_and_dark_in_micrographs() -> None:
    rng = np.random.default_rng(1)
    molecule = simulate.random_molecule(rng, 115.0)
    image, picks = simulate.simulate_micrograph(rng, molecule, ["particle"] * 60, snr=0.3)
    mean = simulate.extract(image, picks, 64).mean(0)
    v, u = np.indices((64, 64)) - 32
    assert mean[np.hypot(u, v) < 12].mean() > 0.1 + mean[np.hypot(u, v) > 24].mean()
    dark = simulate.extract(image, picks, 64, invert=False).mean(0)
    assert np.allclose(dark, -mean, atol=1e-5)


def test_the_signal_to_noise_ratio_is_what_was_asked_for() -> None:
    molecule = simulate.random_molecule(np.random.default_rng(2), 115.0)

    def variance(snr: float) -> float:  # inside the particles' masks, same noise each time
        rng = np.random.default_rng(3)
        image, picks = simulate.simulate_micrograph(rng, molecule, ["particle"] * 84, snr=snr)
        v, u = np.indices((41, 41)) - 20
        inside = np.hypot(u, v) <= 115 / 3 / 2
        boxes = [
            image[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21][inside]
            for x, y in zip(picks.x, picks.y, strict=True)
        ]
        return float(np.var(boxes, axis=1).mean())

    noise = variance(1e-9)
    assert noise == pytest.approx(1, abs=0.1)
    assert (variance(4.0) - noise) / 4 == pytest.approx(1, abs=0.1)


def test_the_ctf_has_its_zeros_where_the_formula_puts_them() -> None:
    # Without Cs, astigmatism and amplitude contrast: zeros at u = sqrt(k / (L dz)); 300 kV has
    # L = 0.01969 Å (relativistic; any electron microscopy textbook's table).
    parameters = simulate.CtfParameters(cs_mm=0, amplitude_contrast=0, b_factor=0)
    curve = ctf((2, 4096), 1.0, parameters)[0, :700]
    u = np.fft.rfftfreq(4096, 1.0)[:700]
    zeros = u[1:][np.diff(np.sign(curve)) != 0]
    assert zeros[1:6] == pytest.approx(np.sqrt(np.arange(1, 6) / (0.01969 * 15000)), rel=0.01)
    assert curve[1] > 0


def test_astigmatism_puts_defocus_u_along_its_angle() -> None:
    parameters = simulate.CtfParameters(20000, 10000, 90, cs_mm=0, b_factor=0)
    along_v = ctf((256, 256), 3.0, parameters)[1:100, 0]
    expected = simulate.CtfParameters(20000, 20000, 0, cs_mm=0, b_factor=0)
    assert np.allclose(along_v, ctf((256, 256), 3.0, expected)[1:100, 0])


@pytest.mark.parametrize("symmetry", ["C1", "C4", "D2", "D7"])
def test_molecules_are_centred_as_large_as_asked_and_symmetric(symmetry: str) -> None:
    molecule = simulate.random_molecule(np.random.default_rng(4), 150.0, symmetry=symmetry)
    assert molecule.diameter_angstrom == pytest.approx(150.0)
    assert np.allclose(molecule.atoms.mean(0), 0, atol=1e-9)
    if symmetry != "C1":
        angle = 2 * np.pi / int(symmetry[1:])
        x, y, z = molecule.atoms.T
        turned = np.stack(
            [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle), z], 1
        )
        apart = np.linalg.norm(turned[:50, None] - molecule.atoms[None], axis=2).min(1)
        assert apart.max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["mean", "std", "corner std", "min", "max"])
@pytest.mark.parametrize("kind", ["empty", "off_centre", "broken"])
def test_no_simple_statistic_tells_particles_from_junk(
    hard: simulate.SimulatedImages, kind: str, statistic: str
) -> None:
    v, u = np.indices((64, 64)) - 32
    values = {
        "mean": lambda x: x.mean((1, 2)),
        "std": lambda x: x.std((1, 2)),
        "corner std": lambda x: x[:, np.hypot(u, v) > 32].std(1),
        "min": lambda x: x.min((1, 2)),
        "max": lambda x: x.max((1, 2)),
    }[statistic](hard.images)
    chosen = np.isin(hard.kinds, ["particle", kind])
    assert 0.35 < roc_auc_score(hard.labels[chosen], values[chosen]) < 0.65


def test_labels_can_be_learnt_from_the_mean_particle_of_other_micrographs() -> None:
    one = simulate.simulate_images(5, 1008, snr=0.2, molecules=1)
    train = one.micrographs < 6
    template = one.images[train & (one.labels == 1)].mean(0)
    score = (one.images * (template - template.mean())).sum((1, 2))
    test = ~train & np.isin(one.kinds, ["particle", "empty", "off_centre"])
    assert roc_auc_score(one.labels[test], score[test]) > 0.8


def test_a_folder_that_holds_a_project_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "default_pipeline.star").write_text("mine")
    with pytest.raises(UsageError, match="holds a RELION project already"):
        _project(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["default_pipeline.star"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_px": 63}, "expected an even number"),
        ({"snr": 0.0}, "expected more than 0"),
        ({"junk_fraction": 1.5}, "expected 0 to 1"),
        ({"n_micrographs": 0}, "expected 1 or more"),
        ({"relion_version": "2"}, "choose one of 3.1, 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _project(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_symmetry_that_is_not_cyclic_or_dihedral_is_refused() -> None:
    with pytest.raises(UsageError, match="expected Cn or Dn"):
        simulate.random_molecule(np.random.default_rng(0), 100.0, symmetry="T")


def test_picks_know_the_rotation_of_the_molecule_that_is_seen() -> None:
    molecule = simulate.random_molecule(np.random.default_rng(5), 100.0, symmetry="C1")
    optics = simulate.CtfParameters(5000, 5000)
    image, picks = simulate.simulate_micrograph(
        np.random.default_rng(6), molecule, ["particle"] * 4, optics, 64, 3.0, snr=50.0
    )
    found = simulate.extract(image, picks, 64)
    middle, filtered = np.array([32.0, 32.0]), ctf((64, 64), 3.0, optics)
    for number, rotation in enumerate(picks.rotation):
        likeness = []
        for turned in (rotation, rotation.T):
            seen = deposit([(middle, molecule.atoms @ turned.T, molecule.weights)], 64, 3.0)
            expected = np.fft.irfft2(np.fft.rfft2(seen) * filtered, (64, 64))
            both = [np.fft.fft2(part - part.mean()) for part in (expected, found[number])]
            peak = np.fft.ifft2(both[0] * both[1].conj()).real.max()  # picks are a little off
            likeness.append(peak / np.prod([np.linalg.norm(part) for part in both]) * 64**2)
        assert likeness[0] > 0.7 > likeness[1]

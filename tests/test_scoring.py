"""Scores belong to their rows, whatever the order, batch size, threads and bad neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import making
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relion_cryofilter.errors import Aborted, ImageError
from relion_cryofilter.nn.model import BUNDLED_MODEL, load_model
from relion_cryofilter.nn.networks import choose_devices
from relion_cryofilter.nn.scoring import How, score_particles
from relion_cryofilter.particles.particles import particles_of_stacks, read_particles
from relion_cryofilter.particles.stacks import read_header
from relion_cryofilter.progress import Progress


def run(path, model, **options):
    particles = read_particles(path)
    kept = {name: options.pop(name) for name in ("features_path", "sample") if name in options}
    progress = Progress(len(particles), "particles")
    return score_particles(particles, [model], progress, How(**options), **kept)


def one_by_one(path, model, tta=False):
    """Score each image alone, read without our reader."""
    particles = read_particles(path)
    values = []
    for stack, index in zip(particles.stack_of, particles.index):
        header = read_header(particles.stacks[stack])
        image = np.fromfile(header.path, "<f4", offset=1024).reshape(-1, header.ny, header.nx)
        small = model.preprocess(torch.from_numpy(image[index][None]))
        values.append(float(model.probabilities(small, tta)[0]))
    return np.array(values)


@pytest.mark.parametrize("tta", [False, True])
def test_scores_equal_those_of_each_image_alone(tmp_path, monkeypatch, tta):
    monkeypatch.chdir(tmp_path)
    path = making.write_project(tmp_path, boxes=(32, 48))
    model = making.tiny_model()
    expected = one_by_one(path, model, tta)
    assert expected.std() > 0.01
    assert np.allclose(run(path, model, tta=tta, threads=2).values, expected, atol=1e-5)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch_size=st.integers(1, 60), threads=st.integers(1, 4))
def test_scores_do_not_depend_on_batch_size_and_threads(project, batch_size, threads):
    path, model = project / "Extract/job001/particles.star", making.tiny_model()
    first = run(path, model).values
    again = run(path, model, batch_size=batch_size, threads=threads).values
    assert np.array_equal(again, first), "to the last bit"


def test_scores_follow_the_order_of_the_rows(project):
    path, model = project / "Extract/job001/particles.star", making.tiny_model()
    lines = path.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "@" in line)
    n = sum("@" in line for line in lines)
    order = np.random.default_rng(0).permutation(n)
    shuffled = lines[:first] + [lines[first + i] for i in order] + lines[first + n :]
    (project / "shuffled.star").write_text("".join(shuffled))
    assert np.allclose(
        run(project / "shuffled.star", model).values, run(path, model).values[order], atol=1e-6
    )


def test_features_are_one_row_a_particle_in_input_order(project):
    path, model = project / "Extract/job001/particles.star", making.tiny_model()
    run(path, model, features_path=project / "f.npy", threads=2, batch_size=5)
    features = np.load(project / "f.npy")
    particles = read_particles(path)
    logits = features @ model.network.head.weight.detach().numpy()[0]
    logits += model.network.head.bias.item()
    assert features.shape == (len(particles), model.network.feature_count)
    assert np.allclose(1 / (1 + np.exp(-logits)), run(path, model).values, atol=1e-5)


def spoil(project):
    """Make one image NaN, one constant, one infinite; return their image names."""
    stack = project / "Extract/job001/Mics/mic1.mrcs"
    data = np.fromfile(stack, "<f4", offset=1024).reshape(-1, 32, 32)
    data[2, 5, 5], data[3], data[4, 0, 0] = np.nan, 7.0, np.inf
    stack.write_bytes(stack.read_bytes()[:1024] + data.tobytes())
    return [f"{i:06d}@Extract/job001/Mics/mic1.mrcs" for i in (3, 4, 5)]


def test_nan_and_blank_images_fail_the_job_with_their_names(project):
    names = spoil(project)
    with pytest.raises(ImageError) as caught:
        run(project / "Extract/job001/particles.star", making.tiny_model())
    assert "3 of 48 images can't be used: 2 with NaN or infinite values; 1 blank" in str(
        caught.value
    )
    assert all(name in str(caught.value) for name in names)


def test_skip_bad_scores_them_zero_and_leaves_the_others_alone(project):
    path, model = project / "Extract/job001/particles.star", making.tiny_model()
    before = run(path, model).values
    names = spoil(project)
    scores = run(path, model, skip_bad=True, features_path=project / "f.npy")
    particles = read_particles(path)
    assert [particles.image_name(row) for row in scores.bad.rows] == sorted(
        names, key=[particles.image_name(row) for row in range(48)].index
    )
    good = np.setdiff1d(np.arange(48), scores.bad.rows)
    assert np.all(scores.values[scores.bad.rows] == 0)
    assert np.allclose(scores.values[good], before[good], atol=1e-6)
    assert np.isnan(np.load(project / "f.npy")[scores.bad.rows]).all()


def test_a_missing_stack_fails_before_anything_is_read(project, monkeypatch):
    (project / "Extract/job001/Mics/mic2.mrcs").unlink()
    monkeypatch.setattr("relion_cryofilter.images.batches.StackReader", None)
    with pytest.raises(
        ImageError, match="12 of 48 images can't be used: 12 in stacks that can't be read"
    ):
        run(project / "Extract/job001/particles.star", making.tiny_model())


def test_an_abort_stops_within_a_few_batches(project):
    particles = read_particles(project / "Extract/job001/particles.star")
    asked = iter([False, True])
    progress = Progress(48, "particles", lambda: next(asked))
    with pytest.raises(Aborted, match="Stopped on request after 4 of 48 particles"):
        score_particles(particles, [making.tiny_model()], progress, How(batch_size=2))
    assert progress.done == 4


def test_torchs_own_thread_count_comes_back(project):
    before = torch.get_num_threads()
    run(project / "Extract/job001/particles.star", making.tiny_model(), threads=2)
    assert torch.get_num_threads() == before


def test_asking_for_a_gpu_that_is_not_there_warns_and_uses_the_processor(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    assert choose_devices([0]) == [torch.device("cpu")]
    assert "no CUDA GPU" in caplog.text


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_bfloat16_moves_scores_by_a_hundredth_at_most_or_little_more(tmp_path, monkeypatch, offset):
    """Also of images whose mean is far from 0, where bfloat16 alone would see nothing."""
    monkeypatch.chdir(tmp_path)
    images = making.blobs(300, 64) + np.float32(offset)
    images[7] = offset
    making.write_stack(tmp_path / "a.mrcs", images)
    model = load_model(BUNDLED_MODEL)
    particles = particles_of_stacks([Path("a.mrcs")])
    found = [
        score_particles(
            particles,
            [replace(model, precision=dtype)],
            Progress(300, "particles"),
            How(skip_bad=True),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert found[0].values.std() > 0.1
    assert np.abs(found[1].values - found[0].values).max() < 0.015
    assert [one.bad.rows.tolist() for one in found] == [[7], [7]]


def test_bfloat16_scores_do_not_depend_on_the_batch(project):
    path = project / "Extract/job001/particles.star"
    model = replace(making.tiny_model(), precision=torch.bfloat16)
    first = run(path, model).values
    assert np.array_equal(run(path, model, batch_size=5, threads=2).values, first)


def test_a_sample_of_the_features_is_kept_whatever_the_order_of_the_disk(project):
    star, model, path = Path("Extract/job001/particles.star"), making.tiny_model(), Path("f.npy")
    scores = run(star, model, sample=20, features_path=path, batch_size=5, threads=2)
    assert len(set(scores.sampled.tolist())) == len(scores.features) == 20
    assert np.array_equal(scores.features, np.load(path)[scores.sampled])
    assert run(star, model, sample=1000).sampled.tolist() == list(range(48))
    assert not run(star, model).features.size


def test_the_share_of_known_junk_that_would_pass_is_said_and_counts_nowhere_else(project, capsys):
    junk = making.half_star(project, "junk.star", lambda line: "000003@" in line)
    making.score_project(f"--threshold keep=0.5 --junk {junk}")
    said = next(line for line in capsys.readouterr().out.splitlines() if "known junk" in line)
    scores = np.loadtxt(f"{making.JOB}/scores.csv", delimiter=",")[:, 1]
    particles = read_particles(Path("Extract/job001/particles.star"))
    names = [particles.image_name(row) for row in range(len(particles))]
    rows = [row for row, name in enumerate(names) if name.lstrip("0").startswith("3@")]
    threshold = float(said.split("Threshold ")[1].split()[0])
    passing = (scores[rows] >= threshold).mean()
    assert f"of {len(rows)} known junk particles a share of {passing:.3f} [" in said
    assert len(scores) == len(particles)
    with pytest.raises(AssertionError):
        making.score_project("--junk missing.star")

"""Averages of what was thrown away: what they show is there, and what is not there they don't."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import JOB, score_project, write_project, write_stack
from matplotlib.figure import Figure
from scipy.ndimage import rotate

from relion_cryofilter.images.alignment import NO_SIGNAL, average_of
from relion_cryofilter.nn.model import read_models
from relion_cryofilter.particles.particles import particles_of_stacks
from relion_cryofilter.results.averages import averages_of
from relion_cryofilter.results.loss_charts import average_chart
from relion_cryofilter.simulate import simulate_images
from relion_cryofilter.thresholds import Chosen

SHIFTS = range(-2, 3)


def standardised(images):
    images = images - images.mean(axis=(1, 2), keepdims=True)
    return (images / images.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def object_of(d=48):
    """Return three blobs (d, d) without any symmetry."""
    y, x = np.mgrid[:d, :d] - (d - 1) / 2
    places = ((-7, 0, 3.0), (6, 5, 2.0), (2, -9, 2.0))
    return sum(np.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * s**2)) for a, b, s in places)


def test_turned_mirrored_and_shifted_copies_in_noise_become_what_they_are_copies_of():
    rng, copies = np.random.default_rng(0), []
    for _ in range(120):
        copy = rotate(object_of(), rng.uniform(0, 360), reshape=False)[:, :: rng.choice([1, -1])]
        copies.append(np.roll(copy, rng.integers(-2, 3, 2), (0, 1)) + rng.normal(size=(48, 48)))
    average = average_of(standardised(np.array(copies)))
    assert average.has_signal
    found = max(
        np.corrcoef(rotate(view, angle, reshape=False).ravel(), shifted.ravel())[0, 1]
        for view in (average.image, average.image[:, ::-1])
        for angle in range(0, 360, 10)
        for shifted in (
            np.roll(object_of(), (a, b), (0, 1)) for a in (-1, 0, 1) for b in (-1, 0, 1)
        )
    )
    assert found > 0.85


@pytest.mark.parametrize("n", [20, 60, 200])
def test_noise_has_no_common_signal(n):
    noise = np.random.default_rng(n).normal(size=(n, 48, 48))
    average = average_of(standardised(noise))
    assert not average.has_signal
    assert average.agreement < NO_SIGNAL


def test_a_handful_of_images_is_too_few_to_tell():
    average = average_of(standardised(np.random.default_rng(0).normal(size=(5, 48, 48))))
    assert np.isnan(average.agreement)
    assert not average.has_signal


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Simulated images, of which a filter that is too strict keeps few, by the bundled model."""
    folder = tmp_path_factory.mktemp("lost")
    made = simulate_images(3, 500, 64, 0.1, molecules=1)
    write_stack(folder / "a.mrcs", made.images, pixel_size=3.0)
    particles, (model,) = particles_of_stacks([folder / "a.mrcs"]), read_models().members
    import torch

    with torch.inference_mode():
        values = model.probabilities(model.preprocess(torch.from_numpy(made.images))).numpy()
    values = np.round(values.astype(float), 6)
    threshold = float(np.quantile(values, 0.8))
    chosen = Chosen(values, values >= threshold, threshold, "as asked")
    return made, chosen, averages_of(particles, model, chosen, np.arange(500), 1)


def test_clusters_of_lost_particles_come_first_and_are_recognisable(lost):
    made, chosen, (rejected, *_) = lost
    real = made.labels == 1
    assert rejected.group == "rejected"
    assert rejected.n == rejected.looked_at == (~chosen.accepted).sum()
    members = np.concatenate([cluster.rows for cluster in rejected.clusters])
    assert sorted(members) == np.flatnonzero(~chosen.accepted).tolist()
    first = rejected.clusters[0]
    assert first.average.has_signal
    share = real[~chosen.accepted].mean()
    assert real[first.rows].mean() > max(0.6, 1.5 * share)
    signal = [cluster.average.has_signal for cluster in rejected.clusters]
    assert signal == sorted(signal, reverse=True)
    assert sum(cluster.share for cluster in rejected.clusters) == pytest.approx(1)


def test_the_same_particles_give_the_same_averages_whoever_scored_them(lost, tmp_path):
    made, chosen, before = lost
    write_stack(tmp_path / "a.mrcs", made.images, pixel_size=3.0)
    particles = particles_of_stacks([tmp_path / "a.mrcs"])
    again = averages_of(particles, read_models().members[0], chosen, np.arange(500), 2)
    for one, other in zip(before, again):
        assert [c.rows.tolist() for c in one.clusters] == [c.rows.tolist() for c in other.clusters]
        for a, b in zip(one.clusters, other.clusters):
            assert np.allclose(a.average.image, b.average.image, atol=1e-5)


def test_a_picture_without_common_signal_is_grey_and_says_so(lost):
    _, _, groups = lost
    for averages in groups:
        average_chart(averages).draw(axes := Figure().subplots())
        assert len(axes.images) == len(axes.texts) == len(averages.clusters)
        for cluster, image, text in zip(averages.clusters, axes.images, axes.texts):
            faint = image.get_alpha() < 1
            assert faint == ("no common signal" in text.get_text() or "too few" in text.get_text())
            assert faint != cluster.average.has_signal
            assert text.get_text().startswith(f"{len(cluster.rows):,} (")


def test_few_particles_make_no_averages():
    chosen = Chosen(np.linspace(0, 1, 58), np.arange(58) > 28, 0.5, "")
    assert averages_of(None, None, chosen, np.arange(58), 1) == []


@pytest.mark.slow
def test_continue_shows_the_same_averages(project):
    write_project(Path(), per_micrograph=24)
    pages = []
    for _ in range(2):
        score_project("--threshold keep=0.5")
        text = Path(JOB, "report.html").read_text()
        start = text.index("<h2>Averages of rejected particles</h2>")
        pages.append(text[start : text.index("</section>", start)])
    assert pages[0] == pages[1]

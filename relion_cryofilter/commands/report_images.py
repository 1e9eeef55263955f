"""The few dozen images that a report shows: which ones, and reading them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from relion_cryofilter.data.bad_images import check_stacks
from relion_cryofilter.data.particles import ParticleSet
from relion_cryofilter.nn.pipeline import map_batches
from relion_cryofilter.results.report_data import Gallery, Pictures
from relion_cryofilter.results.thumbnails import LOW_PASS_ANGSTROM, THUMBNAIL_PX, thumbnails

A_GALLERY = 24
SPREAD = 160
"""Pictures at even ranks, from which the slider takes those nearest a cut."""
SHOW_ALL = 250


def galleries_of_scores(
    values: np.ndarray, accepted: np.ndarray, usable: np.ndarray
) -> dict[str, np.ndarray]:
    """Choose rows: the best, the worst, and those nearest the threshold on either side.

    Parameters
    ----------
    values, accepted
        (n,) scores and whether they reach the threshold.
    usable
        Rows whose images can be read.
    """
    order = usable[np.argsort(-values[usable], kind="stable")]
    kept = int(accepted[order].sum())
    return {
        "Best scores": order[:A_GALLERY],
        "Worst scores": order[::-1][:A_GALLERY],
        "Accepted, nearest the threshold": order[max(0, kept - A_GALLERY) : kept][::-1],
        "Rejected, nearest the threshold": order[kept : kept + A_GALLERY],
    }


def galleries_of_errors(
    values: np.ndarray, accepted: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Choose rows: accepted although labelled bad, and rejected although good; worst first."""
    order = np.argsort(-values, kind="stable")
    false_positive = order[(accepted & ~labels)[order]]
    false_negative = order[(~accepted & labels)[order]][::-1]
    return {
        "False positives: labelled bad, accepted (highest scores)": false_positive[:A_GALLERY],
        "False negatives: labelled good, rejected (lowest scores)": false_negative[:A_GALLERY],
    }


def pictures_of(
    particles: ParticleSet,
    values: np.ndarray,
    usable: np.ndarray,
    chosen: Mapping[str, np.ndarray],
    threads: int,
    kinds: Sequence[str] = (),
) -> tuple[Pictures, list[Gallery]]:
    """Read the chosen images, and more at even ranks for the slider.

    Parameters
    ----------
    particles, values
        n particles and their scores.
    usable
        Rows whose images can be read.
    chosen
        Rows by title of their gallery.
    threads
        Worker threads.
    kinds
        (n,) what is said of each particle besides its name and score; nothing if empty.
    """
    order = usable[np.argsort(-values[usable], kind="stable")]
    ranks = np.linspace(0, len(order) - 1, SPREAD).astype(int) if len(order) > SHOW_ALL else ...
    rows = np.unique(np.concatenate([order[ranks], *chosen.values()]).astype(np.int64))
    rows = rows[np.argsort(-values[rows], kind="stable")]
    names = [
        f"{particles.image_name(row)}\nscore {values[row]:.6f}{kinds[row] if kinds else ''}\n"
        f"{particles.micrographs[particles.micrograph_of[row]]}"
        for row in rows.tolist()
    ]
    about = _about(particles, rows)
    pictures = Pictures(_read(particles, rows, threads), values[rows], names, about)
    place = {row: number for number, row in enumerate(rows.tolist())}
    galleries = [
        Gallery(title, tuple(place[row] for row in members.tolist()))
        for title, members in chosen.items()
    ]
    return pictures, galleries


def _about(particles: ParticleSet, rows: np.ndarray) -> str:
    groups = [particles.optics[number] for number in np.unique(particles.optics_of[rows])]
    known = all(group.pixel_size_angstrom for group in groups)
    filtered = f"to {LOW_PASS_ANGSTROM:g} Å" if known else "(pixel size unknown)"
    return f"Low-passed {filtered}, equal contrast; the score is under each."


def _read(particles: ParticleSet, rows: np.ndarray, threads: int) -> np.ndarray:
    """Return the pictures (m, 64, 64) uint8 of `rows`; each optics group has its pixel size."""
    sample = particles.take(rows)
    headers, bad = check_stacks(sample)
    bad.refuse("the images were there when they were scored")
    pictures = np.zeros((len(rows), THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    for number in np.unique(sample.optics_of):
        size = sample.optics[number].pixel_size_angstrom

        def shrink(images: torch.Tensor, size: float | None = size) -> np.ndarray:
            return thumbnails(images.float().numpy(), size)

        members = np.flatnonzero(sample.optics_of == number)
        for places, made in map_batches(
            shrink, sample, members, headers, threads=threads, batch_size=16
        ):
            pictures[places] = made
    return pictures

"""The table and the plot, from the maps and the truth."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from picks import JUNK, MOLECULE, SIZE, SNR, Truth
from refine import START_ANGSTROM, Map, resolution

import relion_cryofilter
from relion_cryofilter.nn.model import BUNDLED_MODEL, load_model
from relion_cryofilter.results.views import spread_directions

CONES, CONE_DEGREES, FEWEST = 60, 30, 30


def recall_by_view(kept: np.ndarray, truth: Truth) -> np.ndarray:
    """Return recall (m,) in cones over the sphere that hold enough true particles."""
    axes = spread_directions(CONES)
    seen = truth.rotations[truth.good, 2] @ axes.T > np.cos(np.deg2rad(CONE_DEGREES))
    enough = seen.sum(axis=0) >= FEWEST
    return np.asarray(
        (seen & kept[truth.good, None]).sum(axis=0)[enough] / seen.sum(axis=0)[enough]
    )


def report(arms: dict[str, np.ndarray], maps: dict[str, list[Map]], truth: Truth) -> str:
    """Return the results file."""
    good = truth.good
    versions = (
        f"relion_cryofilter {relion_cryofilter.__version__} (bundled model "
        f"{load_model(BUNDLED_MODEL).hash}), RELION 3.1.3, "
        f"torch {torch.__version__.partition('+')[0]}, {platform.machine()}, processor only"
    )
    about = (
        f"{len(good):,} simulated picks of {MOLECULE}, which no pre-training has seen, at "
        f"{truth.pixel_size:.2f} Å/px and an SNR of {SNR:g} within the particle's circle "
        f"({SNR * np.pi / 4 * SIZE**2:.3f} of the box), in two preferred views and many others; "
        f"{100 * JUNK:.0f} % are junk of all kinds. All picks are aligned to the "
        f"true map low-passed to {START_ANGSTROM} Å, over all orientations; from there every arm "
        "is refined by itself, with the same settings, local searches and half sets. Resolutions, "
        "Å, are where the Fourier shell correlation of half maps falls below 0.143 and that with "
        "the true map below 0.5, within a soft sphere. 2D classes are kept by the truth (those "
        "that hold more "
        "particles than junk), as nobody can; the model is trained on that selection and asked for "
        "the default recall. The error is the median angle between the found and the true "
        f"orientation of true particles. By view is recall in cones of {CONE_DEGREES} degrees."
    )
    lines = [
        "# From picks to a map", "",
        f"{datetime.date.today()}, {versions}. `python benchmarks/reconstruction`.", "", about, "",
        "| picks | number | precision | recall | least and mean by view | resolution, half maps | "
        "with the truth | error |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, kept in arms.items():
        views = recall_by_view(kept, truth)
        made = maps[name]
        lines.append(
            f"| {name} | {kept.sum():,} | {good[kept].mean():.3f} | {kept[good].mean():.3f} | "
            f"{views.min():.2f}, {views.mean():.2f} | {_cell(made, truth, 'halves', 0.143)} | "
            f"{_cell(made, truth, 'true', 0.5)} | "
            f"{', '.join(f'{each.error:.1f}°' for each in made) or '–'} |"
        )
    text = "\n".join(lines) + "\n\n![Fourier shell correlations](reconstruction.png)\n"
    kinds = [kind for kind in np.unique(truth.kinds) if kind != "particle"]
    text += "\nAccepted of each kind of junk:\n\n| picks | " + " | ".join(kinds) + " |\n"
    text += "|---" * (1 + len(kinds)) + "|\n"
    for name, kept in arms.items():
        cells = [f"{kept[truth.kinds == kind].mean():.0%}" for kind in kinds]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def _cell(made: list[Map], truth: Truth, curve: str, limit: float) -> str:
    found = [resolution(getattr(each, curve), limit, truth.pixel_size) for each in made]
    return ", ".join(f"{value:.1f}" for value in found) or "–"


def plot(maps: dict[str, list[Map]], truth: Truth, path: Path) -> None:
    """Draw the correlations of each arm, of its first seed, over the spatial frequency."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, curve, limit, title in zip(
        figure.subplots(1, 2, sharey=True), ("halves", "true"), (0.143, 0.5),
        ("Half maps", "With the true map"),
    ):  # fmt: skip
        for number, (name, made) in enumerate(maps.items()):
            if made:
                values = getattr(made[0], curve)
                frequency = np.arange(len(values)) / (2 * (len(values) - 1) * truth.pixel_size)
                style = ":" if name.startswith("random") else "-"
                axes.plot(frequency, values, style, color=f"C{number}", label=name)
        axes.axhline(limit, color="0.6", linewidth=0.8)
        axes.set(title=title, xlabel="spatial frequency, 1/Å", ylim=(-0.1, 1.05))
    figure.axes[0].set_ylabel("Fourier shell correlation")
    figure.axes[1].legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)

"""The recipes: what each mode does, from the input to the results, top to bottom."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relion_cryofilter.data.particles import ParticleSet, particles_of_stacks, read_particles
from relion_cryofilter.data.star import SCORE_LABEL, write_scored
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import write_text
from relion_cryofilter.nn.checkpoint import Model, load_model
from relion_cryofilter.nn.devices import choose_devices
from relion_cryofilter.nn.scoring import Scores, score_particles
from relion_cryofilter.options import ConvertOptions, DemoOptions, ScoreOptions, gpu_numbers
from relion_cryofilter.progress import Progress, duration

log = logging.getLogger("relion_cryofilter")

BUNDLED_MODEL = Path(__file__).parent / "models" / "default.safetensors"
ALL, ACCEPTED, REJECTED = "particles.star", "particles_accepted.star", "particles_rejected.star"
SCORES_CSV, FEATURES, BAD_IMAGES = "scores.csv", "features.npy", "bad_images.csv"


@dataclass(frozen=True)
class Output:
    """A result that the next RELION job can use.

    Attributes
    ----------
    file_name
        Its name in the job's folder.
    kind
        ``particles`` or ``log``.
    """

    file_name: str
    kind: str


def score(
    options: ScoreOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Score particles; write the STAR file with scores, its accepted and rejected subsets.

    Raises
    ------
    CryoFilterError
        Something is wrong with the input; nothing was written.
    Aborted
        `abort_requested` said True; nothing was written.
    """
    folder, csv_path = _score_places(options)
    particles = _read_input(options)
    model = _read_model(options)
    threshold = model.threshold if options.threshold is None else options.threshold
    devices = choose_devices(gpu_numbers(options.gpu) if options.gpu else [])
    _announce(particles, model, threshold, options)
    scores = score_particles(
        particles, model, Progress(len(particles), "particles scored", abort_requested),
        threads=options.threads, devices=devices, batch_size=options.batch_size,
        tta=options.tta, skip_bad=options.skip_bad,
        features_path=csv_path.parent / FEATURES if options.features else None,
    )  # fmt: skip
    values = np.round(scores.values, 6)
    _write_scores_csv(csv_path, values)
    _write_bad_images(csv_path.parent / BAD_IMAGES, scores)
    outputs: tuple[Output, ...] = ()
    if folder is not None and particles.star is not None:
        outputs = _write_subsets(folder, particles, values, values >= threshold, options)
    _conclude(scores, values >= threshold, threshold, csv_path.parent)
    return outputs


def _score_places(options: ScoreOptions) -> tuple[Path | None, Path]:
    """Return the results' folder and the path of scores.csv."""
    if (options.in_parts is None) == (not options.mrc):
        raise UsageError("Give either --in_parts particles.star or --mrc a.mrcs b.mrcs.")
    if options.o is None and options.out_file is None:
        raise UsageError("Say where the results go: --o FOLDER/, or --out_file scores.csv.")
    folder = options.o
    csv_path = options.out_file or Path(folder or "") / SCORES_CSV
    for place in (folder, csv_path.parent):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
    names = (ALL, ACCEPTED, REJECTED) if folder else ()
    results = {os.path.realpath(csv_path)}
    results |= {os.path.realpath(Path(folder or "") / name) for name in names}
    for source in (options.in_parts, options.weights, *options.mrc):
        if source is not None and os.path.realpath(source) in results:
            raise UsageError(
                f"The results would overwrite the input {source}. Choose another folder for --o."
            )
    return folder, csv_path


def _read_input(options: ScoreOptions) -> ParticleSet:
    if options.in_parts is None:
        return particles_of_stacks(options.mrc)
    if options.in_parts.suffix in (".mrcs", ".mrc"):
        raise UsageError(f"{options.in_parts} is an image stack. Give it as --mrc, not --in_parts.")
    particles = read_particles(options.in_parts)
    label = options.score_label.removeprefix("_")
    assert particles.loop is not None
    if not label.isidentifier():
        raise UsageError(f"--score_label is {label!r}; expected a label like {SCORE_LABEL}.")
    if label in particles.loop.labels and label.startswith("rln") and label != SCORE_LABEL:
        raise UsageError(
            f"--score_label {label} would overwrite RELION's column of that name in "
            f"{options.in_parts}. Choose {SCORE_LABEL} or a name of your own."
        )
    return particles


def _read_model(options: ScoreOptions) -> Model:
    model = load_model(options.weights or BUNDLED_MODEL)
    network = model.network
    checks = {"model": network.name, "img_dim": network.dim, "f": network.kwargs.get("f")}
    for name, found in checks.items():
        asked = getattr(options, name)
        if asked is not None and asked != found:
            raise UsageError(
                f"--{name} is {asked}, but {options.weights or 'the bundled model'} has {found}. "
                f"Leave --{name} out: the model file knows."
            )
    return model


def _announce(
    particles: ParticleSet, model: Model, threshold: float, options: ScoreOptions
) -> None:
    log.info(
        "Read %s: %s particles in %s stacks, %s micrographs, %d optics group(s).",
        particles.source, f"{len(particles):,}", f"{len(particles.stacks):,}",
        f"{len(particles.micrographs):,}", len(particles.optics),
    )  # fmt: skip
    log.info(
        "Model %s (%s, %d px, hash %s)%s; scores from %g on are accepted; %d thread(s).",
        options.weights or "bundled", model.network.name, model.network.dim, model.hash,
        ", averaged over eight views" if options.tta else "", threshold, options.threads,
    )  # fmt: skip
    loop = particles.loop
    label = options.score_label.removeprefix("_")
    if loop is not None and label in loop.labels:
        log.info("The input has a column %s already; it is overwritten in the results.", label)


def _write_scores_csv(path: Path, values: np.ndarray) -> None:
    """Write lines ``0, 0.0320`` in input order, as the 2020 program did."""
    write_text(path, "".join(f"{row}, {value:.4f}\n" for row, value in enumerate(values.tolist())))


def _write_bad_images(path: Path, scores: Scores) -> None:
    if not len(scores.bad):
        path.unlink(missing_ok=True)
        return
    scores.bad.write_csv(path)
    log.warning("%s\nThey are scored 0 and listed in %s.", scores.bad.summary(), path)


def _write_subsets(
    folder: Path,
    particles: ParticleSet,
    values: np.ndarray,
    accepted: np.ndarray,
    options: ScoreOptions,
) -> tuple[Output, ...]:
    """Write the three STAR files; an empty one is neither written nor registered."""
    assert particles.star is not None
    assert particles.loop is not None
    subsets = {ALL: np.ones_like(accepted), ACCEPTED: accepted, REJECTED: ~accepted}
    filled = {name: mask for name, mask in subsets.items() if mask.any()}
    write_scored(
        particles.star, particles.loop, options.score_label.removeprefix("_"), values,
        {folder / name: mask for name, mask in filled.items()},
    )  # fmt: skip
    for name in subsets.keys() - filled.keys():
        (folder / name).unlink(missing_ok=True)
        log.warning("No particles for %s, so it is not written.", name)
    return tuple(Output(name, "particles") for name in (ACCEPTED, REJECTED, ALL) if name in filled)


def _conclude(scores: Scores, accepted: np.ndarray, threshold: float, folder: Path) -> None:
    n, kept = len(accepted), int(accepted.sum())
    log.info(
        "Scored %s particles in %s (%s/s): %s accepted (%.1f %%), %s rejected, at threshold %g.",
        f"{n:,}", duration(scores.seconds), f"{n / max(scores.seconds, 1e-9):,.0f}",
        f"{kept:,}", 100 * kept / n, f"{n - kept:,}", threshold,
    )  # fmt: skip
    log.info("Results are in %s/", folder)


def convert(
    options: ConvertOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Turn Keras weights of the 2020 program into a model file."""
    from relion_cryofilter.nn.keras import import_keras

    if options.weights is None or options.o is None:
        raise UsageError("Give both: relion_cryofilter convert weights.h5 --o model.safetensors")
    if os.path.realpath(options.weights) == os.path.realpath(options.o):
        raise UsageError(f"--o {options.o} would overwrite the input.")
    model = import_keras(options.weights, f=options.f, dim=options.img_dim)
    options.o.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.o)
    log.info("Wrote %s: network %s, %d px, hash %s", options.o, model.network.name,
             model.network.dim, model.hash)  # fmt: skip
    return ()


def demo(
    options: DemoOptions, abort_requested: Callable[[], bool] = lambda: False
) -> tuple[Output, ...]:
    """Simulate a RELION project and score it as an External job would."""
    from relion_cryofilter.demo import run_demo

    run_demo(options)
    return ()


RECIPES: Mapping[str, Callable[[Any, Callable[[], bool]], tuple[Output, ...]]] = {
    "score": score,
    "convert": convert,
    "demo": demo,
}

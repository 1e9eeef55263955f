"""For scripts and notebooks: score, train and evaluate on tables or STAR files, values back.

>>> import starfile
>>> from relion_cryofilter import score_images
>>> particles = starfile.read("Extract/job007/particles.star")  # doctest: +SKIP
>>> scores = score_images(particles, "model.safetensors", threshold="keep=0.6")  # doctest: +SKIP
>>> best = scores.to_frame()[scores.accepted]  # doctest: +SKIP

Nothing is written here but what `train_model` is told to. The jobs (`score`, `train`, `metrics`
with their options) write what RELION and people look at.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from relion_cryofilter.commands.contrast import check_contrast
from relion_cryofilter.commands.evaluation import measure
from relion_cryofilter.commands.fitting import model_name
from relion_cryofilter.commands.judging import judge, score_as_told
from relion_cryofilter.commands.models import (
    check_pixel_size,
    check_request,
    in_precision,
    read_models,
)
from relion_cryofilter.commands.train import train_on
from relion_cryofilter.data.frames import (
    Table,
    frame_of,
    is_table,
    particles_of_table,
    table_of_columns,
    table_of_particles,
)
from relion_cryofilter.data.labelled import LabelledSet
from relion_cryofilter.data.particles import ParticleSet, read_particles
from relion_cryofilter.data.star_labels import SCORE_LABEL
from relion_cryofilter.errors import UsageError
from relion_cryofilter.files import read_csv
from relion_cryofilter.nn.checkpoint import Model, load_model
from relion_cryofilter.nn.scoring import Scores
from relion_cryofilter.options import LabelOptions, ModelOptions, TrainOptions
from relion_cryofilter.progress import Listener, Progress, listening
from relion_cryofilter.relion.labels import labelled_particles
from relion_cryofilter.result_files import HISTORY, METRICS, PREDICTIONS
from relion_cryofilter.results.metrics import Evaluation
from relion_cryofilter.wording import suggestion

if TYPE_CHECKING:
    import pandas as pd

Particles: TypeAlias = str | Path | Table | ParticleSet
"""A STAR file, a table with rlnImageName, tables as `starfile.read` gives them, or a set."""

Models: TypeAlias = str | Path | Model | Sequence[str | Path | Model] | None
"""A model or its file, several (their scores are averaged), or None for the bundled one."""


ChosenT = TypeVar("ChosenT", ModelOptions, TrainOptions)


@dataclass(frozen=True)
class ParticleScores:
    """Scores of particles, row for row, and which of them are accepted.

    Attributes
    ----------
    values
        (n,) 0 (junk) to 1 (particle), six decimals.
    accepted
        (n,) bool, True from the threshold on; bad images never.
    threshold, reason
        The threshold and where it is from.
    bad
        Rows of images that could not be used, with `skip_bad`; they score 0.
    """

    values: np.ndarray
    accepted: np.ndarray
    threshold: float
    reason: str
    bad: np.ndarray
    _table: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.values)

    def to_frame(self) -> pd.DataFrame:
        """Return the particles' table with one more column, rlnParticleFigureOfMerit.

        A STAR file or a set gives image and micrograph names; a table keeps its columns and index.
        """
        given = self._table
        frame = table_of_particles(given) if isinstance(given, ParticleSet) else frame_of(given)
        return frame.assign(**{SCORE_LABEL: self.values})


@dataclass(frozen=True)
class Training:
    """What a training gives.

    Attributes
    ----------
    models
        One, or those of the ensemble.
    figures
        What metrics.json holds: the figures of the test part and the self-tests.
    """

    models: tuple[Model, ...]
    figures: Mapping[str, Any] = field(repr=False)
    _history: list[dict[str, str]] = field(repr=False)
    _predictions: list[dict[str, str]] = field(repr=False)

    def history(self) -> pd.DataFrame:
        """Return loss, accuracy and AUC of each epoch (of the first model)."""
        return table_of_columns(self._history).astype(float)

    def predictions(self) -> pd.DataFrame:
        """Return image, micrograph, label and score of each test particle."""
        return table_of_columns(self._predictions).astype({"label": int, "score": float})


def score_images(
    particles: Particles,
    model: Models = None,
    *,
    folder: str | Path = "",
    progress: Listener | None = None,
    **options: Any,
) -> ParticleScores:
    """Score particles and choose which to accept.

    Parameters
    ----------
    particles
        n particles, see `Particles`.
    model
        See `Models`.
    folder
        The RELION project that image paths of a table are relative to; the working directory if
        not given.
    progress
        Called with what is counted, how many are done, and how many there are. An exception that
        it raises ends the work.
    **options
        As of `ModelOptions`: threshold, tta, skip_bad, any_contrast, j, gpu, batch_size, …

    Raises
    ------
    CryoFilterError
        Something is wrong with the particles, the images, a model or an option.
    """
    chosen = _chosen(ModelOptions, options)
    found, models = _read(particles, folder), _models(model, chosen)
    check_request(chosen.threshold, models)
    check_contrast(found, models, chosen)
    scores = _scores(found, models, chosen, progress)
    judged = judge(scores, models, chosen.threshold)
    table = particles if is_table(particles) else found
    return ParticleScores(
        judged.values, judged.accepted, judged.threshold, judged.reason, scores.bad.rows, table
    )


def train_model(
    good: Particles,
    bad: Particles,
    *,
    folder: str | Path = "",
    progress: Listener | None = None,
    **options: Any,
) -> Training:
    """Train a model on good and bad particles; by default the bundled one is fine-tuned.

    Parameters
    ----------
    good, bad
        See `Particles`.
    folder, progress
        As of `score_images`.
    **options
        As of `TrainOptions`: epochs, seed, split, model, init, ensemble, threshold, …  With
        ``o="folder/"`` what the job writes stays there: the model, figures and a checkpoint from
        which a stopped training goes on.

    Raises
    ------
    CryoFilterError
        Something is wrong with the particles, the images or an option.
    """
    chosen = _chosen(TrainOptions, options, but=("o",))
    labelled = _labelled(good, bad, folder)
    with ExitStack() as stack:
        place = chosen.o or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        stack.enter_context(listening(progress))
        train_on(labelled, chosen, place)
        models = tuple(
            load_model((chosen.weight_dir or place) / model_name(number))
            for number in range(1, chosen.ensemble + 1)
        )
        return Training(
            models,
            json.loads((place / METRICS).read_text()),
            read_csv((chosen.history_dir or place) / HISTORY),
            read_csv(place / PREDICTIONS),
        )


def evaluate_model(
    good: Particles,
    bad: Particles,
    model: Models = None,
    *,
    folder: str | Path = "",
    progress: Listener | None = None,
    seed: int = 0,
    **options: Any,
) -> Evaluation:
    """Measure a model on good and bad particles that it was not trained on.

    Parameters
    ----------
    good, bad, model, folder, progress
        As of `train_model` and `score_images`.
    seed
        Of the bootstrap over micrographs that the intervals are from.
    **options
        As of `score_images`.

    Returns
    -------
    Evaluation
        AUC and more with 95 % intervals; `to_dict` and `summary` give them as data and as text.

    Raises
    ------
    CryoFilterError
        As `score_images`, or only particles of one kind can be used.
    """
    chosen = _chosen(ModelOptions, options)
    labelled, models = _labelled(good, bad, folder), _models(model, chosen)
    check_request(chosen.threshold, models)
    check_contrast(labelled.good(), models, chosen)
    scores = _scores(labelled.particles, models, chosen, progress)
    return measure(labelled, scores, models, chosen.threshold, seed).evaluation


def _chosen(kind: type[ChosenT], options: dict[str, Any], but: Sequence[str] = ()) -> ChosenT:
    """Return the options, none of which is unknown or of the jobs only."""
    of_jobs = {"in_parts", "o", "weights", "out_dir", *(item.name for item in fields(LabelOptions))}
    of_jobs.difference_update(but)
    known = [item.name for item in fields(kind) if item.name not in of_jobs]
    for name in sorted(options):
        if name in of_jobs:
            raise TypeError(f"{name} is an option of the jobs; here, arguments say what is read.")
        if name not in known:
            raise UsageError(f"There is no option {name}. {suggestion(name, known)}")
    return kind(**options)


def _read(particles: Particles, folder: str | Path) -> ParticleSet:
    if isinstance(particles, ParticleSet):
        return particles
    if isinstance(particles, str | Path):
        return read_particles(particles)
    return particles_of_table(particles, Path(folder))


def _labelled(good: Particles, bad: Particles, folder: str | Path) -> LabelledSet:
    return labelled_particles([_read(good, folder)], [_read(bad, folder)], "Labels from tables.")


def _models(model: Models, options: ModelOptions) -> list[Model]:
    if model is None:
        return read_models(options)
    several = [model] if isinstance(model, str | Path | Model) else model
    return [_model_of(item, options) for item in several]


def _model_of(item: str | Path | Model, options: ModelOptions) -> Model:
    if isinstance(item, Model):
        return item if options.precision == "float32" else in_precision(item, options)
    return read_models(replace(options, weights=(Path(item),)))[0]


def _scores(
    particles: ParticleSet,
    models: Sequence[Model],
    options: ModelOptions,
    progress: Listener | None,
) -> Scores:
    check_pixel_size(models, particles)
    with listening(progress):
        return score_as_told(
            particles, models, options, Progress(len(particles), "particles scored")
        )

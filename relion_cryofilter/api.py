"""For scripts and notebooks: score, train and evaluate on tables or STAR files, values back.

>>> import starfile
>>> from relion_cryofilter import score_images
>>> particles = starfile.read("Extract/job007/particles.star")  # doctest: +SKIP
>>> scores = score_images(particles, "model.safetensors", threshold="keep=0.6")  # doctest: +SKIP
>>> best = scores.to_frame()[scores.accepted]  # doctest: +SKIP

Nothing is written here but what `train_model` is told to. Where particles, images, models or
options are wrong the functions raise `CryoFilterError`. The jobs (`score`, `train`, `metrics` with
their options) write what RELION and people look at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from relion_cryofilter.commands.train import write_trained
from relion_cryofilter.errors import UsageError, suggestion
from relion_cryofilter.evaluation import Evaluation
from relion_cryofilter.files import SCORE_LABEL
from relion_cryofilter.images.contrast import check_contrast
from relion_cryofilter.locks import one_run, own
from relion_cryofilter.nn.measurement import measure
from relion_cryofilter.nn.model import Model, Models, read_models
from relion_cryofilter.nn.scoring import How, Scores, score_particles
from relion_cryofilter.nn.training import Trained, train_models
from relion_cryofilter.options import LabelOptions, ModelOptions, TrainOptions
from relion_cryofilter.particles.labels import LabelledSet, labelled_particles
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.tables import (
    Frames,
    frame_of,
    is_table,
    particles_of_table,
    read_particle_file,
    table_of_particles,
)
from relion_cryofilter.progress import Listener, Progress, listening
from relion_cryofilter.results.outputs import write_history
from relion_cryofilter.thresholds import Chosen

if TYPE_CHECKING:
    import pandas as pd

Particles: TypeAlias = str | Path | Frames | ParticleSet
"""A STAR file, a table with rlnImageName, tables as `starfile.read` gives them, or a set."""

SomeModels: TypeAlias = str | Path | Model | Sequence[str | Path | Model] | None
"""A model or its file, several (their scores are averaged), or None for the bundled one."""

KindOfOptions = TypeVar("KindOfOptions", ModelOptions, TrainOptions)


@dataclass(frozen=True, eq=False)
class ParticleScores(Chosen):
    """Scores of particles, row for row, and which of them are accepted.

    Attributes
    ----------
    values, accepted, threshold, reason
        See `Chosen`.
    bad
        Rows of images that could not be used, with `skip_bad`; they score 0.
    """

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


@dataclass(frozen=True, eq=False)
class Training:
    """What a training gives.

    Attributes
    ----------
    models
        One, or those of the ensemble.
    figures
        Figures of particles unseen in training with intervals, and the self-tests, as in
        metrics.json.
    """

    models: tuple[Model, ...]
    figures: dict[str, Any] = field(repr=False)
    _trained: Trained = field(repr=False)

    def history(self) -> pd.DataFrame:
        """Return loss, accuracy and AUC of each epoch (of the first model)."""
        import pandas as pd

        return pd.DataFrame([asdict(epoch) for epoch in self._trained.histories[0]]).astype(float)

    def predictions(self) -> pd.DataFrame:
        """Return image, micrograph, label and score of each particle that was measured."""
        return self._trained.measured.to_frame()


def score_images(
    particles: Particles,
    model: SomeModels = None,
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
        See `SomeModels`.
    folder
        The RELION project that image paths of a table are relative to; the working directory if
        not given.
    progress
        Called with what is counted, how many are done, and how many there are. An exception that
        it raises ends the work.
    **options
        As of `ModelOptions`: threshold, tta, skip_bad, any_contrast, j, gpu, batch_size, …
    """
    chosen = _chosen(ModelOptions, options)
    with one_run():
        found, models = _read(particles, folder), _models(model, chosen)
        scores = _scores(found, found, models, chosen, progress)
    accepted = models.choose(scores.values, chosen.threshold, scores.bad.rows)
    table = particles if is_table(particles) else found
    return ParticleScores(**vars(accepted), bad=scores.bad.rows, _table=table)


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
        which a stopped training is resumed.
    """
    chosen = _chosen(TrainOptions, options, but=("o",))
    with ExitStack() as stack:
        stack.enter_context(one_run())
        labelled = _labelled(good, bad, folder)
        place = chosen.o or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own(place)
        stack.enter_context(listening(progress))
        trained = train_models(
            labelled,
            chosen,
            place,
            after_epoch=lambda number, epochs: write_history(place, number, epochs),
        )
        if chosen.o is not None:
            write_trained(chosen.o, trained, chosen)
    return Training(trained.models.members, trained.figures(chosen), trained)


def evaluate_model(
    good: Particles,
    bad: Particles,
    model: SomeModels = None,
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
    """
    chosen = _chosen(ModelOptions, options)
    with one_run():
        labelled, models = _labelled(good, bad, folder), _models(model, chosen)
        scores = _scores(labelled.particles, labelled.good(), models, chosen, progress)
    return measure(labelled, scores, models, chosen.threshold, seed=seed).evaluation


def _chosen(
    kind: type[KindOfOptions], options: dict[str, Any], but: Sequence[str] = ()
) -> KindOfOptions:
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
        return read_particle_file(Path(particles))
    return particles_of_table(particles, Path(folder))


def _labelled(good: Particles, bad: Particles, folder: str | Path) -> LabelledSet:
    return labelled_particles([_read(good, folder)], [_read(bad, folder)], "Labels from tables.")


def _models(model: SomeModels, options: ModelOptions) -> Models:
    several = [model] if isinstance(model, str | Path | Model) else model
    return read_models(several or (), **options.beliefs)


def _scores(
    particles: ParticleSet,
    good: ParticleSet,
    models: Models,
    options: ModelOptions,
    progress: Listener | None,
) -> Scores:
    """Check models and contrast (of the good particles), then score."""
    models.check(particles, options.threshold)
    if not options.any_contrast:
        check_contrast(good, models.members[0].preprocess, options.threads)
    with listening(progress):
        counting = Progress(len(particles), "particles scored")
        return score_particles(particles, models, counting, How.asked(options))

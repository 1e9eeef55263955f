"""Every option once: what the command line, the External job and the Python API accept.

Each mode has a frozen dataclass. Its fields are the options; their metadata names the `Kind` that
reads words into values, and explains them. To add an option, add a field.

Only the standard library is imported: the job's guard and ``--help`` do not wait for numpy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from relion_cryofilter.files import SCORE_LABEL
from relion_cryofilter.kinds import ThresholdRequest, check_limits, given
from relion_cryofilter.processes import local_count

MOST_FILTERS, LARGEST_DIM = 256, 256
"""Of networks: a convolution's filters, and the small image's side (px)."""
MOST_MODELS = 10
"""Of an ensemble."""

NETWORKS = {"d4": "d4.D4", "straight": "networks.Straight", "roberts": "networks.Roberts"}
"""The networks by name, and where in `relion_cryofilter.nn` each is defined."""


def option(help_text: str, kind: str, default: Any = None, **limits: Any) -> Any:
    """Make a dataclass field that is an option; `kind` is a key of `KINDS`."""
    return field(default=default, metadata={"help": help_text, "kind": kind, **limits})


def same_option(kind: type[Any], name: str) -> Any:
    """Make a dataclass field that is an option of another mode."""
    item = kind.__dataclass_fields__[name]
    return field(default=item.default, metadata=item.metadata)


def available_cores() -> int:
    """Return how many cores this process may use; processes of one job share them."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // local_count())


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the options of all modes can do."""

    quiet: bool = option("Say only warnings and errors.", "flag", False)
    verbose: bool = option("Say more, and show the traceback of every error.", "flag", False)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = given(item, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
            check_limits(item, value)


@dataclass(frozen=True, kw_only=True)
class JobOptions(Options):
    """What RELION gives to every External job."""

    o: Path | None = option("Folder for the results, e.g. External/job012/.", "path")
    in_parts: Path | None = option(
        "Particles: a RELION particles.star (to train and measure: of a Select job), or a "
        "CryoSPARC .cs or .csg.", "path",
    )  # fmt: skip
    j: int | None = option("Threads; all cores of this process if not given.", "integer", low=1)

    @property
    def threads(self) -> int:
        """Number of threads to use: no more than there are cores for them."""
        return min(self.j or available_cores(), available_cores())


@dataclass(frozen=True, kw_only=True)
class ModelOptions(JobOptions):
    """Which models to use, and how."""

    weights: tuple[Path, ...] = option(
        "Models (.safetensors, or a Keras .h5 of 2020), averaged if several; the bundled one if "
        "not given.", "paths", (),
    )  # fmt: skip
    threshold: ThresholdRequest | None = option(
        "Accept scores of at least this: 0.6, recall=0.95, precision=0.9, keep=0.6 (a fraction), "
        "count=50000, balanced (the least junk and loss in sum), gmm (the upper of two kinds), or "
        "2020 (0.5); the model's own threshold if "
        "not given.", "threshold",
    )  # fmt: skip
    tta: bool = option(
        "Average the scores of the eight flips and rotations; nothing to do for d4 networks.",
        "flag",
        False,
    )
    skipping = "--skip_bad leaves them out"  # what is said of bad images
    skip_bad: bool = option(
        "Go on without missing, blank and NaN images (score: they get 0 and are listed in "
        "bad_images.csv).", "flag", False,
    )  # fmt: skip
    batch_size: int | None = option(
        "Images read at a time by each thread; 32 MiB worth if not given.", "integer", low=1
    )
    precision: str = option(
        "float32, or bf16: a third faster where the processor has it; scores change by up to "
        "about 0.01.", "text", "float32", choices=("float32", "bf16"),
    )  # fmt: skip
    any_contrast: bool = option(
        "Go on though the particles are darker than their surroundings.", "flag", False
    )
    gpu: str | None = option(
        "GPUs: 0, 0,1, 0:1 or nothing for all of them; cpu or absent for none.", "gpu"
    )
    model: str | None = option("Network of the models, to check them.", "text")
    f: int | None = option(
        "Filters of the models, to check them.", "integer", low=1, high=MOST_FILTERS
    )
    img_dim: int | None = option(
        "Image size of the models in px: for Keras .h5 files that do not tell, else a check.",
        "integer", low=1, high=LARGEST_DIM,
    )  # fmt: skip

    @property
    def beliefs(self) -> dict[str, Any]:
        """The precision and the checks, as `read_models` takes them."""
        return {
            "precision": self.precision, "network": self.model,
            "f": self.f, "img_dim": self.img_dim,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions):
    """Score particles and sort them into accepted and rejected."""

    skipping = "--skip_bad scores such images 0 and lists them in bad_images.csv"
    mrc: tuple[Path, ...] = option("Plain image stacks instead of a STAR file.", "paths", ())
    passthrough: Path | None = option(
        "For a CryoSPARC .cs file: the passthrough .cs with the particles' other fields.", "path"
    )
    project_dir: Path | None = option(
        "For a CryoSPARC .cs file: the project's folder, if the file is not in it.", "path"
    )
    adapt: bool = option(
        "Without labels: first fit the bundled model to these images, taught by what it is surest "
        "of; takes about half a minute. Kept in --o, and used again by Continue.", "flag", False,
    )  # fmt: skip
    junk: Path | None = option(
        "Particles known to be junk, as --in_parts: how many of them would pass is said.", "path"
    )
    out_file: Path | None = option("Where to write scores.csv; in --o if not given.", "path")
    features: bool = option("Also write features.npy, one row a particle.", "flag", False)
    rescore: bool = option(
        "Score every image, also those that this folder's score_cache.journal knows.",
        "flag", False,
    )  # fmt: skip
    score_label: str = option(
        "Column for the scores. RELION can select and sort only by labels it knows.",
        "label", SCORE_LABEL,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Options):
    """Where labels come from."""

    pos: tuple[Path, ...] = option("STAR or .cs files and stacks of good particles.", "paths", ())
    neg: tuple[Path, ...] = option("STAR or .cs files and stacks of bad particles.", "paths", ())
    pos_classes: tuple[int, ...] = option(
        "Good classes of --in_parts …_data.star, e.g. 1,4,7.", "integers", ()
    )
    neg_classes: tuple[int, ...] = option(
        "Bad classes; all that are not good if not given.", "integers", ()
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(JobOptions, LabelOptions):
    """Train a model on a Select job, on classes, or on files of good and bad particles."""

    split: float | None = option(
        "Train on this share of the particles (whole micrographs), choose epoch and threshold on "
        "half of the rest, test on the other half. Default: train on all, and measure each "
        "particle by models that have not seen its micrograph.", "number", low=0.05, high=0.95,
    )  # fmt: skip
    epochs: int | None = option(
        "Looks at each image. Default: 20, within a budget of steps; 30 from scratch. With "
        "--split: at most, 12 from a model.", "integer", low=1,
    )  # fmt: skip
    patience: int = option(
        "With --split: epochs without a better validation AUC.", "integer", 10, low=1
    )
    batch_size: int | None = option(
        "Images a step. Default: 32 from a model, 64 from scratch.", "integer", low=1
    )
    learning_rate: float | None = option(
        "At the start; it falls. Default: 0.003; with --split or from scratch 0.001.", "number",
        low=1e-8, high=1.0,
    )  # fmt: skip
    augmentation: bool = option("Show images flipped and rotated too.", "flag", True)
    ensemble: int = option(
        "Models to train, each with another seed (with --split: another part of the micrographs "
        "for validation); their scores are averaged.", "integer", 1, low=1, high=MOST_MODELS,
    )  # fmt: skip
    model: str | None = option(
        "Train this network from scratch: d4 (the bundled one's), straight or roberts (2020). "
        "Default: the bundled start is fine-tuned.",
        "text", choices=tuple(NETWORKS),
    )  # fmt: skip
    f: int | None = option(
        "Filters of straight or roberts. Default: 32.", "integer", low=1, high=MOST_FILTERS
    )
    img_dim: int | None = option(
        "Network image size in px. Default: 28; of d4, 48.", "integer", low=8, high=LARGEST_DIM
    )
    preprocess: str | None = option(
        "blur_resize (as in 2020) or fourier_crop. Default: that of 2020 for straight and roberts.",
        "text",
        choices=("blur_resize", "fourier_crop"),
    )
    init: Path | None = option(
        "Model to start from (fine-tuning); the bundled start if no network is named.", "path"
    )
    seed: int = option(
        "Of the folds or the split, the weights and the order.", "integer", 0, low=0, high=2**31 - 1
    )
    threshold: ThresholdRequest = option(
        "Threshold to store in the model, for the particles behind the labels as far as wrong "
        "labels can be told: recall=0.95, precision=0.9, balanced, keep=0.6, 0.6, or 2020 "
        "(0.5).",
        "threshold", ThresholdRequest("recall", 0.95),
    )  # fmt: skip
    max_memory: float = option(
        "GB for the small images; a larger set is read again each epoch.", "number", 8.0, low=0
    )
    skip_bad: bool = option("Leave out missing, blank and NaN images.", "flag", False)
    any_contrast: bool = option(
        "Go on though the good particles are darker than their surroundings.", "flag", False
    )
    gpu: str | None = option("GPU to train on (the first named); absent for none.", "gpu")
    out_dir: Path | None = option("The 2020 name of --o.", "path")
    weight_dir: Path | None = option("Folder for the model, if not --o.", "path")
    history_dir: Path | None = option("Folder for history.csv, if not --o.", "path")


@dataclass(frozen=True, kw_only=True)
class MetricsOptions(ModelOptions, LabelOptions):
    """Measure models on labelled particles."""

    split: float | None = option(
        "Measure only on the test part of a training with this --split and --seed.",
        "number", low=0.05, high=0.95,
    )  # fmt: skip
    seed: int = option("Seed of the split.", "integer", 0, low=0, high=2**31 - 1)
    out_dir: Path | None = option("The 2020 name of --o.", "path")


@dataclass(frozen=True, kw_only=True)
class SelectOptions(JobOptions):
    """Sort a scored STAR file again, by another threshold; without images."""

    threshold: ThresholdRequest | None = option(
        "Accept scores of at least this: 0.6, keep=0.6 (a fraction), count=50000, gmm, 2020 (0.5); "
        "with --weights also recall=0.95, precision=0.9 and balanced. With --add or --random not "
        "needed: then those are accepted that are in particles_accepted.star beside --in_parts.",
        "threshold",
    )  # fmt: skip
    add: tuple[Path, ...] = option(
        "Accept these particles of --in_parts too, e.g. what a Select job found good among the "
        "rejected: Select/job015/particles.star.", "paths", (),
    )  # fmt: skip
    random: bool = option(
        "Also write particles_random.star: as many particles as are accepted, drawn from all, for "
        "an honest comparison.", "flag", False,
    )  # fmt: skip
    seed: int = option("Of the draw.", "integer", 0, low=0, high=2**31 - 1)
    weights: Path | None = option(
        "The model that scored, for recall, precision and balanced.", "path"
    )  # fmt: skip
    score_label: str = option("Column of the scores.", "label", SCORE_LABEL)


@dataclass(frozen=True, kw_only=True)
class CryosparcOptions(Options):
    """Score particles of a CryoSPARC job in an External job; needs its server."""

    host: str = option("Name of the machine of CryoSPARC's server.", "text", "localhost")
    port: int = option("The server's base port.", "integer", 39000, low=1, high=65535)
    email: str | None = option(
        "Your login. The password comes from the variable CRYOSPARC_PASSWORD; without it, a "
        "session of `python -m cryosparc.tools login` is used.", "text",
    )  # fmt: skip
    license: str | None = option(
        "License ID, for servers that ask for it; better in the variable CRYOSPARC_LICENSE_ID.",
        "text",
    )
    project: str | None = option("Project, e.g. P3.", "text")
    workspace: str | None = option("Workspace for the External job, e.g. W1.", "text")
    particles: str | None = option("Job and output to score, e.g. J42:particles.", "text")
    title: str = option("Title of the External job.", "text", "CryoFilter")
    project_dir: Path | None = option(
        "The project's folder as this machine sees it, if not as the server does.", "path"
    )
    o: Path | None = option("Folder to keep the results in too.", "path")
    weights: tuple[Path, ...] = same_option(ModelOptions, "weights")
    threshold: ThresholdRequest | None = same_option(ModelOptions, "threshold")
    skip_bad: bool = same_option(ModelOptions, "skip_bad")
    any_contrast: bool = same_option(ModelOptions, "any_contrast")
    gpu: str | None = same_option(ModelOptions, "gpu")
    j: int | None = same_option(JobOptions, "j")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Turn Keras weights of the 2020 program into a model file."""

    weights: Path | None = option("The Keras .h5 weights.", "path", positional=True)
    o: Path | None = option("The model file to write, e.g. model.safetensors.", "path")
    f: int | None = option("Filters, to check the file.", "integer", low=1, high=MOST_FILTERS)
    img_dim: int | None = option(
        "Network image size in px, if the file does not tell; then 28.", "integer",
        low=8, high=LARGEST_DIM,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Simulate a small RELION project; score it, train on part of it, and score it again."""

    folder: Path = option(
        "Folder for the project.", "path", Path("cryofilter_demo"), positional=True
    )
    j: int | None = option("Threads.", "integer", low=1)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(JobOptions):
    """Classify what was rejected: a Class2D job.star for RELION, by `job --mode check`."""

    sample: int | None = option(
        "Only so many of the rejected particles, drawn at random; they are written beside them, to "
        "particles_rejected_sample.star.", "integer", low=1,
    )  # fmt: skip
    seed: int = option("Of the draw.", "integer", 0, low=0, high=2**31 - 1)
    relion: str | None = option(
        "RELION's version, where the project has no Class2D job; that which made the job of "
        "--in_parts if not given.", "text", choices=("3.1", "4.0", "5.0"),
    )  # fmt: skip


MODES: Mapping[str, type[Options]] = {
    "score": ScoreOptions,
    "train": TrainOptions,
    "metrics": MetricsOptions,
    "select": SelectOptions,
    "convert": ConvertOptions,
    "cryosparc": CryosparcOptions,
    "demo": DemoOptions,
}

TEMPLATES: Mapping[str, type[Options]] = {"check": CheckOptions}
"""What `job` alone does: jobs of RELION's own."""

JOB_MODES = tuple(name for name, kind in MODES.items() if issubclass(kind, JobOptions))
RELION_ONLY = {
    "pipeline_control": "given by RELION; the results go to --o",
    "in_movies": "not used by this program",
    "in_mics": "not used by this program",
    "in_coords": "not used by this program",
    "in_3dref": "not used by this program",
    "in_mask": "not used by this program",
}
"""What RELION may put on the command line of any External job."""

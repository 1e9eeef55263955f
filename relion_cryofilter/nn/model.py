"""One file = one model: weights, preprocessing, threshold, calibration and provenance.

The file is in safetensors format, with one metadata entry of JSON, so a stranger's model can't
run code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relion_cryofilter.errors import ModelError, UsageError
from relion_cryofilter.files import replacing
from relion_cryofilter.images.preprocess import (
    Preprocess,
    d4_views,
    filled_up,
    preprocess_from_dict,
)
from relion_cryofilter.inputs import parse_json
from relion_cryofilter.kinds import OF_LABELS, ThresholdRequest
from relion_cryofilter.nn.keras import is_keras, read_keras, require_file
from relion_cryofilter.nn.networks import Network, build_network
from relion_cryofilter.particles.particles import ParticleSet
from relion_cryofilter.particles.signatures import MODEL
from relion_cryofilter.particles.stacks import kind_of_file
from relion_cryofilter.processes import __version__
from relion_cryofilter.thresholds import (
    CURVE,
    DECIMALS,
    METADATA_KEY,
    Chosen,
    Interval,
    OperatingCurve,
    check_model_header,
    threshold_and_reason,
)

log = logging.getLogger("relion_cryofilter")

FORMAT_VERSION, HASH_DIGITS, GPU_BATCH = 1, 12, 512
_MODELS = Path(__file__).parents[1] / "models"
BUNDLED_MODEL, START_MODEL = _MODELS / "default.safetensors", _MODELS / "start.safetensors"
"""What scores without labels, and what trainings begin from: what sorts best by itself does not
learn best (MODEL_CARD.md)."""
PIXEL_SIZE_TOLERANCE = 0.1
LARGEST_WEIGHT = 1e6
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
ESTIMATE, SIMULATED, LABEL_NOISE = "threshold_estimate", "made_by", "label_noise"
ADAPTED, NOISE_ACCEPTED = "adapted_to", "noise_accepted"
"""Keys of the provenance: what the threshold gave on particles unseen, the simulator, how many
labels look wrong; of a model that was adapted without labels to what, and the shares of noise."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network and all that is needed to use it, or a ModelError if the parts don't fit.

    Parameters
    ----------
    network : Network
        Makes logits of small images. Its weights are laid out channels-last in place.
    preprocess : Preprocess
        Makes small images of raw boxes.
    threshold : float
        Particles that score this much or more are kept, 0 to 1.
    temperature : float
        Calibration: score = sigmoid(logit / temperature).
    provenance : dict
        Training data, seeds, versions, pixel size (Å/px), box (px) and so on, ready for JSON.
    precision : torch.dtype
        Of the crop and the network's products, float32 or bfloat16; not part of the file.
    """

    network: Network
    preprocess: Preprocess
    threshold: float
    temperature: float = 1.0
    provenance: dict[str, Any] = field(default_factory=dict)
    precision: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        network, recipe = self.network, self.preprocess
        if recipe.dim != network.dim or recipe.channels < network.channels:
            raise ModelError(
                f"Network {network.name} takes {network.channels} x {network.dim} x {network.dim} "
                f"px, but the preprocessing makes {recipe.channels} x {recipe.dim} x {recipe.dim}. "
                "Give both the same image size and channels."
            )
        if not 0 <= self.threshold <= 1:
            raise ModelError(f"The model's threshold is {self.threshold}; it must be 0 to 1.")
        if not 0 < self.temperature < float("inf"):
            raise ModelError(f"The model's temperature is {self.temperature}; it must be above 0.")
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _refuse_nonsense(network)

    @property
    def hash(self) -> str:
        """Short hex SHA-256 of all that affects scores: weights, recipe, temperature."""
        digest = hashlib.sha256(_canonical_json(self._scoring_metadata()).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:HASH_DIGITS]

    def _scoring_metadata(self) -> dict[str, Any]:
        return {
            "network": {"name": self.network.name, "kwargs": dict(self.network.kwargs)},
            "preprocess": self.preprocess.to_dict(),
            "temperature": float(self.temperature),
        }

    def probabilities(self, small: Tensor, tta: bool = False) -> Tensor:
        """Return scores (n,), 0 to 1, on the device of `small`; safe to call from several threads.

        Parameters
        ----------
        small : Tensor
            Network input (n, channels, dim, dim), as `preprocess` makes it. An image of NaN scores
            NaN.
        tta : bool
            Test-time augmentation: the mean score of the eight flips and quarter turns; nothing
            to do for an equivariant network.
        """
        return self._infer(small, tta, 0)[0]

    def probabilities_and_features(self, small: Tensor, tta: bool = False) -> tuple[Tensor, Tensor]:
        """Return scores (n,) and features (n, feature_count) of the images as they stand."""
        return self._infer(small, tta, self.network.feature_count)

    def _infer(self, small: Tensor, tta: bool, kept: int) -> tuple[Tensor, Tensor]:
        """Return scores (n,) and the first `kept` features of each image."""
        if self.network.training:
            self.network.eval()
        device = self.network.device
        # Made outside inference mode, so that callers may change them in place.
        scores = torch.zeros(len(small), device=device)
        features = torch.empty(len(small), kept, device=device)
        reduced = torch.autocast(device.type, torch.bfloat16, self.precision != torch.float32)
        with torch.inference_mode(), reduced:
            step = self.network.micro_batch if device.type == "cpu" else GPU_BATCH
            for start in range(0, len(small), step):
                rows = slice(start, min(start + step, len(small)))
                count = rows.stop - start
                batch = filled_up(small[rows].to(device), step)
                logits, vectors = self.network.forward_with_features(batch)
                values = self._score(logits)
                if tta and not self.network.equivariant:
                    _, *views = d4_views(batch)
                    others = [self._score(self.network(view)) for view in views]
                    values = torch.stack([values, *others]).mean(dim=0)
                scores[rows], features[rows] = values[:count], vectors[:count, :kept]
        return scores.to(small.device), features.to(small.device)

    def _score(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits.float() / self.temperature)

    def to(self, device: str | torch.device) -> Model:
        """Return a copy of this model on `device`."""
        return replace(self, network=copy.deepcopy(self.network).to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file, complete or not at all; raise ModelError if it can't be written."""
        state = self.network.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        about = {
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            **self._scoring_metadata(),
            "threshold": float(self.threshold),
            "provenance": self.provenance,
            "hash": self.hash,
        }
        try:
            with replacing(Path(path)) as file:
                file.write(safetensors.torch.save(tensors, {METADATA_KEY: _canonical_json(about)}))
        except OSError as error:
            raise ModelError(
                f"Model file {path} can't be written ({error}). Check the folder and disk space."
            ) from error

    def check_belief(self, path: str | os.PathLike[str], **asked: object) -> None:
        """Raise a UsageError if an option says otherwise of this model, which is from `path`."""
        found = {
            "model": self.network.name,
            "f": self.network.kwargs.get("f"),
            "img_dim": self.network.dim,
            "preprocess": self.preprocess.to_dict()["name"],
        }
        for name, value in asked.items():
            if value is not None and value != found[name]:
                raise UsageError(
                    f"--{name} is {value}, but {path} has {found[name]}. Leave --{name} out: the "
                    "model file knows."
                )

    @property
    def curve(self) -> OperatingCurve:
        """The validation curve that `train` stored; a UsageError if there is none."""
        stored = self.provenance.get(CURVE)
        if stored is None:
            raise UsageError(
                f"The model (hash {self.hash}) has no validation curve, so it can't tell recall or "
                "precision. Train it with this program, or ask for a threshold such as 0.5, "
                "keep=0.6 or count=50000."
            )
        return OperatingCurve.from_dict(stored)


def _refuse_nonsense(network: Network) -> None:
    """Raise a ModelError if weights are no numbers, or none that can be computed with."""
    for name, tensor in network.state_dict().items():
        if not (torch.isfinite(tensor).all() and tensor.abs().amax() <= LARGEST_WEIGHT):
            raise ModelError(
                f"The model's tensor {name} holds NaN, infinity or values above "
                f"{LARGEST_WEIGHT:g}. The file is damaged, or its training went wrong; train again."
            )
        if name.endswith(("variance", "running_var")) and tensor.amin() < 0:
            raise ModelError(
                f"The model's tensor {name} holds a negative variance. The file is damaged; copy "
                "it again, or train again."
            )
    shape = 2, network.channels, network.dim, network.dim
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(network.device)
    with torch.inference_mode():
        logits = network.eval()(noise)
    if not torch.isfinite(logits).all():
        raise ModelError(
            "The model's scores of an image of noise are no numbers: its weights are too large. "
            "The file is damaged, or its training went wrong; train again."
        )


def _canonical_json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file (safetensors, or Keras .h5 of the 2020 program).

    Raises
    ------
    ModelError
        If the file is missing or can't be used; the message says why and what to do.
    """
    path = require_file(path)
    if is_keras(path):
        return import_keras(path)
    metadata, shapes = _read_safetensors(path)
    try:
        _checked(metadata)
        network = build_network(metadata["network"]["name"], **metadata["network"]["kwargs"])
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        kinds = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        for name in (*expected, *sorted(shapes.keys() - expected)):
            if shapes.get(name) != expected.get(name):
                needs = f"needs tensor {name} of shape {expected.get(name)}"
                raise ModelError(
                    f"network {network.name} {network.kwargs} "
                    f"{needs if name in expected else f'has no tensor {name}'}, found "
                    f"{shapes.get(name, 'nothing')}. The file is damaged or was edited; copy it "
                    "again, or train or convert the model again."
                )
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in shapes}
        for name, tensor in tensors.items():
            if tensor.dtype != kinds[name]:
                raise ModelError(
                    f"its tensor {name} holds {tensor.dtype}; expected {kinds[name]}. The "
                    "file was edited; copy it again, or train or convert the model again."
                )
        network.load_state_dict(tensors)
        model = Model(
            network=network,
            preprocess=preprocess_from_dict(metadata["preprocess"]),
            threshold=metadata["threshold"],
            temperature=metadata["temperature"],
            provenance=metadata["provenance"],
        )
        if metadata.get("hash", model.hash) != model.hash:
            raise ModelError(
                f"its weights have the hash {model.hash}, but it was written with that of "
                f"{metadata['hash']}. The file is damaged or was edited; copy it again."
            )
        return model
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"{path}: the model's metadata is incomplete or damaged ({error!r}). "
            "Copy the file again, or train or convert the model again."
        ) from error


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a file if the types are right of what is read of it later."""
    for key in ("threshold", "temperature"):
        if type(metadata[key]) not in (int, float):
            raise TypeError(f"{key} is {metadata[key]!r:.40}")
    value = metadata["provenance"]
    lists = {"pixel_sizes_angstrom": (int, float), "boxes_px": (int, float), "seen": (str,)}
    for key, kinds in lists.items():
        for item in value.get(key) or []:
            if type(item) not in kinds:
                raise TypeError(f"{key} holds {item!r:.40}")
    for key, interval in (value.get(ESTIMATE) or {}).items():
        if not all(end is None or type(end) in (int, float) for end in interval):
            raise TypeError(f"{ESTIMATE} holds {key!r:.40}")
    if value.get(CURVE) is not None:
        OperatingCurve.from_dict(value[CURVE])
    return metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return our metadata and the tensors' shapes of a model file, or say why it is none."""
    try:
        check_model_header(path)
        with safe_open(str(path), framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        kind = kind_of_file(path)
        if kind not in (None, MODEL):
            raise ModelError(f"{path}: expected a model, but this is {kind}") from error
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}). Expected a model made by "
            "`relion_cryofilter train` or `convert`, or Keras .h5. If it is one, copy it again."
        ) from error
    if text is None:
        raise ModelError(
            f"{path} is a safetensors file, but not a model of relion_cryofilter (no "
            f"{METADATA_KEY!r} entry in its metadata). Give a file made by "
            "`relion_cryofilter train` or `convert`."
        )
    try:
        metadata = parse_json(text)
        newer = metadata["format_version"] > FORMAT_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: the model's metadata can't be read ({error!r}). Copy the file again."
        ) from error
    if newer:
        raise ModelError(
            f"{path} has model format {metadata['format_version']} (written by relion_cryofilter "
            f"{metadata.get('package_version', 'unknown')}); this is {__version__}, which "
            f"reads up to format {FORMAT_VERSION}. Update relion_cryofilter."
        )
    return metadata, shapes


def import_keras(path: str | os.PathLike[str], **believed: Any) -> Model:
    """Read a Keras .h5 file of the 2020 program, from ``save_weights`` or ``model.save``.

    `believed` are ``network``, ``f`` and ``dim`` of `keras.read_keras`, which raises ModelError.
    The model has the 2020 preprocessing, threshold 0.5 and the file's SHA-256 in its provenance.
    """
    path = require_file(path)
    network, preprocess = read_keras(path, **believed)
    provenance = {
        "origin": "imported from a Keras .h5 file",
        "file": path.name,
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    try:
        return Model(network, preprocess, threshold=0.5, provenance=provenance)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Models:
    """One or more models whose scores are averaged."""

    members: tuple[Model, ...]
    names: tuple[str, ...]  # what each is called in the log: its file, or ``bundled``

    def __iter__(self) -> Iterator[Model]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def hashes(self) -> str:
        """The members' hashes, separated by spaces."""
        return " ".join(model.hash for model in self)

    @property
    def adapted(self) -> bool:
        """Whether they were adapted to a set without labels, see `nn.adaptation`."""
        return any(ADAPTED in model.provenance for model in self)

    def describe(self) -> str:
        """Return names, networks and hashes, for the log."""
        return "; ".join(
            f"{name} ({model.network.name}, {model.network.dim} px, hash {model.hash})"
            for name, model in zip(self.names, self)
        )

    def check(self, particles: ParticleSet, request: ThresholdRequest | None = None) -> None:
        """Look, before images are read, at whether the models fit particles and request.

        A pixel size more than 10 % from that of the training is a warning; a recall or precision
        that a model can't answer is a UsageError.
        """
        # One line for all optics groups in use that are off, and for all models of one training.
        trainings: dict[tuple[tuple[float, ...], str], list[str]] = {}
        for model in self:
            sizes = tuple(model.provenance.get("pixel_sizes_angstrom") or ())
            boxes = ", ".join(map(str, model.provenance.get("boxes_px", [])))
            trainings.setdefault((sizes, boxes), []).append(model.hash)
        for (trained, boxes), hashes in trainings.items():
            off: dict[str, tuple[float, float]] = {}
            for group in particles.optics_used:
                size = group.pixel_size_angstrom
                if size is not None and trained:
                    away, nearest = min((abs(known / size - 1), known) for known in trained)
                    if away > PIXEL_SIZE_TOLERANCE:
                        off[group.name] = size, nearest
            if off:
                name, (size, nearest) = next(iter(off.items()))
                span = [f"{edge(s for s, _ in off.values()):.3g}" for edge in (min, max)]
                others = (
                    f" (and {len(off) - 1:,} more: {' to '.join(span)})" if len(off) > 1 else ""
                )
                log.warning(
                    "The model (hash %s) was trained at %.3g Å/px (box %s px), but optics "
                    "group %s has %.3g Å/px%s. Its scores may be poor: train at this pixel size, "
                    "or extract with the box and pixel size of the training.",
                    ", ".join(hashes), nearest, boxes, name, size, others,
                )  # fmt: skip
        if request is not None and request.kind in OF_LABELS:
            for model in self:
                model.curve.threshold(request)

    def threshold(self, request: ThresholdRequest | None, scores: np.ndarray) -> tuple[float, str]:
        """Return the threshold that a request means, and where it is from, for the log.

        Without a request it is the models' own. Their validation curves answer requests for recall
        or precision (several are averaged); `scores` (n,), those to keep a share or a number.
        """
        first = self.members[0]
        if request is None:
            known = first.provenance.get(ESTIMATE, {}) if len(self) == 1 else {}
            said = [
                f"{name} {Interval(*(np.nan if end is None else end for end in known[name]))}"
                for name in ("recall", "precision")
                if name in known
            ]
            folds = "folds" in first.provenance
            where = "out of fold, against the labels," if folds else "on its validation particles"
            estimate = f"; {where} {', '.join(said)}" if said else ""
            return _mean([model.threshold for model in self]), f"the model's own{estimate}"
        if request.kind not in OF_LABELS:
            return threshold_and_reason(request, scores)
        threshold = _mean([model.curve.threshold(request) for model in self])
        if len(self) > 1:
            return threshold, (
                f"{request.reason}, roughly: the mean of the thresholds of {len(self)} models; "
                "metrics on labelled particles tells what it gives"
            )
        simulated = ", of simulated particles" if SIMULATED in first.provenance else ""
        return threshold, f"{request.reason}; {first.curve.describe(threshold)}{simulated}"

    def choose(
        self, scores: np.ndarray, request: ThresholdRequest | None, bad: np.ndarray | None = None
    ) -> Chosen:
        """Accept and reject by ``--threshold``; the rows in `bad` are never accepted."""
        values = np.round(scores, DECIMALS)
        threshold, reason = self.threshold(request, values)
        accepted = values >= threshold
        if bad is not None:
            accepted[bad] = False
        return Chosen(values, accepted, threshold, reason)


def read_models(
    paths: Sequence[str | os.PathLike[str] | Model] = (),
    *,
    precision: str = "float32",
    network: str | None = None,
    f: int | None = None,
    img_dim: int | None = None,
) -> Models:
    """Read model files, or the bundled model if none is named.

    Parameters
    ----------
    paths
        Files of safetensors or Keras .h5; models are taken as they are.
    precision
        ``float32`` or ``bf16``.
    network, f, img_dim
        What the caller believes of each model: a check; a Keras file may not tell its image size.

    Raises
    ------
    ModelError, UsageError
        A file is missing or is no model, or it contradicts what is believed.
    """
    models = []
    for path in paths or (BUNDLED_MODEL,):
        if isinstance(path, Model):
            model = path
        elif is_keras(require_file(path)):
            model = import_keras(path, network=network, f=f, dim=img_dim)
        else:
            model = load_model(path)
            model.check_belief(path, model=network, f=f, img_dim=img_dim)
        if precision != "float32":  # which leaves a given model's own as it is
            model = replace(model, precision=PRECISIONS[precision])
        models.append(model)
    names = tuple("given" if isinstance(path, Model) else str(path) for path in paths)
    return Models(tuple(models), names or ("bundled",))


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 6)

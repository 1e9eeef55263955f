"""One file = one model: weights, preprocessing, threshold, calibration and provenance.

The file is in safetensors format, with one metadata entry of JSON, so a stranger's model can't
run code. Keras .h5 files are handed to `relion_cryofilter.nn.keras`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relion_cryofilter.errors import ModelError
from relion_cryofilter.files import replacing
from relion_cryofilter.nn.network import Network
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.nn.preprocess import Preprocess, d4_views, preprocess_from_dict
from relion_cryofilter.nn.shrinking import filled_up

FORMAT_VERSION = 1
METADATA_KEY = "relion_cryofilter"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HASH_DIGITS = 12
GPU_BATCH = 512


@dataclass(frozen=True, eq=False)
class Model:
    """A network and all that is needed to use it.

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
        What the model was trained on, seeds, versions, pixel size (Å/px), box (px) and so on;
        must survive JSON.
    precision : torch.dtype
        Of the crop and the network's products, float32 or bfloat16; not part of the file.

    Raises
    ------
    ModelError
        If preprocessing and network don't fit together, or a number makes no sense.
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

    @property
    def hash(self) -> str:
        """Short hex SHA-256 of all that affects scores: weights, recipe, temperature."""
        digest = hashlib.sha256(_canonical_json(self._scoring_metadata()).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:HASH_DIGITS]

    def probabilities(self, small: Tensor, tta: bool = False) -> Tensor:
        """Return the scores of small images; safe to call from several threads at once.

        Parameters
        ----------
        small : Tensor
            Network input (n, channels, dim, dim), as `preprocess` makes it.
        tta : bool
            Test-time augmentation: the mean score of the eight flips and quarter turns; nothing
            to do for an equivariant network.

        Returns
        -------
        Tensor
            Scores (n,), 0 to 1, on the device of `small`. An image of NaN scores NaN.
        """
        return self._infer(small, tta, with_features=False)[0]

    def probabilities_and_features(self, small: Tensor, tta: bool = False) -> tuple[Tensor, Tensor]:
        """Return scores (n,) and features (n, feature_count) of the images as they stand."""
        return self._infer(small, tta, with_features=True)

    def to(self, device: str | torch.device) -> Model:
        """Return a copy of this model on `device`."""
        return replace(self, network=copy.deepcopy(self.network).to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file, complete or not at all.

        Raises
        ------
        ModelError
            If the file can't be written.
        """
        state = self.network.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metadata = {METADATA_KEY: _canonical_json(self._metadata())}
        try:
            with replacing(Path(path)) as file:
                file.write(safetensors.torch.save(tensors, metadata=metadata))
        except OSError as error:
            raise ModelError(
                f"Model file {path} can't be written ({error}). Check the folder and disk space."
            ) from error

    def _scoring_metadata(self) -> dict[str, Any]:
        return {
            "network": {"name": self.network.name, "kwargs": dict(self.network.kwargs)},
            "preprocess": self.preprocess.to_dict(),
            "temperature": float(self.temperature),
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "package_version": _package_version(),
            **self._scoring_metadata(),
            "threshold": float(self.threshold),
            "provenance": self.provenance,
        }

    def _infer(self, small: Tensor, tta: bool, with_features: bool) -> tuple[Tensor, Tensor]:
        if self.network.training:
            self.network.eval()
        device = self.network.device
        # Made outside inference mode, so that callers may change them in place.
        scores = torch.zeros(len(small), device=device)
        kept = self.network.feature_count if with_features else 0
        features = torch.empty(len(small), kept, device=device)
        reduced = torch.autocast(device.type, self.precision, self.precision != torch.float32)
        with torch.inference_mode(), reduced:
            step = self.network.micro_batch if device.type == "cpu" else GPU_BATCH
            for start in range(0, len(small), step):
                rows = slice(start, min(start + step, len(small)))
                count = rows.stop - start
                batch = filled_up(small[rows].to(device), step)
                logits, vectors = self.network.forward_with_features(batch)
                values = self._score(logits)
                if tta and not self.network.equivariant:
                    values = self._mean_over_views(batch, values)
                scores[rows] = values[:count]
                features[rows] = vectors[:count, :kept]
        return scores.to(small.device), features.to(small.device)

    def _mean_over_views(self, batch: Tensor, identity_scores: Tensor) -> Tensor:
        _, *views = d4_views(batch)
        scores = [self._score(self.network(view)) for view in views]
        return torch.stack([identity_scores, *scores]).mean(dim=0)

    def _score(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits.float() / self.temperature)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file (safetensors, or Keras .h5 of the 2020 program).

    Raises
    ------
    ModelError
        If the file is missing or can't be used; the message says why and what to do.
    """
    path = require_file(path)
    if is_keras(path):
        from relion_cryofilter.nn.keras import import_keras

        return import_keras(path)
    metadata, tensors = _read_safetensors(path)
    try:
        kind = metadata["network"]
        network = build_network(kind["name"], **kind["kwargs"])
        _load_tensors(network, tensors)
        return Model(
            network=network,
            preprocess=preprocess_from_dict(metadata["preprocess"]),
            threshold=metadata["threshold"],
            temperature=metadata["temperature"],
            provenance=metadata["provenance"],
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: the model's metadata is incomplete or damaged ({error!r}). "
            "Copy the file again, or train or convert the model again."
        ) from error


def require_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a file; raise ModelError if not."""
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path} is a folder; expected a model file (.safetensors or .h5).")
    if not path.is_file():
        raise ModelError(
            f"Model file {path} doesn't exist. Check the path; it is relative to {Path.cwd()}."
        )
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return our metadata and the tensors of a model file, or say why it is none."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
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
        metadata = json.loads(text)
        newer = metadata["format_version"] > FORMAT_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: the model's metadata can't be read ({error!r}). Copy the file again."
        ) from error
    if newer:
        raise ModelError(
            f"{path} has model format {metadata['format_version']} (written by relion_cryofilter "
            f"{metadata.get('package_version', 'unknown')}); this is {_package_version()}, which "
            f"reads up to format {FORMAT_VERSION}. Update relion_cryofilter."
        )
    return metadata, tensors


def _load_tensors(network: Network, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into the network, or say which of them doesn't fit."""
    expected = network.state_dict()
    cure = "The file is damaged or was edited; copy it again, or train or convert the model again."
    for name, tensor in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        if found != tuple(tensor.shape):
            raise ModelError(
                f"network {network.name} {network.kwargs} needs tensor {name} of shape "
                f"{tuple(tensor.shape)}, found {found}. {cure}"
            )
    if extra := sorted(set(tensors) - set(expected)):
        raise ModelError(
            f"network {network.name} {network.kwargs} has no tensor {extra[0]}, found it. {cure}"
        )
    network.load_state_dict(tensors)


def is_keras(path: Path) -> bool:
    with path.open("rb") as file:
        signed = file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE
    return signed or path.suffix.lower() in (".h5", ".hdf5")


def _canonical_json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _package_version() -> str:
    import relion_cryofilter

    return str(getattr(relion_cryofilter, "__version__", "unknown"))

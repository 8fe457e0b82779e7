"""A calibration folder: what the sweep writes, and what pruning, quantization and the KV scales read.

``calibration.json`` holds the model, the samples, the pruning decided on the way (if any) and the ranges of K and V;
``importance.safetensors`` the second moments of every linear layer's inputs, by weight name; ``saliency.safetensors``
the sums from which experts are ranked; ``hessians/`` (only with ``--hessians``) the inputs' second-moment matrices.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.dtypes import Float32Array
from step128_checkpoint.errors import CheckpointError, InputNotFoundError
from step128_checkpoint.files import read_json_object, reading
from step128_checkpoint.header import read_header
from step128_checkpoint.reader import Checkpoint

CALIBRATION_NAME = "calibration.json"
IMPORTANCE_NAME = "importance.safetensors"
SALIENCY_NAME = "saliency.safetensors"
HESSIANS_FOLDER = "hessians"
FORMAT, FORMAT_VERSION = "step128-calibration", 1

_SALIENCY_TENSOR = re.compile(r"layers\.([0-9]{1,9})\.(tokens|gated_norm_sum|norm_sum|max_activation)")
_SALIENCY_DTYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4"}


@dataclass(frozen=True)
class LayerSaliency:
    """Sums over the calibration tokens of one MoE layer, each array [E] by original expert number.

    ``tokens``: routed to the expert. ``gated_norm_sum``: of g(x)·‖f(x)‖₂, g renormalised over the chosen experts.
    ``norm_sum``: of ‖f(x)‖₂. ``max_activation``: largest |f(x)| of any channel.
    """

    tokens: NDArray[np.int64]
    gated_norm_sum: NDArray[np.float64]
    norm_sum: NDArray[np.float64]
    max_activation: Float32Array


@dataclass(frozen=True)
class KvRange:
    """Of one layer: largest |K| (after norm and RoPE, as cached) and |V| over the calibration tokens."""

    k_absmax: float
    v_absmax: float


@dataclass(frozen=True)
class Calibration:
    """An opened calibration folder. ``document`` is calibration.json as it stands."""

    folder: Path
    document: dict[str, Any]

    @property
    def importance_path(self) -> Path:
        """The safetensors file of second moments: weight name -> F32 [K], or [E, K] for experts."""
        return self.folder / IMPORTANCE_NAME

    @property
    def sha256(self) -> str:
        """Names what was measured, of what, on what; not when, how fast, or by which versions."""
        measured = {key: self.document.get(key) for key in ("checkpoint", "samples", "pruned", "kv", "files")}
        return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()

    @property
    def kept_experts(self) -> dict[int, tuple[int, ...]] | None:
        """Original numbers of the experts that each MoE layer kept, if the sweep pruned; else None."""
        pruned = self.document.get("pruned")
        if pruned is None:
            return None
        return {int(layer): tuple(experts) for layer, experts in pruned["kept_experts"].items()}

    @property
    def kv_ranges(self) -> dict[int, KvRange]:
        """Ranges of K and V by layer, the MTP layers' included."""
        layers = self.document["kv"]["layers"]
        return {int(n): KvRange(float(row["k_absmax"]), float(row["v_absmax"])) for n, row in layers.items()}

    def saliency(self) -> dict[int, LayerSaliency]:
        """Read the saliency sums of every MoE layer.

        Raises:
            CheckpointError: the file is missing or incomplete.
        """
        path = self.folder / SALIENCY_NAME
        found: dict[int, dict[str, NDArray[Any]]] = {}
        with Checkpoint(self.folder, {}, read_header(path)) as source:
            for name, tensor in source.tensors.items():
                match = _SALIENCY_TENSOR.fullmatch(name)
                if match is None or tensor.dtype not in _SALIENCY_DTYPES or len(tensor.shape) != 1:
                    raise CheckpointError(f"{path}: tensor {name} is not one that `calibrate` writes")
                values = np.frombuffer(source.read(name), dtype=_SALIENCY_DTYPES[tensor.dtype])
                found.setdefault(int(match[1]), {})[match[2]] = values
        try:
            return {layer: LayerSaliency(**parts) for layer, parts in sorted(found.items())}
        except TypeError as error:
            raise CheckpointError(f"{path}: incomplete: {error}. Calibrate again.") from error


def open_calibration(folder: Path) -> Calibration:
    """Open a finished calibration folder.

    Raises:
        InputNotFoundError: there is none.
        CheckpointError: it is unfinished, or of another format.
    """
    path = folder / CALIBRATION_NAME
    if not path.is_file():
        unfinished = folder.with_name(folder.name + ".partial").is_dir()
        hint = (
            "its calibration is unfinished: run the same `calibrate` command again" if unfinished else "run `calibrate`"
        )
        raise InputNotFoundError(f"{folder}: holds no {CALIBRATION_NAME}; {hint}")
    document = read_json_object(path)
    if (document.get("format"), document.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path}: not a calibration of format {FORMAT} version {FORMAT_VERSION}")
    calibration = Calibration(folder, document)
    try:
        _ = calibration.kv_ranges, document["checkpoint"]["headers_sha256"], document["checkpoint"]["name"]
        _check_pruned(calibration)
        _check_held_out(document["kv"]["layers"])
        sha256: dict[str, str] = document["files"]
        damaged = [name for name in (IMPORTANCE_NAME, SALIENCY_NAME) if file_sha256(folder / name) != sha256[name]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}). Calibrate again.") from error
    if damaged:
        raise CheckpointError(f"{folder / damaged[0]}: not as `calibrate` left it. Calibrate again.")
    return calibration


def _check_pruned(calibration: Calibration) -> None:
    """Raise a KeyError, TypeError or ValueError where what a sweep decided is incomplete or contradicts itself."""
    kept = calibration.kept_experts
    if kept is None:
        return
    pruned = calibration.document["pruned"]
    if not isinstance(pruned["criterion"], str):
        raise TypeError("pruned.criterion must be a name")
    if type(pruned["keep"]) is not int or any(len(experts) != pruned["keep"] for experts in kept.values()):
        raise ValueError("pruned.keep is not the number of experts that each layer kept")
    if any(len(pair) != 2 for pair in pruned["super_experts"]):
        raise ValueError("pruned.super_experts must be pairs of layer and expert")
    if any(type(expert) is not int for pair in (*kept.values(), *pruned["super_experts"]) for expert in pair):
        raise TypeError("experts must be numbers")


def _check_held_out(layers: dict[str, Any]) -> None:
    """The same for the overflows counted on held-out samples, in every layer at the same headrooms."""
    headrooms = set()
    for row in layers.values():
        found, over = row["held_out"], (row["held_out"]["k_over"], row["held_out"]["v_over"])
        if any(type(count) is not int for count in (found["values"], *over[0].values(), *over[1].values())):
            raise TypeError("held_out must hold counts")
        headrooms.add(tuple(map(tuple, over)))
    if len(headrooms) > 1:
        raise ValueError("held_out differs in its headrooms from layer to layer")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        InputNotFoundError, PermissionDeniedError: it is missing, or may not be read.
    """
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hessian_key(weight_name: str) -> str:
    """Name of the input of a linear layer, under which ``hessians/`` holds its second-moment matrix [K, K].

    Layers that read the same input share one: q, k and v; gate and up; and, since experts see subsets of one layer's
    tokens, the gate and up matrices of all experts and of the shared expert. A routed expert's down_proj has its own
    (``[E, K, K]`` in one tensor).
    """
    stem = weight_name.removesuffix(".weight")
    for shared in ("q_proj", "k_proj", "v_proj"):
        stem = stem.replace(f"self_attn.{shared}", "self_attn.input")
    if ".moe." in stem or ".share_expert." in stem:
        return re.sub(r"\.(moe|share_expert)\.(gate|up)_proj$", ".moe.input", stem)
    return re.sub(r"\.mlp\.(gate|up)_proj$", ".mlp.input", stem)

"""The FP8 KV-cache scales of a checkpoint: which layers must have them, and their values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from step128_checkpoint.reader import Checkpoint

KV_SCALE = re.compile(r"model\.layers\.[0-9]+\.self_attn\.(?:k_proj\.k|v_proj\.v)_scale")


@dataclass(frozen=True)
class KvScales:
    """Range of the scales; ``layers`` counts the layers that have any."""

    layers: int
    k_min: float
    k_max: float
    v_min: float
    v_max: float


def kv_scale_problems(checkpoint: Checkpoint, num_hidden_layers: int, num_mtp_layers: int) -> list[str]:
    """Say which scales are missing or of a wrong type, from the headers alone.

    The trunk has a K and a V scale for every layer or none at all; so do the MTP layers, which may go without where the
    trunk has them, but not the other way round.
    """
    found = {name: tensor for name, tensor in checkpoint.tensors.items() if KV_SCALE.fullmatch(name)}
    trunk = _names(range(num_hidden_layers))
    mtp = _names(range(num_hidden_layers, num_hidden_layers + num_mtp_layers))
    problems = []
    for kind, names, needed in (
        ("trunk", trunk, bool(found)),
        ("MTP", mtp, any(name in found for name in mtp)),
    ):
        if needed and (missing := [name for name in names if name not in found]):
            problems.append(
                f"{checkpoint.folder}: KV scales are incomplete: {missing[0]} is missing ({len(missing)} of "
                f"{len(names)} in the {kind} layers). Calibrate again, or take all of them out."
            )
    known = {*trunk, *mtp}
    for name, tensor in found.items():
        if name not in known:
            problems.append(f"{tensor.path}: tensor {name} belongs to a layer that this model does not have")
        if tensor.dtype != "F32" or tensor.shape != (1,):
            problems.append(f"{tensor.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}; F32 [1] is needed")
    return problems


def read_kv_scales(checkpoint: Checkpoint, problems: list[str]) -> KvScales | None:
    """Read the scales that are well-formed (the checkpoint's files are open); None if K or V has none.

    Those that are not positive numbers are added to ``problems``.
    """
    values: dict[str, list[float]] = {"k_scale": [], "v_scale": []}
    layers = set()
    for name, tensor in checkpoint.tensors.items():
        if not KV_SCALE.fullmatch(name) or tensor.dtype != "F32" or tensor.shape != (1,):
            continue
        value = float(np.frombuffer(checkpoint.read(name), dtype="<f4")[0])
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{tensor.path}: tensor {name} is {value}; a positive scale is needed")
        values[name.rpartition(".")[2]].append(value)
        layers.add(name.split(".")[2])
    k, v = values["k_scale"], values["v_scale"]
    return KvScales(len(layers), min(k), max(k), min(v), max(v)) if k and v else None


def _names(layers: range) -> list[str]:
    return [f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in layers for p in "kv"]

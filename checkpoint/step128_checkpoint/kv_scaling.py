"""FP8 KV-cache scales from calibrated ranges: ``model-kvscales.safetensors``, as vLLM loads them.

scale = largest |x| seen * headroom / 448 (E4M3's largest number), so that values up to headroom times what calibration
saw are stored without clipping. E4M3 is a floating-point type: headroom costs no precision until it reaches the
subnormals, many octaves further down.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from step128_checkpoint.calibration.result import Calibration
from step128_checkpoint.dtypes import Float32Array, to_float32
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.kv_scales import KV_SCALE
from step128_checkpoint.layout import OutputTensor
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.shards import Step

E4M3_MAX = 448.0
K_HEADROOM, V_HEADROOM = 1.15, 1.25
KV_SCALES_FILE = "model-kvscales.safetensors"
_BOUND_SLACK = 1.02  # bfloat16 rounds K three times on its way to the cache, by at most 2^-8 each


@dataclass(frozen=True)
class KvScalePlan:
    """Which KV scales a product gets: the input's, if it has any; calibrated ones (``values`` by name); or none.

    ``report`` is what the product's report says of them (JSON values).
    """

    source: Literal["input", "calibrated", "none"]
    values: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What of this decides the product's bytes, as JSON values."""
        if self.source != "calibrated":
            return {"kv_scales": self.source}
        text = json.dumps(sorted(self.values.items()))
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        return {"kv_scales": self.source, "kv_headroom": self.report.get("headroom"), "kv_scales_sha256": sha256}

    def steps(self) -> list[Step]:
        """Steps that write the calibrated scales, float32 [1] each, into a file of their own."""
        return [_step(name, value) for name, value in self.values.items()]


KEEP_KV_SCALES = KvScalePlan("input", report={"source": "input"})


def kv_scales(
    checkpoint: Checkpoint, calibration: Calibration, k_headroom: float = K_HEADROOM, v_headroom: float = V_HEADROOM
) -> dict[str, float]:
    """Scale of every layer's K and V by tensor name; MTP layers that the checkpoint lacks are left out.

    Raises:
        CheckpointError: a layer was not calibrated, saw nothing but zeros, or its K is larger than the checkpoint's own
            norm allows, that is, the calibration is of another model.
    """
    ranges = calibration.kv_ranges
    if missing := [layer for layer in range(checkpoint.num_hidden_layers) if layer not in ranges]:
        raise CheckpointError(f"{calibration.folder}: no range of K and V for layer {missing[0]}. Calibrate again.")
    scales: dict[str, float] = {}
    with checkpoint:
        for layer, found in sorted(ranges.items()):
            prefix = f"model.layers.{layer}.self_attn"
            if f"{prefix}.k_norm.weight" not in checkpoint.tensors:
                continue
            if not (found.k_absmax > 0 and found.v_absmax > 0):
                raise CheckpointError(f"{calibration.folder}: K or V of layer {layer} was 0 throughout calibration")
            bound = k_bound(checkpoint, layer)
            if found.k_absmax > bound * _BOUND_SLACK:
                raise CheckpointError(
                    f"{calibration.folder}: K of layer {layer} reached {found.k_absmax:.4g}, but its norm allows no "
                    f"more than {bound:.4g}: the calibration is of another model. Calibrate this one."
                )
            scales[f"{prefix}.k_proj.k_scale"] = found.k_absmax * k_headroom / E4M3_MAX
            scales[f"{prefix}.v_proj.v_scale"] = found.v_absmax * v_headroom / E4M3_MAX
    return scales


def k_bound(checkpoint: Checkpoint, layer: int) -> float:
    """Largest |K| that a layer can produce: sqrt(head_dim) * max |1 + w| over its k_norm weight w (files are open).

    RMSNorm gives a vector of norm sqrt(head_dim) before its weight (zero-centred in Step-3.7), and RoPE turns pairs of
    channels, which keeps the norm of each; a channel cannot be larger than the whole vector.
    """
    weight = _read(checkpoint, f"model.layers.{layer}.self_attn.k_norm.weight")
    return math.sqrt(weight.size) * float(np.abs(1.0 + weight).max())


def plan_kv_scales(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    wanted: Literal["auto", "keep", "calibrated", "none"],
    k_headroom: float | None,
    v_headroom: float | None,
    input_first: bool = False,
) -> KvScalePlan:
    """Decide where a product's KV scales come from.

    Args:
        checkpoint: the input.
        calibration: of the product's layers, if there is one.
        wanted: ``auto`` takes calibrated ones if there is a calibration (with ``input_first``: the input's, if it has
            any), else the input's.
        k_headroom: of calibrated ones; None for the default.
        v_headroom: likewise.
        input_first: see ``wanted``.

    Raises:
        ConfigurationError: calibrated ones are wanted and there is no calibration, or a headroom is given for scales
            that are not made here.
        CheckpointError: see :func:`kv_scales`.
    """
    if wanted == "calibrated" and calibration is None:
        raise ConfigurationError("--kv-scales calibrated needs a calibration: --calibration DIR")
    keeps = calibration is None or wanted == "keep" or (wanted == "auto" and input_first and has_kv_scales(checkpoint))
    if wanted != "none" and not keeps and calibration is not None:
        headroom = {"k": k_headroom or K_HEADROOM, "v": v_headroom or V_HEADROOM}
        values = kv_scales(checkpoint, calibration, headroom["k"], headroom["v"])
        report = {"source": "calibrated", "headroom": headroom, "held_out_overflows": overflow_summary(calibration)}
        return KvScalePlan("calibrated", values, report)
    if k_headroom or v_headroom:
        raise ConfigurationError(
            "--k-headroom and --v-headroom are of calibrated KV scales, and none are made here: the input's are kept, "
            "or none are wanted. Leave them out, or add --kv-scales calibrated."
        )
    return KvScalePlan("none", report={"source": "none"}) if wanted == "none" else KEEP_KV_SCALES


def has_kv_scales(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint brings scales of its own."""
    return any(KV_SCALE.fullmatch(name) for name in checkpoint.tensors)


def overflow_summary(calibration: Calibration) -> dict[str, Any]:
    """What headroom buys on text that calibration did not see: layers and values beyond E4M3's range, by headroom.

    Returns ``{"k": {"1": {"layers", "values"}, ...}, "v": {...}, "layers", "values"}``; ``values`` counts one kind.
    """
    layers: dict[str, Any] = calibration.document["kv"]["layers"]
    held_out = [row["held_out"] for row in layers.values() if row["held_out"]["values"]]
    summary: dict[str, Any] = {"layers": len(held_out), "values": sum(row["values"] for row in held_out)}
    for kind in "kv":
        headrooms: Iterable[str] = held_out[0][f"{kind}_over"] if held_out else ()
        summary[kind] = {
            headroom: {
                "layers": sum(row[f"{kind}_over"][headroom] > 0 for row in held_out),
                "values": sum(row[f"{kind}_over"][headroom] for row in held_out),
            }
            for headroom in headrooms
        }
    return summary


def overflow_sentence(calibration: Calibration) -> str:
    """For people: in how many layers held-out text left E4M3's range, by headroom over what calibration saw."""
    found = overflow_summary(calibration)
    if not found["layers"]:
        return "KV cache: no held-out samples, so overflows were not counted"
    kinds = (
        f"{kind.upper()} "
        + ", ".join(f"{row['layers']} at headroom {headroom}" for headroom, row in found[kind].items())
        for kind in "kv"
    )
    return f"KV cache, layers of {found['layers']} with overflows on held-out samples: {'; '.join(kinds)}"


def _read(checkpoint: Checkpoint, name: str) -> Float32Array:
    tensor = checkpoint.tensors[name]
    return to_float32(checkpoint.read(name), tensor.dtype, tensor.shape)


def _step(name: str, value: float) -> Step:
    def produce(number: int) -> tuple[bytes]:
        return (np.asarray([value], dtype="<f4").tobytes(),)

    return Step((OutputTensor(name, "F32", (1,), KV_SCALES_FILE),), 1, produce)

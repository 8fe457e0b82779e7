"""What an FP8 KV cache does to K and V, done to them in place: the cache itself is not needed to know it."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.reader import Checkpoint

KvCache = Literal["bf16", "fp8", "fp8-unit"]
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)

_LARGEST = 448.0  # of e4m3


class Fp8Cache:
    """Stands where transformers expects a cache; gives K and V back as they would be read from FP8 pages."""

    def __init__(self, scales: dict[int, tuple[float, float]]) -> None:
        """``scales``: layer -> of K and of V."""
        self._scales = scales

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """K and V [B, heads, T, head_dim] of one layer, rounded."""
        k_scale, v_scale = self._scales[layer]
        return round_to_fp8(key, k_scale), round_to_fp8(value, v_scale)


def round_to_fp8(values: Tensor, scale: float) -> Tensor:
    """Round as a store into FP8 pages and a read from them do: x / scale, clamped to +-448, to e4m3, times scale.

    As vLLM's cache kernels and ours clamp (:mod:`step128_kernels.attention.reference`); the type stays that of
    ``values``.
    """
    stored = (values.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return (stored.float() * scale).to(values.dtype)


def fp8_cache(checkpoint: Checkpoint, kind: KvCache) -> Fp8Cache | None:
    """The cache of that kind for a checkpoint whose files are open; None for ``bf16``, which changes nothing here.

    Raises:
        CheckpointError: ``fp8`` is asked for and a layer has no scales.
    """
    if kind == "bf16":
        return None
    layers = range(checkpoint.num_hidden_layers)
    if kind == "fp8-unit":
        return Fp8Cache(dict.fromkeys(layers, (1.0, 1.0)))
    return Fp8Cache({layer: (_scale(checkpoint, layer, "k"), _scale(checkpoint, layer, "v")) for layer in layers})


def _scale(checkpoint: Checkpoint, layer: int, kind: str) -> float:
    name = f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"
    tensor = checkpoint.tensors.get(name)
    if tensor is None or tensor.dtype != "F32" or tensor.elements != 1:
        raise CheckpointError(
            f"{checkpoint.folder}: layer {layer} has no usable {kind.upper()} scale ({name}). Evaluate with "
            "--kv-cache fp8-unit, or calibrate first."
        )
    return float(np.frombuffer(checkpoint.read(name), dtype="<f4")[0])

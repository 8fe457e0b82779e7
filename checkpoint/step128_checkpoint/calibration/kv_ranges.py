"""How large K and V get in one layer, seen where a KV cache would store them: K after norm and RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PERCENTILES = (99.0, 99.9, 99.99)
HEADROOMS = {"k": (1.0, 1.15, 2.0), "v": (1.0, 1.25, 2.0)}
"""Multiples of the calibration's largest value, over which held-out values are counted."""

# A float32's upper half is a bfloat16: 32768 magnitudes, 128 in each octave. So the histogram is exact for bfloat16.
_BINS, _SHIFT = 1 << 15, 16


class KvRanges:
    """Takes the place of a cache in ``run_layer`` and hands K and V on unchanged.

    ``real`` selects the positions [B * T] that count (None: all). With ``held_out`` set, values are counted against
    the largest value of the calibration, which must have been seen by then.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing seen."""
        self.real: Tensor | None = None
        self.held_out = False
        self._seen = {kind: _Seen(device, HEADROOMS[kind]) for kind in "kv"}

    def update(self, k: Tensor, v: Tensor, layer_number: int) -> tuple[Tensor, Tensor]:
        """Count k and v, each ``[B, KV heads, T, head_dim]``."""
        for kind, values in (("k", k), ("v", v)):
            magnitudes = values.detach().transpose(1, 2).flatten(0, 1).abs()
            magnitudes = (magnitudes if self.real is None else magnitudes[self.real]).to(torch.float32).flatten()
            if len(magnitudes):
                self._seen[kind].add(magnitudes, self.held_out)
        return k, v

    @property
    def result(self) -> dict[str, Any]:
        """The layer's entry in calibration.json. Percentiles are of |value|, rounded down to 8 significant bits."""
        k, v = self._seen["k"], self._seen["v"]
        return {
            "k_absmax": float(k.largest),
            "v_absmax": float(v.largest),
            "k_percentiles": k.percentiles,
            "v_percentiles": v.percentiles,
            "held_out": {
                "values": k.held_out_values,
                "k_absmax": float(k.held_out_largest),
                "v_absmax": float(v.held_out_largest),
                "k_over": k.over,
                "v_over": v.over,
            },
        }


class _Seen:
    def __init__(self, device: torch.device, headrooms: tuple[float, ...]) -> None:
        self.largest, self.held_out_largest = torch.zeros(2, device=device).unbind()
        self.held_out_values = 0
        self._headrooms = headrooms
        self._over = torch.zeros(len(headrooms), dtype=torch.int64, device=device)
        self._histogram = torch.zeros(_BINS, dtype=torch.int64, device=device)

    def add(self, magnitudes: Tensor, held_out: bool) -> None:
        if held_out:
            self.held_out_largest = torch.maximum(self.held_out_largest, magnitudes.amax())
            self.held_out_values += len(magnitudes)
            for i, headroom in enumerate(self._headrooms):
                self._over[i] += (magnitudes > self.largest * headroom).sum()
        else:
            self.largest = torch.maximum(self.largest, magnitudes.amax())
            self._histogram += torch.bincount(magnitudes.view(torch.int32) >> _SHIFT, minlength=_BINS)

    @property
    def over(self) -> dict[str, int]:
        return {f"{headroom:g}": count for headroom, count in zip(self._headrooms, self._over.tolist(), strict=True)}

    @property
    def percentiles(self) -> dict[str, float]:
        cumulative = self._histogram.cumsum(0).cpu().to(torch.float64)
        wanted = torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * cumulative[-1]
        bins = torch.searchsorted(cumulative, wanted).to(torch.int32)
        values = (bins << _SHIFT).view(torch.float32).tolist()
        return {f"{percentile:g}": value for percentile, value in zip(PERCENTILES, values, strict=True)}

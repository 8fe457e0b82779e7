"""What a kernel launch is, with no tensor and no GPU: enough to compile it, to count its work and to tune it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pointer:
    """A tensor argument: its element type in Triton's spelling ("i64", "bf16", "fp16", "fp32", "i32", …) and size."""

    dtype: str
    size_bytes: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what compiling it and counting its work need, with no tensor and no GPU."""

    name: str
    """For people, such as "nl4_gemm_decode"."""
    function: Any
    """The ``triton.JITFunction``."""
    pointers: Mapping[str, Pointer]
    """Run-time pointer arguments by name, in any order."""
    scalars: Mapping[str, int | float]
    """Run-time integer and float32 arguments, with the values of this launch."""
    constants: Mapping[str, Any]
    """``tl.constexpr`` arguments."""
    grid: tuple[int, int, int]
    """Programs along x, y, z."""
    num_warps: int
    num_stages: int = 1
    waves_per_eu: int = 0
    loads: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    """What scalar loads find, by pointer argument: one integer for every element, or the elements in order.

    Needed only where control flow depends on memory (an expert number below zero, a count of padded tokens);
    counting the launch says which pointer is missing.
    """


@dataclass(frozen=True)
class KernelCase:
    """All launches of one call of an operator with one config, pre-passes and reductions included."""

    kernel: str
    """"nl4_gemm", "nl4_moe", "attention_fp8" or "attention_bf16" (the KV cache's dtype)."""
    phase: str
    """"decode" or "prefill"."""
    arch: str
    """"gfx1201" or "gfx1151"."""
    shape: Mapping[str, int]
    """Such as {"M": 4, "N": 2560, "K": 4096} or {"M": 4, "E": 240, "N": 640, "K": 4096, "top_k": 8}."""
    config: Mapping[str, int]
    launches: tuple[Launch, ...]
    weights: int
    """Weights read by the call, once each (4-bit indices)."""
    memory_bytes: int
    """Weight and scale bytes that must come from memory once."""
    notes: tuple[str, ...] = ()
    """What the launches leave out, for people who read the counts."""
    unit: str = "weight"
    """What ``weights`` counts: "KV byte" for attention, whose ``memory_bytes`` they are."""

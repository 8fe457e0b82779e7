"""What an attention call is asked to do, with no tensor: enough to launch, to count and to tune it."""

from __future__ import annotations

from dataclasses import dataclass

KEYS_PER_GRANULE = 16
"""Keys whose K and V lie together in a page (:mod:`step128_kernels.attention.page_order`)."""
KV_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2}
"""Bytes of one stored value, by KV-cache dtype."""
HEAD_DIMS = (64, 128, 256)
MOST_GQA_RATIO = 16


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer on one rank."""

    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    window: int
    """Keys that a query sees, itself included; 0: all before it."""
    page: int
    """Tokens of a page of the KV cache."""
    kv_dtype: str
    """"fp8" (e4m3, one scale a layer for K and one for V), "bf16" or "fp16"."""
    element: str
    """Type of queries and output: "bf16" or "fp16"."""

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads or not 1 <= self.heads // self.kv_heads <= MOST_GQA_RATIO:
            raise ValueError(
                f"{self.heads} query heads over {self.kv_heads} KV heads: the ratio must be 1 to {MOST_GQA_RATIO}"
            )
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim is {self.head_dim}; known are {', '.join(map(str, HEAD_DIMS))}")
        if self.page < KEYS_PER_GRANULE or self.page % KEYS_PER_GRANULE:
            raise ValueError(f"a page of {self.page} tokens is no multiple of {KEYS_PER_GRANULE}")
        if self.kv_dtype not in KV_BYTES:
            raise ValueError(f"KV cache of {self.kv_dtype}; known are {', '.join(KV_BYTES)}")
        if self.element not in ("bf16", "fp16"):
            raise ValueError(f"queries of {self.element}; the kernels take bf16 and fp16")
        if self.kv_dtype not in ("fp8", self.element):
            raise ValueError(f"a KV cache of {self.kv_dtype} needs queries of {self.kv_dtype}, not of {self.element}")
        if self.window < 0:
            raise ValueError(f"a window of {self.window} keys; 0 means none")

    @property
    def gqa_ratio(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def key_bytes(self) -> int:
        """Bytes of K and V of one token, all KV heads."""
        return 2 * self.kv_heads * self.head_dim * KV_BYTES[self.kv_dtype]


@dataclass(frozen=True)
class AttentionCall:
    """One call for a batch."""

    shape: AttentionShape
    sequences: int
    """Rows of the page table."""
    query_tokens: int
    """Most query tokens of a sequence."""
    context_tokens: int
    """Most keys of a sequence, the new ones included."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache that a call must read once: of each sequence its queries' windows, or all."""
        keys = self.context_tokens
        if self.shape.window:
            keys = min(keys, self.shape.window + self.query_tokens - 1)
        return self.sequences * keys * self.shape.key_bytes

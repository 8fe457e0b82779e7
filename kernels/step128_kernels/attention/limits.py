"""Sizes that the launches, the plugin and the memory plan agree on."""

from __future__ import annotations

MOST_DECODE_TOKENS = 8
"""Query tokens of a sequence up to which keys are split over work-groups; more are a prefill."""
MOST_SPLIT_ROWS = 1024
"""Most of sequences x query tokens x splits in one launch, which bounds the scratch."""


def scratch_elements(heads: int, head_dim: int) -> int:
    """float32 elements of scratch that calls of layers with up to ``heads`` query heads need, on each GPU."""
    return MOST_SPLIT_ROWS * heads * (head_dim + 1)

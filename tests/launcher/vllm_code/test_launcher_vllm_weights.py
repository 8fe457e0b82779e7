"""The bytes on one rank, equal to the parameters of vLLM's own model classes at the real size."""

from collections.abc import Callable
from typing import Any

import pytest

from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.model.weights import indivisible, rank_weights

Figures = Callable[[], dict[str, Any]]
NAMES = [
    *(f"{policy}/{ranks}" for policy in (None, "experts", "all-linears", "all") for ranks in (1, 2, 4, 8)),
    "None/4/text",
    "all/4/text",
    "all-linears/16",
    "None/4/ep",
    "all/8/ep",
    "uneven/4/ep",
    *(f"float8/{ranks}" for ranks in (1, 4, 16)),
]
# The launcher's components that no policy names; vLLM's modules of these are told apart only by what they serve.
REST = {"router", "norms", "head_gates", "vision_other", "mtp_eh_proj"}


def ours(footprint: ModelFootprint, case: dict[str, Any], drafting: bool) -> dict[str, int]:
    """Our figures under the names of meta_models.py."""
    found = rank_weights(
        footprint,
        dtype="bfloat16",
        tensor_parallel_size=case["ranks"],
        expert_parallel=case["expert_parallel"],
        drafting=drafting,
        vision=case["vision"],
    )
    sums: dict[str, int] = {}
    for item in found:
        if item.component == "kv_scales":
            continue
        rest = "draft rest" if item.draft else "vision rest" if item.vision else "rest"
        name = rest if item.component in REST else item.component
        sums[name] = sums.get(name, 0) + item.rank_bytes
    return sums


@pytest.mark.parametrize("name", NAMES)
def test_rank_bytes_equal_vllm(
    name: str, vllm_figures: Figures, real_footprints: dict[str | None, ModelFootprint]
) -> None:
    figures = vllm_figures()
    case, theirs = figures["cases"][name], figures["models"][name]
    policy = name.split("/")[0]
    footprint = real_footprints[None if policy == "None" else policy]
    assert indivisible(footprint, case["ranks"], expert_parallel=case["expert_parallel"]) is None
    assert ours(footprint, case, drafting=False) == theirs["target"]
    assert ours(footprint, case, drafting=True) == theirs["target"] | theirs["draft"]


@pytest.mark.parametrize("name", NAMES)
def test_tables_equal_vllm(name: str, vllm_figures: Figures, real_footprints: dict[str | None, ModelFootprint]) -> None:
    """Buffers: the text's two rotary tables, shared by trunk and draft, and one of each layer of the tower."""
    figures = vllm_figures()
    case, buffers = figures["cases"][name], figures["models"][name]["buffers"]
    config = real_footprints[None].config
    vision = config.vision
    text = config.max_position_embeddings * (config.full_rotary_dim + config.sliding_rotary_dim) * 2
    assert buffers["cos_sin_cache"] == text
    tower = vision.layers * vision.patches * (vision.width // vision.heads) * 4 if case["vision"] else 0
    assert buffers.get("freqs_cache", 0) == tower


def test_every_expected_case_was_built(vllm_figures: Figures) -> None:
    assert sorted(vllm_figures()["models"]) == sorted(NAMES)

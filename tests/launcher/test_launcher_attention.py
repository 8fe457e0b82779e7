"""The attention backend in a plan: its scratch, and the KV-cache dtype that goes with it."""

from collections.abc import Callable
from typing import Any

import pytest

from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile

SLIDING_HEADS, HEAD_DIM = 96, 128


@pytest.fixture
def plan_on(
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> Callable[..., Plan]:
    def plan(tree: str, profile: str, **limits: Any) -> Plan:
        return make_plan(recorded(tree), real_model("all-linears"), profile_of(profile), Limits(**limits))

    return plan


def scratch_bytes(plan: Plan) -> int:
    return next(line.total_bytes for line in plan.memory.lines if line.name == "attention scratch")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_kernels_own_bound_is_what_is_counted(ranks: int) -> None:
    from step128_kernels.attention.limits import MOST_SPLIT_ROWS, scratch_elements
    from step128_launcher.planning import memory

    assert memory._SPLIT_ROWS == MOST_SPLIT_ROWS
    heads = SLIDING_HEADS // ranks
    assert 4 * scratch_elements(heads, HEAD_DIM) == memory._SPLIT_ROWS * heads * (HEAD_DIM + 1) * 4


def test_four_cards_count_our_scratch_once(plan_on: Callable[..., Plan]) -> None:
    ours, theirs = (plan_on("quad-r9700", "quad-r9700", attention_backend=name) for name in ("CUSTOM", "TRITON_ATTN"))
    assert ours.attention_backend == "CUSTOM" == plan_on("quad-r9700", "quad-r9700").attention_backend
    assert scratch_bytes(ours) == 1024 * (SLIDING_HEADS // 4) * (HEAD_DIM + 1) * 4
    assert scratch_bytes(ours) < scratch_bytes(theirs)


def test_strix_halo_is_told_which_cache_is_faster(plan_on: Callable[..., Plan]) -> None:
    """No FP8 instructions there: ours convert cheaply enough to gain from half the bytes, vLLM's kernels do not."""
    ours = plan_on("strix-halo-128-gtt120", "strix-halo-128")
    assert (ours.attention_backend, ours.kv_cache_dtype) == ("CUSTOM", "fp8")
    assert any("KV cache in fp8 is the faster one here (modelled, not measured)" in text for text in ours.reasons)
    theirs = plan_on("strix-halo-128-gtt120", "strix-halo-128", attention_backend="TRITON_ATTN", max_model_len=32768)
    assert theirs.kv_cache_dtype == "auto"
    assert any("KV cache in the serving dtype is the faster one here" in text for text in theirs.reasons)

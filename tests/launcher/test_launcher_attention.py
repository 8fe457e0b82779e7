"""The attention backend in a plan: which one, its scratch, and the KV-cache dtype that goes with it."""

from collections.abc import Callable
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.items import Load
from step128_launcher.planning.memory import Ledger
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


@pytest.mark.parametrize("name", ["quad-r9700", "quad-r9600", "quad-48gb", "single-r9700", "strix-halo-128"])
def test_ours_comes_first_on_amd_and_vllm_s_own_kernels_stay_a_choice(
    name: str, profile_of: Callable[[str], Profile]
) -> None:
    ours, fallback, *_ = profile_of(name).attention_backends
    assert (ours.name, fallback.name) == ("CUSTOM", "TRITON_ATTN")
    assert "compiled and counted" in ours.why and "not measured on" in ours.why


@pytest.mark.parametrize("name", ["dgx-spark", "jetson-thor", "cpu"])
def test_ours_is_offered_nowhere_else(name: str, profile_of: Callable[[str], Profile]) -> None:
    assert "CUSTOM" not in [backend.name for backend in profile_of(name).attention_backends]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_kernels_own_bound_is_what_is_counted(
    ranks: int, profile_of: Callable[[str], Profile], real_model: Callable[[str | None], ModelFootprint]
) -> None:
    from step128_kernels.attention import scratch_elements

    ledger = Ledger(real_model("all-linears"), profile_of("quad-r9700"))
    for drafts in (0, 3):
        load = Load("bfloat16", ranks, drafts, 16, 2048, attention_backend="CUSTOM")
        scratch = [line.total_bytes for line in ledger.lines(load) if line.name == "attention scratch"]
        assert scratch == [4 * scratch_elements(SLIDING_HEADS // ranks, HEAD_DIM)]


def test_four_cards_count_our_scratch_once(plan_on: Callable[..., Plan]) -> None:
    ours, theirs = (plan_on("quad-r9700", "quad-r9700", attention_backend=name) for name in ("CUSTOM", "TRITON_ATTN"))
    assert ours.attention_backend == "CUSTOM" == plan_on("quad-r9700", "quad-r9700").attention_backend
    assert scratch_bytes(ours) == 1024 * (SLIDING_HEADS // 4) * (HEAD_DIM + 1) * 4
    assert scratch_bytes(ours) < scratch_bytes(theirs)


def test_strix_halo_is_told_which_cache_is_faster(plan_on: Callable[..., Plan]) -> None:
    """No FP8 instructions there: ours convert cheaply enough to gain from half the bytes, vLLM's kernels do not."""
    ours = plan_on("strix-halo-128-gtt120", "strix-halo-128")
    assert (ours.attention_backend, ours.kv_cache_dtype) == ("CUSTOM", "fp8")
    assert [text for text in ours.reasons if "With CUSTOM a KV cache in fp8 is the faster one: half the bytes" in text]
    assert not slower_dtype(ours)
    theirs = plan_on("strix-halo-128-gtt120", "strix-halo-128", attention_backend="TRITON_ATTN", max_model_len=32768)
    assert theirs.kv_cache_dtype == "auto" and not slower_dtype(theirs)
    reason = "With TRITON_ATTN a KV cache in the serving dtype is the faster one: vLLM's kernels convert"
    assert [text for text in theirs.reasons if reason in text and "vLLM issue 56992" in text]


def slower_dtype(plan: Plan) -> list[str]:
    return [text for text in plan.warnings if "decodes faster with" in text]


@pytest.mark.parametrize(("backend", "slower"), [("CUSTOM", "auto"), ("TRITON_ATTN", "fp8")])
@pytest.mark.parametrize("machine", ["strix-halo-128-gtt120", "quad-48gb"])
def test_the_slower_dtype_is_warned_of(
    machine: str, backend: str, slower: str, plan_on: Callable[..., Plan], profile_of: Callable[[str], Profile]
) -> None:
    profile = machine.removesuffix("-gtt120")
    asked = {"attention_backend": backend, "max_model_len": 32768}
    found = slower_dtype(plan_on(machine, profile, kv_cache_dtype=slower, **asked))
    source = next(one for one in profile_of(profile).attention_backends if one.name == backend).faster_kv_cache_dtype
    assert source is not None and len(found) == 1 and source.source in found[0]
    assert plan_on(machine, profile, **asked).kv_cache_dtype == source.value != slower


def test_more_context_is_worth_the_slower_dtype_and_the_plan_says_so(plan_on: Callable[..., Plan]) -> None:
    """With images a bfloat16 cache of the wished length does not fit there."""
    plan = plan_on("strix-halo-128-gtt120", "strix-halo-128", attention_backend="TRITON_ATTN", vision=True)
    assert (plan.kv_cache_dtype, plan.max_model_len) == ("fp8", 204_800)
    assert len(slower_dtype(plan)) == 1


def test_our_kernels_take_no_float32_on_a_gpu(plan_on: Callable[..., Plan]) -> None:
    with pytest.raises(LauncherError, match="take 16-bit values on a GPU") as caught:
        plan_on("quad-48gb", "quad-48gb", dtype="float32")
    assert caught.value.exit_code == ExitCode.USAGE and "--attention-backend TRITON_ATTN" in caught.value.hint
    assert plan_on("quad-48gb", "quad-48gb", dtype="float32", attention_backend="TRITON_ATTN").dtype == "float32"

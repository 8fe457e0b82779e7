"""What the planner refuses or warns about, and the way out it names."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint, read_footprint
from step128_launcher.model.quantization import Format
from step128_launcher.planning.plan import DoesNotFitError, Limits
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile

MakeMachine = Callable[..., Hardware]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(max_model_len=5000), "4096"),
        (Limits(tensor_parallel_size=3), "3 ranks do not divide"),
        (Limits(tensor_parallel_size=4), "6 sliding-attention heads"),
        (Limits(block_size=48), "multiple of 32"),
        (Limits(block_size=1 << 20), "one block would hold more than any request needs"),
        (Limits(max_num_batched_tokens=4, max_num_seqs=8), "max_num_batched_tokens 4 is below max_num_seqs 8"),
        (Limits(max_num_seqs=4096), r"max_num_batched_tokens 1024 \(of profile cpu\) is below max_num_seqs 4096"),
    ],
)
def test_limits_that_contradict_the_model(
    limits: Limits, text: str, footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    with pytest.raises(LauncherError, match=text) as caught:
        make_plan(make_machine(), footprint, cpu_profile, limits)
    assert caught.value.exit_code == ExitCode.USAGE


def test_fewer_requests_where_a_step_has_fewer_tokens(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    plan = make_plan(make_machine(), footprint, cpu_profile, Limits(max_num_batched_tokens=4))
    assert (plan.max_num_batched_tokens, plan.max_num_seqs) == (4, 4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_pipeline_parallel_is_refused(
    ranks: int, footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    with pytest.raises(LauncherError, match="refuses pipeline parallelism") as caught:
        make_plan(make_machine(), footprint, cpu_profile, Limits(pipeline_parallel_size=ranks))
    assert caught.value.exit_code == ExitCode.USAGE and "--tensor-parallel-size" in caught.value.hint


def test_more_ranks_than_cpus(footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine) -> None:
    with pytest.raises(LauncherError) as caught:
        make_plan(make_machine(cpus=1), footprint, cpu_profile, Limits(tensor_parallel_size=2))
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_HARDWARE


def test_does_not_fit_shows_the_items_and_remedies(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(make_machine(1.0), footprint, cpu_profile, Limits(dtype="float32"))
    error = caught.value
    assert error.exit_code == ExitCode.DOES_NOT_FIT
    assert "missing" in error.message and "--dtype bfloat16" in error.hint
    assert error.memory.free_bytes < 0 and "KV cache" in {line.name for line in error.memory.lines}


@pytest.mark.parametrize(
    ("limits", "cap", "wanted", "unwanted"),
    [
        (Limits(), 4096, "memory.kv_cache_max above 4.0 KiB in cpu.yaml", "memory on this machine"),
        (Limits(memory_bytes=2 << 30), 4 << 30, "raise --memory", "kv_cache_max"),
        (Limits(memory_bytes=1), 4096, "raise --memory", "free memory"),
        (Limits(max_num_batched_tokens=10**9), 4 << 30, "--max-num-batched-tokens 1024", "--memory"),
        (Limits(max_num_seqs=10**7, max_num_batched_tokens=10**7), 4 << 30, "--max-num-seqs 8", "--memory"),
    ],
)
def test_remedies_name_the_limit_that_binds(
    limits: Limits,
    cap: int,
    wanted: str,
    unwanted: str,
    footprint: ModelFootprint,
    cpu_profile: Profile,
    make_machine: MakeMachine,
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(make_machine(), footprint, replace(cpu_profile, kv_cache_max_bytes=cap), limits)
    assert wanted in caught.value.hint and unwanted not in caught.value.hint


def test_a_budget_of_zero_is_no_budget(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    with pytest.raises(DoesNotFitError, match="0 B may be used"):
        make_plan(make_machine(), footprint, cpu_profile, Limits(memory_bytes=0))


def test_a_budget_above_the_machine_is_warned_about(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    assert make_plan(make_machine(), footprint, cpu_profile, Limits(memory_bytes=16 << 30)).warnings == ()
    (warning,) = make_plan(make_machine(), footprint, cpu_profile, Limits(memory_bytes=17 << 30)).warnings
    assert warning == "--memory 17.00 GiB is above the 16.00 GiB available (host memory)."


@pytest.mark.parametrize(("quantized", "kv_scales"), [(True, False), (False, True), (False, False)])
def test_fp8_only_where_its_scales_take_effect(
    quantized: bool,
    kv_scales: bool,
    make_checkpoint: Callable[..., Path],
    nl4_format: Format,
    cpu_profile: Profile,
    make_machine: MakeMachine,
) -> None:
    footprint = read_footprint(make_checkpoint(quantized=quantized, kv_scales=kv_scales), nl4_format)
    plan = make_plan(make_machine(), footprint, cpu_profile, Limits())
    assert plan.kv_cache_dtype == "auto"
    left_out = plan.rejected[0]
    assert left_out.wish == "kv_cache_dtype fp8" and "calibrated scales from a quantized checkpoint" in left_out.reason
    with pytest.raises(LauncherError, match="calibrated KV scales"):
        make_plan(make_machine(), footprint, cpu_profile, Limits(kv_cache_dtype="fp8"))

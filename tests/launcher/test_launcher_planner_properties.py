"""The planner's properties, for any wish and any budget."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.kv_cache import kv_shape
from step128_launcher.planning.plan import DoesNotFitError, Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile

MakeMachine = Callable[..., Hardware]


def shape_of(plan: Plan, footprint: ModelFootprint):  # type: ignore[no-untyped-def]
    element = 1 if plan.kv_cache_dtype == "fp8" else {"bfloat16": 2, "float32": 4}[plan.dtype]
    return kv_shape(
        footprint.config,
        mtp_layers=footprint.mtp_layers,
        num_speculative_tokens=plan.num_speculative_tokens,
        tensor_parallel_size=plan.tensor_parallel_size,
        bytes_per_element=element,
        block_size_tokens=plan.block_size,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        concurrent_batches=1,
    )


property_test = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
budgets = st.integers(min_value=3 << 30, max_value=5 << 30)
limits = st.builds(
    Limits,
    max_model_len=st.none() | st.integers(64, 4096),
    num_speculative_tokens=st.none() | st.integers(0, 3),
    max_num_seqs=st.none() | st.integers(1, 64),
    max_num_batched_tokens=st.none() | st.integers(64, 4096),
    tensor_parallel_size=st.none() | st.integers(1, 2),
    dtype=st.none() | st.sampled_from(["bfloat16", "float32"]),
    block_size=st.none() | st.sampled_from([32, 64, 128]),
    kv_cache_dtype=st.none() | st.sampled_from(["auto", "fp8"]),
)


@property_test
@given(wish=limits, budget=budgets)
def test_an_accepted_plan_never_exceeds_its_budget_and_holds_one_request(
    wish: Limits, budget: int, footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    try:
        plan = make_plan(make_machine(), footprint, cpu_profile, replace(wish, memory_bytes=budget))
    except DoesNotFitError as error:
        assert error.memory.free_bytes < 0
        return
    assert plan.memory.total_bytes <= budget
    needed = shape_of(plan, footprint).blocks_per_request(plan.max_model_len)
    assert plan.prediction.num_gpu_blocks >= 1 + needed
    assert plan.kv_cache_memory_bytes <= cpu_profile.kv_cache_max_bytes
    if wish.max_model_len:
        assert plan.max_model_len == wish.max_model_len
    assert all(item.reason for item in plan.rejected)


def worth(plan: Plan, wish: Limits, footprint: ModelFootprint) -> tuple[int, ...]:
    """What objective balanced promises, in its order, read off the plan alone.

    Blocks of the KV cache are no part of it: a plan with images may hold fewer of them than one without. No speed is
    modelled on the cpu profile, so it decides nothing here; test_launcher_search.py has the machines with one.
    """
    assert plan.speed == ()
    wished = wish.max_model_len or footprint.config.max_position_embeddings
    per_request = shape_of(plan, footprint).blocks_per_request(plan.max_model_len)
    return (
        plan.max_model_len * 32 // wished,
        plan.kv_cache_dtype == (wish.kv_cache_dtype or "fp8"),
        plan.num_speculative_tokens,
        plan.vision,
        min(plan.max_num_seqs, (plan.prediction.num_gpu_blocks - 1) // per_request),
        plan.max_num_seqs,
        plan.max_num_batched_tokens,
        plan.max_model_len,
    )


Worth = Callable[[Limits, int], tuple[int, ...]]


@pytest.fixture
def worth_of(footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine) -> Worth:
    """Plan with so many bytes; empty, below all others, if nothing fits."""

    def of(wish: Limits, memory_bytes: int) -> tuple[int, ...]:
        try:
            plan = make_plan(make_machine(), footprint, cpu_profile, replace(wish, memory_bytes=memory_bytes))
        except DoesNotFitError:
            return ()
        return worth(plan, wish, footprint)

    return of


@property_test
@example(wish=Limits(), budget=3_887_629_096, more=1 << 28)  # 8 requests without images, then 1 with them
@given(wish=limits, budget=budgets, more=st.integers(0, 1 << 28))
def test_more_memory_is_never_worse(wish: Limits, budget: int, more: int, worth_of: Worth) -> None:
    assert worth_of(wish, budget) <= worth_of(wish, budget + more)


@property_test
@given(
    wish=limits | st.just(Limits()),
    images=st.booleans(),
    step=st.integers(1 << 10, 1 << 18),
    centre=st.integers(-(3 << 19), 1 << 19),
)
def test_more_memory_is_never_worse_where_it_decides(
    wish: Limits,
    images: bool,
    step: int,
    centre: int,
    worth_of: Worth,
    footprint: ModelFootprint,
    cpu_profile: Profile,
    make_machine: MakeMachine,
) -> None:
    """A row of budgets around what one request takes, with or without images: there, KiB decide between settings."""
    one = replace(wish, vision=images, max_num_seqs=wish.max_num_seqs or 1)
    middle = make_plan(make_machine(), footprint, cpu_profile, one).memory.total_bytes + centre
    found = [worth_of(wish, middle + step * number) for number in range(-8, 9)]
    assert found == sorted(found)

"""Properties of the search over the real-size model: budgets, order, reasons, remedies, fallbacks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.budget import Budget, make_budget
from step128_launcher.planning.candidates import DIMENSIONS, Candidate, Space, search
from step128_launcher.planning.choices import make_space
from step128_launcher.planning.kv_cache import KvShape, longest_context
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.objective import Judge
from step128_launcher.planning.plan import OBJECTIVES, DoesNotFitError, Limits, Plan
from step128_launcher.planning.planner import all_candidates, make_plan
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.speed_inputs import speed_inputs

GIB = 2**30
BOXES = {
    "quad-r9700": "quad-r9700",
    "quad-48gb": "quad-48gb",
    "strix-halo-128-gtt120": "strix-halo-128",
    "dgx-spark": "dgx-spark",
}
Recorded = Callable[[str], Hardware]
ProfileOf = Callable[[str], Profile]
RealModel = Callable[[str | None], ModelFootprint]


class Box:
    """One machine, model and set of limits, searched with budgets of one's own."""

    def __init__(self, hardware: Hardware, profile: Profile, footprint: ModelFootprint, limits: Limits) -> None:
        self.hardware, self.profile, self.footprint, self.limits = hardware, profile, footprint, limits
        self.budget = make_budget(hardware, profile, limits)
        self.space, _ = make_space(hardware, footprint, profile, limits, self.budget)
        self.ledger = Ledger(footprint, profile)

    def search(self, budget: Budget | None = None, space: Space | None = None) -> list[Candidate]:
        return search(self.footprint, space or self.space, budget or self.budget, self.ledger, None)

    def best_key(self, budget: Budget) -> tuple[float, ...]:
        """The objective's key of the best acceptable candidate; empty, below all others, if there is none."""
        judge = Judge(
            self.limits.objective,
            self.space.wished_context,
            self.space.kv_cache_dtypes[0],
            self.footprint,
            self.ledger,
            speed_inputs(self.footprint, self.profile, self.limits),
        )
        found = self.search(budget)
        depths = judge.worthwhile_depths(found)
        return max((judge.key(one, depths) for one in found if one.reason is None), default=())

    def plan(self, **changes: Any) -> Plan:
        return make_plan(self.hardware, self.footprint, self.profile, replace(self.limits, **changes))


@pytest.fixture(scope="module")
def make_box(recorded: Recorded, profile_of: ProfileOf, real_model: RealModel) -> Callable[..., Box]:
    def make(machine: str, policy: str = "all-linears", limits: Limits | None = None) -> Box:
        return Box(recorded(machine), profile_of(BOXES[machine]), real_model(policy), limits or Limits())

    return make


property_test = settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would search thousands of times
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
machines = st.sampled_from(list(BOXES))
policies = st.sampled_from(["experts", "experts+linears", "all-linears", "all"])
limits = st.builds(
    Limits,
    max_model_len=st.none() | st.integers(1024, 262144),
    num_speculative_tokens=st.none() | st.integers(0, 3),
    kv_cache_dtype=st.none() | st.sampled_from(["auto", "fp8"]),
    max_num_seqs=st.none() | st.integers(1, 64),
    max_num_batched_tokens=st.none() | st.sampled_from([256, 2048, 8192]),
    vision=st.none() | st.booleans(),
    objective=st.sampled_from(OBJECTIVES),
)
# Around what the model takes: of a card, or of a whole machine.
shares = st.floats(0.7, 1.3)


def scaled(budget: Budget, share: float, more: int = 0) -> Budget:
    """The budget made smaller or larger, the host's with it."""
    host = budget.host_budget_bytes
    return replace(
        budget,
        budget_bytes=int(budget.budget_bytes * share) + more,
        host_budget_bytes=None if host is None else int(host * share) + more,
    )


@property_test
@given(
    machine=machines,
    policy=policies,
    wish=limits | st.just(Limits()),
    share=st.floats(0.85, 1.1),
    more=st.integers(0, 512 << 20) | st.integers(0, 8 * GIB) | st.integers(0, 80 * GIB),
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_memory_is_never_worse(
    objective: str, machine: str, policy: str, wish: Limits, share: float, more: int, make_box: Callable[..., Box]
) -> None:
    box = make_box(machine, policy, replace(wish, objective=objective))
    assert box.best_key(scaled(box.budget, share)) <= box.best_key(scaled(box.budget, share, more))


@property_test
@given(machine=machines, policy=policies, wish=limits, share=shares)
def test_no_plan_exceeds_any_budget(
    machine: str, policy: str, wish: Limits, share: float, make_box: Callable[..., Box]
) -> None:
    box = make_box(machine, policy, wish)
    try:
        plan = box.plan(memory_bytes=int(box.budget.budget_bytes * share))
    except DoesNotFitError as error:
        assert error.memory.free_bytes < 0
        return
    assert sum(line.total_bytes for line in plan.memory.lines) <= int(box.budget.budget_bytes * share)
    assert plan.host_memory is not None and plan.host_memory.free_bytes >= 0
    budget = make_budget(box.hardware, box.profile, replace(wish, memory_bytes=int(box.budget.budget_bytes * share)))
    mine = [plan.kv_cache_dtype if name == "kv_cache_dtype" else getattr(plan, name) for name in DIMENSIONS]
    (chosen,) = [one for one in box.search(budget) if [one.value(name) for name in DIMENSIONS] == mine]
    # What the tables print is what the search had left the KV cache from.
    (kv,) = [line.total_bytes for line in plan.memory.lines if line.name == "KV cache"]
    fixed, host = plan.memory.total_bytes - kv, plan.host_memory.total_bytes
    if budget.shared:
        host -= plan.memory.total_bytes
    assert chosen.left_bytes == budget.left_bytes(fixed, host) and kv == plan.kv_cache_memory_bytes
    assert plan.prediction.num_gpu_blocks >= 1 + chosen.shape.blocks_per_request(plan.max_model_len)


@property_test
@given(machine=machines, policy=policies, lengths=st.tuples(st.integers(1, 262144), st.integers(1, 262144)))
def test_a_longer_context_never_needs_less(
    machine: str, policy: str, lengths: tuple[int, int], make_box: Callable[..., Box]
) -> None:
    short, long = (make_box(machine, policy, Limits(max_model_len=length)).search() for length in sorted(lengths))
    for one, other in zip(short, long, strict=True):
        assert one.load == other.load
        assert one.shape.needed_bytes(min(lengths)) <= one.shape.needed_bytes(max(lengths))
        if other.missing_bytes is not None or other.reason is None:  # else it is not memory that it lacks
            assert (one.missing_bytes or 0) <= (other.missing_bytes or 0)


@property_test
@given(machine=machines, policy=policies, wish=limits, share=shares)
def test_every_rejection_has_its_reason_and_its_price(
    machine: str, policy: str, wish: Limits, share: float, make_box: Callable[..., Box]
) -> None:
    box = make_box(machine, policy, wish)
    budget = scaled(box.budget, share)
    rejected = [(number, one) for number, one in enumerate(box.search(budget)) if one.reason is not None]
    for _, one in rejected:
        assert one.reason and (one.missing_bytes is None or one.missing_bytes > 0)
    lacking = [(number, one) for number, one in rejected if one.missing_bytes]
    for number, one in lacking[:: max(1, len(lacking) // 3)]:
        assert one.missing_bytes
        enough = box.search(scaled(budget, 1, one.missing_bytes))[number]
        assert enough.load == one.load and enough.reason is None
        scarcely = box.search(scaled(budget, 1, one.missing_bytes - 1))[number]
        assert scarcely.missing_bytes == 1


@pytest.mark.parametrize("machine", BOXES)
def test_candidates_are_all_listed_and_always_the_same(machine: str, make_box: Callable[..., Box]) -> None:
    box = make_box(machine, "experts")
    listed = all_candidates(box.hardware, box.footprint, box.profile, box.limits)
    assert listed == all_candidates(box.hardware, box.footprint, box.profile, box.limits)
    assert len(listed) == box.plan().considered and all(set(DIMENSIONS) < set(entry) for entry in listed)
    assert all(entry["reason"] or entry["max_model_len"] for entry in listed)
    assert box.plan() == make_box(machine, "experts").plan()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("machine", BOXES)
def test_fallbacks_are_ever_leaner(objective: str, machine: str, make_box: Callable[..., Box]) -> None:
    box = make_box(machine, "all-linears", Limits(objective=objective))
    plan = make_plan(box.hardware, box.footprint, box.profile, box.limits, with_fallbacks=True)
    assert plan.fallbacks and box.plan().fallbacks == ()
    before = plan
    for leaner in plan.fallbacks:
        assert leaner.memory.total_bytes <= leaner.memory.budget_bytes < before.memory.total_bytes
        assert leaner.host_memory is not None and leaner.host_memory.free_bytes >= 0
        assert (leaner.gpu_memory_utilization or 0) <= (before.gpu_memory_utilization or 0)
        assert leaner.fallbacks == () and leaner.objective == objective
        before = leaner


def test_a_limit_stays_in_every_fallback(make_box: Callable[..., Box]) -> None:
    box = make_box("quad-r9700", "all-linears", Limits(max_model_len=65536, vision=True))
    plan = make_plan(box.hardware, box.footprint, box.profile, box.limits, with_fallbacks=True)
    assert plan.fallbacks
    assert {(one.max_model_len, one.vision) for one in plan.fallbacks} == {(65536, True)}


shapes = st.builds(
    KvShape,
    full_layers=st.integers(0, 5),
    sliding_layers=st.integers(1, 9),
    kv_heads_per_rank=st.just(1),
    head_dim=st.just(8),
    sliding_window=st.integers(1, 300),
    bytes_per_element=st.sampled_from([1, 2]),
    block_size_tokens=st.sampled_from([16, 32, 128]),
    max_num_batched_tokens=st.integers(1, 400),
    retained_tokens=st.integers(0, 2),
    concurrent_batches=st.sampled_from([1, 2]),
)


@settings(max_examples=150, deadline=None)
@given(shape=shapes, blocks=st.integers(-2, 120), ceiling=st.integers(1, 900))
def test_the_longest_context_is_that_of_trying_all(shape: KvShape, blocks: int, ceiling: int) -> None:
    available = blocks * shape.bytes_per_block + 5
    fitting = [length for length in range(1, ceiling + 1) if shape.needed_bytes(length) <= available]
    assert longest_context(shape, available, ceiling) == max(fitting, default=0)


def test_a_limit_that_no_machine_could_meet_is_no_search(make_box: Callable[..., Box]) -> None:
    with pytest.raises(LauncherError, match="above the model's own maximum of 262144"):
        make_box("quad-r9700", limits=Limits(max_model_len=262145))

"""The speed model that chooses the MTP depth: its formulas, its bytes for the real model, its choice."""

import random
from collections.abc import Callable

import pytest

from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.speculation import (
    TIE,
    SpeedInputs,
    SpeedRow,
    Traffic,
    distinct_experts,
    speed,
    tokens_per_step,
    worthwhile_depth,
)

CARD = (0.92, 0.75, 0.55)
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan_for(
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> MakePlan:
    def plan(machine: str = "quad-r9700", profile: str = "quad-r9700", **limits: object) -> Plan:
        return make_plan(recorded(machine), real_model("all-linears"), profile_of(profile), Limits(**limits))  # type: ignore[arg-type]

    return plan


def test_both_readings_of_the_card_s_acceptances() -> None:
    assert tokens_per_step(CARD, 3, conditional=True) == pytest.approx(1 + 0.92 + 0.92 * 0.75 + 0.92 * 0.75 * 0.55)
    assert tokens_per_step(CARD, 3, conditional=True) == pytest.approx(2.9895)
    assert tokens_per_step(CARD, 3, conditional=False) == pytest.approx(3.22)
    assert [tokens_per_step(CARD, depth, True) for depth in range(3)] == pytest.approx([1, 1.92, 2.61])
    assert tokens_per_step((0.5,), 3, True) == 1.5  # what is not known counts as not accepted


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64])
def test_distinct_experts_are_those_of_a_simulation(tokens: int) -> None:
    experts, chosen, trials = 240, 8, 400
    dice = random.Random(128)
    counts = [
        len({expert for _ in range(tokens) for expert in dice.sample(range(experts), chosen)}) for _ in range(trials)
    ]
    assert distinct_experts(experts, chosen, tokens) == pytest.approx(sum(counts) / trials, rel=0.01)


def test_one_token_reads_its_own_experts() -> None:
    assert distinct_experts(240, 8, 1) == pytest.approx(8)
    assert distinct_experts(240, 8, 4) == pytest.approx(30.435, abs=0.001)
    assert distinct_experts(8, 8, 5) == 8


def by_hand(depth: int, context: int) -> tuple[float, float]:
    """Bytes on each of 4 ranks and seconds of one step, from the model's parameter counts (5 bits a packed weight)."""
    attention, dense, shared_experts, lm_head = 4_504_682_496, 415_236_096, 660_602_880, 527_958_016
    routed, router, head_gates, norms = 158_544_691_200, 41_297_760, 16_121_856, 384_256
    shared = (attention + dense + shared_experts + lm_head) * 5 / 8 / 4 + head_gates * 2 / 4 + router * 4 + norms * 2
    tokens = 1 + depth
    experts = routed * 5 / 8 / 4 / 240 * 240 * (1 - (1 - 8 / 240) ** tokens)
    draft = ((742_391_808 + 1_583_874_048) * 5 / 8 / 4 + 1_179_648 * 2 / 4 + 100_663_296 * 2 + 62_208 * 2) / 3
    layer_token = 2 * 2 * 128  # K and V of 2 of the 8 KV heads, one byte an element
    kv = context * 12 * layer_token + 33 * 512 * layer_token
    read = shared + experts + depth * draft + kv
    return read, read / (640e9 * 0.6) + 2 * (45 + depth) * 69e-6


def test_the_table_is_the_one_computed_by_hand(plan_for: MakePlan) -> None:
    plan = plan_for()
    assert [(row.context_tokens, row.num_speculative_tokens) for row in plan.speed] == [
        (context, depth) for context in (2048, 204800) for depth in range(4)
    ]
    for row in plan.speed:
        read, seconds = by_hand(row.num_speculative_tokens, row.context_tokens)
        assert row.read_bytes == pytest.approx(read, rel=0.02)
        assert row.step_seconds == pytest.approx(seconds, rel=0.02)
        made = tokens_per_step(CARD, row.num_speculative_tokens, True)
        assert row.tokens_per_second == pytest.approx(made / seconds, rel=0.02)
        assert (row.tokens_per_step, row.requests) == (made, 1)
    deepest = plan.speed[3]
    assert (deepest.tokens_per_step, deepest.tokens_per_step_unconditional) == pytest.approx((2.9895, 3.22))


def test_the_inputs_are_told_with_their_sources(plan_for: MakePlan) -> None:
    sources = dict(plan_for().speed_sources)
    assert set(sources) == {"memory_bandwidth", "bandwidth_efficiency", "all_reduce_seconds", "acceptance"}
    assert sources["all_reduce_seconds"].startswith("69 microseconds (") and "not measured" in sources["acceptance"]
    assert "0.92 / 0.75 / 0.55, conditional" in sources["acceptance"]
    asked = dict(plan_for(acceptance=(0.5, 0.4), acceptance_unconditional=True).speed_sources)
    assert asked["acceptance"] == "0.5 / 0.4, unconditional (--acceptance)"


def _row(depth: int, tokens_per_second: float) -> SpeedRow:
    return SpeedRow(depth, 2048, 1, 1.0, 1.0, 8.0, 1.0, 1.0, tokens_per_second)


@pytest.mark.parametrize(
    ("speeds", "depth"),
    [
        ((100, 90, 80, 70), 1),
        ((100, 89.9, 80, 70), 0),
        ((50, 60, 100, 90), 3),
        ((50, 60, 100, 89.9), 2),
        ((100, 80, 80, 95), 3),
        ((1,), 0),
    ],
)
def test_the_deepest_within_the_tie_is_worthwhile(speeds: tuple[float, ...], depth: int) -> None:
    assert TIE == 0.10
    assert worthwhile_depth([_row(number, value) for number, value in enumerate(speeds)]) == depth


@pytest.mark.parametrize("objective", ["balanced", "context", "throughput", "latency"])
def test_drafts_that_are_never_accepted_are_not_made(objective: str, plan_for: MakePlan) -> None:
    plan = plan_for(acceptance=(0.0, 0.0, 0.0), objective=objective)
    assert plan.num_speculative_tokens == 0 and not any(line.name.startswith("draft") for line in plan.memory.lines)
    assert all(row.tokens_per_step == 1 for row in plan.speed)


def test_the_chosen_depth_pays_at_a_short_and_at_the_wished_context(plan_for: MakePlan) -> None:
    for acceptance in (CARD, (0.9, 0.3, 0.1), (0.3, 0.3, 0.3), (1.0, 1.0, 1.0)):
        plan = plan_for("quad-48gb", "quad-48gb", acceptance=acceptance)
        contexts = [[row for row in plan.speed if row.context_tokens == length] for length in (2048, 204800)]
        assert plan.num_speculative_tokens == min(map(worthwhile_depth, contexts)), acceptance
    assert plan.num_speculative_tokens == 3


def test_one_card_pays_no_all_reduce(plan_for: MakePlan) -> None:
    inputs = SpeedInputs(1e12, 1.0, 1e-3, CARD, True)
    traffic = Traffic(1e9, 1e7, 1e8, 100.0, 1e5, 240, 8, 45)
    alone, four = (speed(traffic, inputs, ranks, 2, 1000) for ranks in (1, 4))
    assert four.step_seconds - alone.step_seconds == pytest.approx(2 * 47 * 1e-3)
    assert alone.read_bytes == pytest.approx(1e9 + distinct_experts(240, 8, 3) * 1e7 + 2e8 + 1e5 + 1e5)


def test_several_requests_share_the_weights() -> None:
    inputs, traffic = SpeedInputs(1e12, 1.0, 0.0, CARD, True), Traffic(1e9, 1e7, 1e8, 100.0, 0.0, 240, 8, 45)
    speeds = [speed(traffic, inputs, 1, 3, 32768, count).tokens_per_second for count in (1, 2, 8, 64)]
    assert speeds == sorted(speeds)
    assert speed(traffic, inputs, 1, 0, 0, 2).distinct_experts == pytest.approx(15.733, abs=1e-3)


def test_the_depth_asked_for_is_taken_and_shown_with_its_speed(plan_for: MakePlan) -> None:
    for depth in range(4):
        plan = plan_for(num_speculative_tokens=depth)
        assert plan.num_speculative_tokens == depth and f"MTP depth {depth}: asked for." in plan.reasons
        assert {row.num_speculative_tokens for row in plan.speed} == {0, 1, 2, 3}


def test_a_cpu_has_no_speed_model(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: Callable[..., Hardware]
) -> None:
    plan = make_plan(make_machine(), footprint, cpu_profile, Limits())
    assert plan.speed == () == plan.speed_sources and plan.num_speculative_tokens == 3

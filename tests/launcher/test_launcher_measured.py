"""What an earlier start measured takes the place of what the plan assumes, for exactly those settings."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher import cli
from step128_launcher.commands import planned
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.budget import make_budget
from step128_launcher.planning.calibration import Measurement, Settings, machine_key, model_fingerprint, save
from step128_launcher.planning.candidates import DIMENSIONS, search
from step128_launcher.planning.choices import make_space
from step128_launcher.planning.measured import finder
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile

MIB, GIB = 2**20, 2**30
MACHINES = Path(__file__).parents[1] / "machines"
REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
MakePlan = Callable[..., Plan]
ASSUMED = {"activations", "logits", "runtime context", "collectives (RCCL/NCCL)", "graphs"}


@pytest.fixture
def plan_for(
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> MakePlan:
    def plan(*measurements: Measurement, limits: Limits | None = None) -> Plan:
        hardware, footprint, profile = recorded("quad-r9700"), real_model("all-linears"), profile_of("quad-r9700")
        return make_plan(hardware, footprint, profile, limits or Limits(), measurements=measurements)

    return plan


def measured(plan: Plan, **changes: Any) -> Measurement:
    """A start with the plan's own settings that took a little less than assumed."""
    settings = Settings(
        model=model_fingerprint(REAL_MODEL),
        tensor_parallel_size=plan.tensor_parallel_size,
        num_speculative_tokens=plan.num_speculative_tokens,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        vision=plan.vision,
        attention_backend=plan.attention_backend,
        kv_cache_dtype=plan.kv_cache_dtype,
        enforce_eager=plan.enforce_eager,
        dtype=plan.dtype,
        enable_expert_parallel=plan.enable_expert_parallel,
    )
    in_settings = {name: value for name, value in changes.items() if hasattr(settings, name)}
    sizes = {"weights_bytes": 27 * GIB, "activation_bytes": 1100 * MIB, "graph_bytes": 300 * MIB}
    sizes |= {"non_torch_bytes": 700 * MIB}
    sizes |= {name: value for name, value in changes.items() if name not in in_settings}
    source, date = "/var/log/vllm.log", "2026-03-04"
    return Measurement(replace(settings, **in_settings), **sizes, date=date, vllm_version="0.32.0", source=source)


def lines(plan: Plan) -> dict[str, Any]:
    return {line.name: line for line in plan.memory.lines}


def test_measured_lines_replace_the_assumed_ones(plan_for: MakePlan) -> None:
    before = plan_for()
    assert {name for name, line in lines(before).items() if line.evidence == "assumed"} == ASSUMED
    after = plan_for(measured(before))
    found = {name: line for name, line in lines(after).items() if line.evidence == "measured"}
    sizes = {name: line.total_bytes for name, line in found.items()}
    assert sizes == {"activations": 1100 * MIB, "runtime and collectives": 700 * MIB, "graphs": 300 * MIB}
    assert all(line.source == "/var/log/vllm.log" and "2026-03-04" in line.explanation for line in found.values())
    assert not ASSUMED - {"activations", "graphs"} & set(lines(after))  # the measured peak holds the logits
    weights = [name for name in lines(before) if name.startswith(("weights:", "draft:"))]
    assert all(lines(after)[name] == lines(before)[name] for name in weights)  # those are exact already
    expected = (after.expected.activation_bytes, after.expected.graph_bytes, after.expected.non_torch_bytes)
    assert expected == (1100 * MIB, 300 * MIB, 700 * MIB)


def test_the_search_uses_what_the_table_shows(
    plan_for: MakePlan,
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> None:
    hardware, footprint, profile = recorded("quad-r9700"), real_model("all-linears"), profile_of("quad-r9700")
    wish = Limits(max_model_len=131072, num_speculative_tokens=3, max_num_batched_tokens=2048, kv_cache_dtype="fp8")
    before = plan_for(limits=wish)
    measurement = measured(before)
    plan = plan_for(measurement, limits=wish)
    assert plan.memory.total_bytes <= plan.memory.budget_bytes and lines(plan)["activations"].evidence == "measured"
    budget = make_budget(hardware, profile, wish)
    space, _ = make_space(hardware, footprint, profile, wish, budget)
    mine = [plan.kv_cache_dtype if name == "kv_cache_dtype" else getattr(plan, name) for name in DIMENSIONS]

    def left(*measurements: Measurement) -> int:
        found = search(footprint, space, budget, Ledger(footprint, profile, finder(measurements)), None)
        (chosen,) = [one for one in found if [one.value(name) for name in DIMENSIONS] == mine]
        return chosen.left_bytes

    fixed = plan.memory.total_bytes - lines(plan)["KV cache"].total_bytes
    assert left(measurement) == budget.budget_bytes - fixed
    assumed = sum(lines(before)[name].total_bytes for name in ASSUMED)
    assert left(measurement) - left() == assumed - (1100 + 300 + 700) * MIB


@pytest.mark.parametrize(
    "other",
    [
        {"tensor_parallel_size": 2},
        {"num_speculative_tokens": 1},
        {"max_num_seqs": 8},
        {"max_num_batched_tokens": 1024},
        {"vision": False},
        {"attention_backend": "ROCM_ATTN"},
        {"enforce_eager": True},
    ],
)
def test_a_measurement_of_other_settings_changes_nothing(other: dict[str, Any], plan_for: MakePlan) -> None:
    before = plan_for()
    wish = Limits(
        max_model_len=before.max_model_len,
        num_speculative_tokens=before.num_speculative_tokens,
        max_num_seqs=before.max_num_seqs,
        max_num_batched_tokens=before.max_num_batched_tokens,
        tensor_parallel_size=4,
        vision=True,
        attention_backend="TRITON_ATTN",
    )
    assert plan_for(measured(before, **other), limits=wish) == plan_for(limits=wish)


@pytest.mark.parametrize(
    "wish",
    [
        Limits(vision=False),
        Limits(num_speculative_tokens=2),
        Limits(max_num_seqs=8),
        Limits(max_num_batched_tokens=512),
        Limits(attention_backend="ROCM_ATTN"),
        Limits(enforce_eager=True),
    ],
)
def test_other_settings_are_not_planned_with_it(wish: Limits, plan_for: MakePlan) -> None:
    assert plan_for(measured(plan_for()), limits=wish) == plan_for(limits=wish)


@pytest.mark.parametrize("activation", [0, 20 * GIB])
def test_a_measurement_of_one_request_speaks_for_no_others(activation: int, plan_for: MakePlan) -> None:
    before = plan_for()
    wish = Limits(max_num_seqs=before.max_num_seqs)
    single = measured(before, max_num_seqs=1, activation_bytes=activation)
    assert plan_for(single, limits=wish) == plan_for(limits=wish)


def test_a_start_that_took_more_is_planned_for(plan_for: MakePlan) -> None:
    wish = Limits(num_speculative_tokens=3, max_num_seqs=16, max_num_batched_tokens=2048, vision=True)
    before = plan_for(limits=wish)
    after = plan_for(measured(before, non_torch_bytes=GIB + 700 * MIB), limits=wish)
    assert after.max_model_len < before.max_model_len
    assert after.memory.total_bytes <= after.memory.budget_bytes
    assert lines(after)["runtime and collectives"].evidence == "measured"


def test_what_was_not_measured_stays_assumed(plan_for: MakePlan) -> None:
    before = plan_for()
    after = plan_for(measured(before, activation_bytes=None, graph_bytes=None))
    evidence = {name: line.evidence for name, line in lines(after).items()}
    assert evidence["runtime and collectives"] == "measured"
    assert evidence["activations"] == evidence["logits"] == evidence["graphs"] == "assumed"
    assert after.expected.activation_bytes == before.expected.activation_bytes


def test_the_latest_measurement_counts(plan_for: MakePlan) -> None:
    before = plan_for()
    after = plan_for(measured(before), measured(before, graph_bytes=111 * MIB))
    assert lines(after)["graphs"].total_bytes == 111 * MIB


def test_the_stored_one_is_used_for_its_model_only(
    plan_for: MakePlan,
    recorded: Callable[[str], Hardware],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("STEP128_PROFILES_DIR", str(tmp_path))
    monkeypatch.delenv("STEP128_PROFILE", raising=False)
    monkeypatch.setattr(planned, "probe", lambda: recorded("quad-r9700"))  # with --machine none is read
    command = ["plan", str(REAL_MODEL), "--policy", "all-linears", "--json", "--candidates"]

    def evidence(warning: bool = False) -> set[str]:
        assert cli.main(command) == 0
        document = json.loads(capsys.readouterr().out)
        assert any("calibration" in text and "Delete it" in text for text in document["warnings"]) == warning
        settings, listed = document["settings"], document["candidates"]
        (chosen,) = (one for one in listed if all(one[name] == settings[name] for name in DIMENSIONS))
        # The list is of the search that chose, with what it knew.
        assert chosen["max_model_len"] == settings["max_model_len"] and chosen["reason"] is None
        first = next(one for one in listed if all(one[name] == getattr(plan_for(), name) for name in DIMENSIONS))
        lacking.append(first["missing_bytes"])
        return {line["evidence"] for line in document["memory"]["lines"]}

    lacking: list[int | None] = []
    folder, key = tmp_path / "step128" / "calibration", machine_key(recorded("quad-r9700"))
    save(measured(plan_for(), model="another"), key, folder)
    assert "measured" not in evidence()
    path = save(measured(plan_for()), key, folder)
    assert "measured" in evidence()
    save(measured(plan_for(), activation_bytes=8 * GIB), key, folder)
    evidence()
    assert lacking[:2] == [None, None] and (lacking[2] or 0) > GIB
    path.write_text("{")  # a broken file is never fatal, but it is said
    assert "measured" not in evidence(warning=True)

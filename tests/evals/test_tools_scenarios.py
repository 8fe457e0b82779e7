"""The scenarios themselves: what they expect can be done, and what is expected is what their words say."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from jsonschema import Draft202012Validator
from tool_answers import BY_ID, SCENARIOS, example, place, right

from step128_evals.chat import Answer
from step128_evals.errors import BadInputError
from step128_evals.tools.checks import check_answer
from step128_evals.tools.conversation import RESERVE_TOKENS
from step128_evals.tools.scenarios import AUTO, KINDS, NONE, REQUIRED, Scenario, choose_scenarios


def ids(scenario: Scenario) -> str:
    return scenario.id


def test_a_broad_set() -> None:
    assert len(SCENARIOS) == len(BY_ID) >= 60
    by_kind = Counter(scenario.kind for scenario in SCENARIOS)
    assert set(by_kind) == set(KINDS) and min(by_kind.values()) >= 4
    assert {scenario.tool_choice for scenario in SCENARIOS} == {AUTO, REQUIRED, NONE, "get_forecast"}
    assert sum(len(step.calls) > 1 for scenario in SCENARIOS for step in scenario.steps) >= 7


@pytest.mark.parametrize("scenario", SCENARIOS, ids=ids)
def test_every_scenario_can_be_passed(scenario: Scenario) -> None:
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in scenario.tools}
    assert scenario.tool_choice in {AUTO, REQUIRED, NONE, *offered}
    for position, step in enumerate(scenario.steps):
        assert not (step.calls and step.answer)
        assert step.user is not None or (position > 0 and scenario.steps[position - 1].calls)
        for call in step.calls:
            arguments = example(call.arguments)
            Draft202012Validator(offered[call.name]).validate(arguments)
            assert json.loads(json.dumps(arguments)) == arguments
            assert call.result is not None or position == len(scenario.steps) - 1
        reply = right(step)
        calls = tuple({"id": str(n), "name": c[0], "arguments": c[1]} for n, c in enumerate(reply.tool_calls))
        answer = Answer(reply.text, "", calls, reply.finish, 9, 0.1, 0.2)
        assert check_answer(scenario, step, answer).faults == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=ids)
def test_figures_stand_only_in_the_results(scenario: Scenario) -> None:
    """Else an answer could be right without them."""
    said = (scenario.system or "").casefold()
    for position, step in enumerate(scenario.steps):
        said += (step.user or "").casefold()
        results = " ".join(call.result or "" for s in scenario.steps[:position] for call in s.calls).casefold()
        for alternatives in step.answer if step.user is None and scenario.kind != "errors" else ():
            assert not any(each in said for each in alternatives)
            assert any(each in results for each in alternatives)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.kind == "text"], ids=ids)
def test_exact_texts_stand_in_the_question(scenario: Scenario) -> None:
    for argument in example(scenario.steps[0].calls[0].arguments).values():
        assert argument in (scenario.steps[0].user or "")


def test_every_schema_is_one_and_small_enough() -> None:
    for scenario in SCENARIOS:
        for tool in scenario.tools:
            Draft202012Validator.check_schema(tool["function"]["parameters"])
        asked = json.dumps(scenario.tools) + "".join(
            (step.user or "") + "".join(str(call.arguments) + str(call.result) for call in step.calls)
            for step in scenario.steps
        )
        assert len(asked) / 2 < RESERVE_TOKENS, scenario.id  # two characters a token is a poor tokenizer


def test_no_two_begin_alike() -> None:
    for scenario in SCENARIOS:
        found = place([{"role": "user", "content": scenario.steps[0].user}])
        assert found is not None and found[0] is scenario


def test_choosing() -> None:
    assert choose_scenarios(SCENARIOS, None) == list(SCENARIOS)
    assert {s.kind for s in choose_scenarios(SCENARIOS, "text,choice")} == {"text", "choice"}
    assert [s.id for s in choose_scenarios(SCENARIOS, "single-weather,*-sql")] == ["single-weather", "text-sql"]
    with pytest.raises(BadInputError, match=r"no scenario fits 'nothing'; there are the kinds single, arguments"):
        choose_scenarios(SCENARIOS, "single,nothing")


def test_the_fingerprint_moves_with_what_is_expected() -> None:
    prints = {scenario.sha256 for scenario in SCENARIOS}
    assert len(prints) == len(SCENARIOS)

"""``step128-eval tools`` against the oracle: the counts are exactly what was scripted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle, Reply
from tool_answers import SCENARIOS, THOUGHT, perfect, with_arguments

from step128_evals.runs import read_run
from step128_evals.tools.scenarios import Scenario, Step

Report = dict[str, Any]
Ask = Callable[..., tuple[int, Report]]
SMALL = ("--depth-tokens", "0", "--variants", "whole,plain")


def faults(report: Report) -> dict[str, int]:
    return {kind: number for kind, number in report["faults"].items() if number}


def test_a_perfect_endpoint_passes_all_in_every_variant(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    code, report = ask("--depth-tokens", "0", "--concurrency", "8")
    total = 4 * len(SCENARIOS)
    assert code == 0 and report["errors"] == 0 and faults(report) == {}
    assert report["passed"]["items"] == report["passed"]["passed"] == total
    due = 4 * sum(len(step.calls) for scenario in SCENARIOS for step in scenario.steps)
    assert (report["failed_calls"]["calls"], report["failed_calls"]["failed"]) == (due, 0)
    # Wilson's upper bound at 0 of n is z^2 / (n + z^2).
    assert report["failed_calls"]["interval"]["high"] == pytest.approx(3.8415 / (due + 3.8415), rel=1e-3)
    assert report["streamed_equals_whole"] == {"pairs": total // 2, "equal": total // 2, "differ": []}
    assert {name: row["items"] for name, row in report["by_thinking"].items()} == {
        "thinking": total // 2,
        "plain": total // 2,
    }
    asked = [body for body in oracle.chats() if body["max_tokens"] == 4096]
    steps = sum(len(scenario.steps) for scenario in SCENARIOS)
    assert len(asked) == 4 * steps
    assert sum(body["stream"] for body in asked) == 2 * steps
    assert sum(body.get("reasoning_effort") == "none" for body in asked) == 2 * steps
    assert {str(body["tool_choice"]) for body in asked} == {
        "auto",
        "required",
        "none",
        "{'type': 'function', 'function': {'name': 'get_forecast'}}",
    }
    item = read_run(tmp_path / "tools.jsonl").items["single-weather.streamed.thinking.0"]
    assert item.data["answers"][0]["reasoning"] == THOUGHT
    assert item.data["answers"][0]["tool_calls"][0]["arguments"] == '{"city": "Lisbon"}'


def test_a_conversation_as_it_is_sent(ask: Ask, oracle: Oracle) -> None:
    ask(*SMALL, "--scenarios", "multi_turn-chain-customer")
    last = oracle.chats()[-1]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "tool", "assistant", "tool"]
    assert last[1]["tool_calls"][0]["id"] == last[2]["tool_call_id"] != last[4]["tool_call_id"]
    assert last[2]["content"] == '{"customer_id": "604417"}'


def again(reply: Reply) -> Reply:
    return replace(reply, tool_calls=reply.tool_calls * 2, call_ids=("a", "b"))


def wide(reply: Reply) -> Reply:
    """Two blanks for one, inside the strings too."""
    return with_arguments(reply, *(given.replace(" ", "  ") for _, given in reply.tool_calls))


def cut(reply: Reply) -> Reply:
    return with_arguments(reply, *(given[:-1] for _, given in reply.tool_calls))


def more(reply: Reply) -> Reply:
    return with_arguments(reply, *(json.dumps(json.loads(given) | {"zzz": 1}) for _, given in reply.tool_calls))


def renamed(reply: Reply) -> Reply:
    return replace(reply, tool_calls=tuple(("save_all", given) for _, given in reply.tool_calls))


def written(reply: Reply) -> Reply:
    name, given = reply.tool_calls[0]
    return Reply(f'<tool_call>{{"name": "{name}", "arguments": {given}}}</tool_call>')


SPOILT: dict[str, tuple[Callable[[Reply], Reply], str, int, int]] = {
    "single-weather": (cut, "invalid_json", 1, 1),
    "single-no-arguments": (lambda reply: with_arguments(reply, ""), "invalid_json", 1, 1),
    "single-forecast": (more, "schema_violation", 1, 1),
    "single-air": (renamed, "wrong_function", 1, 0),
    "text-quotes": (wide, "wrong_arguments", 1, 0),
    "text-sql": (wide, "wrong_arguments", 1, 0),
    "single-currency": (lambda _: Reply("I do not know."), "missing_call", 1, 0),
    "parallel-same-twice": (lambda reply: Reply("None of them."), "missing_call", 2, 0),
    "single-timer": (again, "extra_call", 1, 0),
    "no_call-sum": (lambda _: Reply(tool_calls=(("get_weather", "{}"),)), "unneeded_call", 1, 0),
    "no_call-knowledge": (lambda _: Reply("It is Na."), "wrong_answer", 0, 0),
    "no_call-thanks": (lambda _: Reply(" "), "empty_answer", 0, 0),
    "single-train": (written, "leaked_tags", 1, 1),
    "no_call-greeting": (lambda reply: replace(reply, text="Fine.<|im_end|>"), "leaked_tags", 0, 0),
    "single-order-status": (lambda reply: replace(reply, call_ids=("",)), "bad_ids", 1, 1),
    "parallel-different-two": (lambda reply: replace(reply, call_ids=("a", "a")), "bad_ids", 1, 1),
    "single-order-list": (lambda reply: replace(reply, finish_reason="stop"), "wrong_finish_reason", 1, 1),
    "single-move-event": (lambda reply: replace(cut(reply), finish_reason="length"), "truncated", 1, 0),
}
"""Scenario -> how its first answer is spoilt, the fault, failed and malformed calls."""


def test_each_fault_is_counted_as_itself(ask: Ask, tmp_path: Path) -> None:
    def spoil(scenario: Scenario, _step: Step, reply: Reply) -> Reply:
        return SPOILT[scenario.id][0](reply) if scenario.id in SPOILT else reply

    code, report = ask("--depth-tokens", "0", "--variants", "plain", spoil=spoil)
    assert code == 0 and report["errors"] == 0
    assert faults(report) == {kind: 2 * n for kind, n in Counter(row[1] for row in SPOILT.values()).items()}
    assert report["passed"]["items"] - report["passed"]["passed"] == 2 * len(SPOILT)
    assert report["failed_calls"]["failed"] == 2 * sum(row[2] for row in SPOILT.values())
    assert report["malformed_calls"]["failed"] == 2 * sum(row[3] for row in SPOILT.values())
    items = read_run(tmp_path / "tools.jsonl").items
    for scenario, (_, fault, failed, malformed) in SPOILT.items():
        for stream in ("streamed", "whole"):
            data = items[f"{scenario}.{stream}.plain.0"].data
            assert {found["kind"] for found in data["faults"]} == {fault}, scenario
            assert (data["failed_calls"], data["malformed_calls"]) == (failed, malformed), scenario


def test_results_that_are_not_used(ask: Ask) -> None:
    def spoil(_scenario: Scenario, step: Step, reply: Reply) -> Reply:
        return Reply("All done.") if step.answer else reply

    _, report = ask(*SMALL, "--scenarios", "multi_turn", spoil=spoil)
    with_figure = sum(any(step.answer for step in s.steps) for s in SCENARIOS if s.kind == "multi_turn")
    assert faults(report) == {"result_not_used": with_figure}
    assert report["failed_calls"]["failed"] == 0
    assert report["by_kind"]["multi_turn"]["passed"] == 10 - with_figure


def test_streamed_and_whole_may_differ(ask: Ask, oracle: Oracle) -> None:
    right = perfect()

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        reply = right(path, body)
        if reply is not None and body.get("stream") and body["max_tokens"] == 4096:
            return Reply("No.", reply.reasoning)
        return reply

    oracle.respond = respond
    _, report = ask("--depth-tokens", "0", "--variants", "plain", "--scenarios", "single-weather,single-timer")
    assert report["streamed_equals_whole"]["differ"] == [
        "single-timer.streamed.plain.0",
        "single-weather.streamed.plain.0",
    ]
    assert report["by_streaming"]["streamed"]["passed"] == 0 and report["by_streaming"]["whole"]["passed"] == 2

"""``step128-eval tools``: calls that vanish are failures, not hidden thinking; scenarios are what is counted by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle, Reply
from tool_answers import perfect

from step128_evals.runs import read_run
from step128_evals.tools.summary import score

Report = dict[str, Any]
Respond = Callable[[str, dict[str, Any]], Reply | None]
SMALL = ("--depth-tokens", "0", "--variants", "whole,plain", "--scenarios", "single")


Ask = Callable[..., tuple[int, Report]]


def changed(change: Callable[[dict[str, Any], Reply], Reply]) -> Respond:
    """The perfect oracle, its chats changed."""
    right = perfect()

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        reply = right(path, body)
        return change(body, reply) if reply is not None else None

    return respond


def is_item(body: dict[str, Any]) -> bool:
    return bool(body["max_tokens"] == 4096)


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (Reply("", tokens=60), "missing_call"),
        (Reply("Let me see.", tokens=60), "missing_call"),
        (Reply("", tokens=4096, finish_reason="length"), "truncated"),
        (Reply("One moment.</think>\n"), "leaked_tags"),
    ],
)
def test_a_call_that_vanished_is_no_hidden_thinking(ask: Ask, oracle: Oracle, reply: Reply, fault: str) -> None:
    oracle.respond = changed(lambda body, right: reply if is_item(body) else right)
    code, report = ask(*SMALL)
    assert code == 0 and report["unsupported"]["items"] == 0
    assert report["failed_calls"]["failed"] == 10 and report["faults"][fault] == 10


def test_arguments_nested_thousands_deep(ask: Ask, oracle: Oracle) -> None:
    deep = Reply(tool_calls=(("get_weather", "[" * 20_000),))
    oracle.respond = changed(lambda body, right: deep if is_item(body) else right)
    code, report = ask("--depth-tokens", "0", "--variants", "plain", "--scenarios", "single-weather")
    assert code == 0 and report["faults"]["invalid_json"] == 2


def test_the_wanted_effort_is_tried_first(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    """The easy question is thought about with high only."""

    def change(body: dict[str, Any], reply: Reply) -> Reply:
        return reply if body.get("reasoning_effort") == "high" else replace(reply, reasoning="")

    oracle.respond = changed(change)
    options = ("--depth-tokens", "0", "--scenarios", "single", "--variants", "whole,thinking")
    code, report = ask(*options, "--reasoning-effort", "high")
    assert code == 0 and report["passed"]["passed"] == 10
    assert read_run(tmp_path / "tools.jsonl").manifest.settings["reasoning_effort"] == "high"


def test_variants_of_a_scenario_are_one_score(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    def change(body: dict[str, Any], reply: Reply) -> Reply:
        return Reply("No.") if is_item(body) and body["stream"] and "Lisbon" in str(body["messages"]) else reply

    oracle.respond = changed(change)
    report = ask("--depth-tokens", "0", "--variants", "plain", "--scenarios", "single")[1]
    scores = score(read_run(tmp_path / "tools.jsonl"))
    assert len(scores) == 10 and scores["single-weather"] == 0.5 and sum(scores.values()) == 9.5
    assert (report["failed_scenarios"]["failed"], report["failed_scenarios"]["scenarios"]) == (1, 10)

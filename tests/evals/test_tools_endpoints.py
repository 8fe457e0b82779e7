"""``step128-eval tools`` against endpoints that lack something, fail, or break off; depth, reports, resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle, Reply, words
from tool_answers import BY_ID, SCENARIOS, Spoil, perfect

from step128_evals.runs import read_run
from step128_evals.tools.summary import headline, markdown, score, summarize, text

Report = dict[str, Any]
Respond = Callable[[str, dict[str, Any]], Reply | None]
SMALL = ("--depth-tokens", "0", "--variants", "whole,plain", "--scenarios", "single")


Ask = Callable[..., tuple[int, Report]]


def changed(change: Callable[[dict[str, Any], Reply], Reply], spoil: Spoil | None = None) -> Respond:
    """The perfect oracle, its chats changed."""
    right = perfect(spoil) if spoil else perfect()

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        reply = right(path, body)
        return change(body, reply) if reply is not None else None

    return respond


def is_item(body: dict[str, Any]) -> bool:
    return bool(body["max_tokens"] == 4096)


def test_thinking_that_cannot_be_switched_off(ask: Ask, oracle: Oracle) -> None:
    """As Step-3.7: the template opens the thought, whatever the request says."""
    oracle.respond = changed(lambda _, reply: replace(reply, reasoning="Hm, let me think."))
    code, report = ask("--depth-tokens", "0", "--scenarios", "single")
    assert code == 0 and report["unsupported"]["items"] == 20 and list(report["by_thinking"]) == ["thinking"]
    (why,) = report["unsupported"]["reasons"]
    assert "thinking cannot be switched off: asked plainly: it thinks" in why
    assert 'asked with {"reasoning_effort": "none"}: it thinks' in why and "enable_thinking" in why
    assert ask("--depth-tokens", "0", "--scenarios", "single", "--variants", "plain", "--fresh")[0] == 4


def test_a_switch_that_is_refused(ask: Ask, oracle: Oracle) -> None:
    def change(body: dict[str, Any], reply: Reply) -> Reply:
        if body.get("reasoning_effort") == "none":
            return Reply("there is no effort of that name", status=400)
        kwargs = body.get("chat_template_kwargs", {})
        return replace(reply, reasoning="Hm." if kwargs.get("enable_thinking", True) else "")

    oracle.respond = changed(change)
    code, report = ask("--depth-tokens", "0", "--scenarios", "single")
    assert code == 0 and report["passed"]["passed"] == 40
    asked = [body for body in oracle.chats() if is_item(body)]
    assert sum(body.get("chat_template_kwargs", {}).get("enable_thinking") is False for body in asked) == 20


def test_an_endpoint_that_never_thinks(ask: Ask, oracle: Oracle) -> None:
    oracle.respond = changed(lambda _, reply: replace(reply, reasoning=""))
    code, report = ask("--depth-tokens", "0", "--scenarios", "single")
    assert code == 0 and list(report["by_thinking"]) == ["plain"] and report["passed"]["passed"] == 20
    assert "thinking cannot be switched on" in next(iter(report["unsupported"]["reasons"]))


def test_thinking_that_is_hidden_is_not_off(ask: Ask, oracle: Oracle) -> None:
    def change(body: dict[str, Any], reply: Reply) -> Reply:
        off = body.get("reasoning_effort") == "none"
        return replace(reply, tokens=1000) if off and is_item(body) else reply

    oracle.respond = changed(change)
    code, report = ask(*SMALL)
    assert code == 4 and report["unsupported"] == "thinking is switched off, and it thinks all the same"


def test_the_effort_of_thinking(ask: Ask, oracle: Oracle) -> None:
    ask("--depth-tokens", "0", "--scenarios", "single", "--variants", "whole", "--reasoning-effort", "high")
    efforts = [body.get("reasoning_effort") for body in oracle.chats() if is_item(body)]
    assert sorted(efforts) == ["high"] * 10 + ["none"] * 10


def test_without_tools(ask: Ask, oracle: Oracle) -> None:
    oracle.respond = changed(lambda body, reply: Reply("no --jinja", status=500) if body.get("tools") else reply)
    code, report = ask(*SMALL)
    assert code == 4 and "has no tools" in report["error"]


def test_tools_that_do_not_reach_the_prompt(ask: Ask, oracle: Oracle) -> None:
    """As llama.cpp's server with a template that has none: the oracle counts messages only."""
    oracle.respond = changed(lambda body, reply: Reply("Hello!") if body["max_tokens"] == 1 else reply)
    code, report = ask(*SMALL)
    assert code == 4 and "leaves them out of the prompt, which has 1 tokens with and without" in report["error"]
    oracle.respond = changed(lambda body, reply: Reply("Hi", usage=False) if body["max_tokens"] == 1 else reply)
    assert ask(*SMALL)[0] == 0


def test_tool_choices_that_are_refused(ask: Ask, oracle: Oracle) -> None:
    def change(body: dict[str, Any], reply: Reply) -> Reply:
        return Reply("tool_choice must be auto", status=400) if body.get("tool_choice", "auto") != "auto" else reply

    oracle.respond = changed(change)
    code, report = ask("--depth-tokens", "0", "--variants", "whole,plain", "--scenarios", "choice,single")
    assert code == 0 and report["passed"]["passed"] == 10
    assert report["unsupported"]["items"] == 4
    (why,) = report["unsupported"]["reasons"]
    assert "status 400" in why and why.endswith("tool_choice must be auto")


def test_depth(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    oracle.context_tokens = 20_000
    code, report = ask("--depth-tokens", "0,9k,64k", "--variants", "whole", "--scenarios", "single-weather,errors")
    assert code == 0
    assert {name: row["passed"] for name, row in report["by_depth"].items()} == {"0": 10, "9216": 10}
    assert report["unsupported"]["items"] == 10
    assert "65536 tokens of filler, 3072 for the scenario" in next(iter(report["unsupported"]["reasons"]))
    user = BY_ID["single-weather"].steps[0].user
    asked = [body["messages"] for body in oracle.chats() if is_item(body) and body["messages"][-1]["content"] == user]
    plain, deep = sorted(asked, key=len)[::2][:2]
    filler = [message["content"] for message in deep[:-1]]
    shown = [text.partition("\n\n")[2] for text in filler[::2]]
    assert 0.99 * 9216 < sum(len(words(text)) for text in shown) <= 9216
    assert [message["role"] for message in deep] == ["user", "assistant"] * 3 + ["user"]
    assert "def " in shown[1] and "def " not in shown[0][:500]
    assert len(plain) == 1
    tokens, sha256 = read_run(tmp_path / "tools.jsonl").manifest.settings["fillers"]["9216"]
    assert 0.99 * 9216 < tokens <= 9216 and len(sha256) == 64


def test_depth_without_a_tokenizer_or_a_known_context(ask: Ask, oracle: Oracle) -> None:
    """The filler is estimated by the server's count of prompt tokens; what it then refuses is unsupported."""
    oracle.context_tokens, oracle.lacking = None, frozenset({"/tokenize"})

    def change(body: dict[str, Any], reply: Reply) -> Reply:
        return Reply("context exceeded", status=400) if len(str(body["messages"])) > 40_000 else reply

    oracle.respond = changed(change)
    options = ("--variants", "whole,plain", "--scenarios", "single")
    assert ask("--depth-tokens", "1k", *options)[1]["passed"]["passed"] == 10
    code, report = ask("--depth-tokens", "16k", *options, "--fresh")
    assert code == 4 and report["unsupported"].endswith("context exceeded")


def test_a_context_too_small_for_any(ask: Ask, oracle: Oracle) -> None:
    oracle.context_tokens = 2048
    code, report = ask(*SMALL)
    assert code == 65 and report["error"].endswith("context of 2048 tokens: pass a smaller --max-tokens")


def test_failures_of_the_endpoint_are_errors_and_are_asked_again(ask: Ask, oracle: Oracle) -> None:
    asked = count()
    bad = (
        Reply("out of memory", status=500),
        Reply("not JSON", raw="<html>"),
        Reply("this is cut off somewhere", cut_after=1),
        Reply("the ends of this answer do not come", cut_after=3),
    )

    def change(body: dict[str, Any], reply: Reply) -> Reply:
        if not is_item(body):
            return reply
        number = next(asked)
        return bad[number // 3 % len(bad)] if number % 3 == 0 else replace(reply, delay_seconds=0.01)

    oracle.respond = changed(change)
    options = ("--depth-tokens", "0", "--variants", "plain", "--scenarios", "single", "--concurrency", "1")
    code, report = ask(*options)
    assert code == 70
    assert (report["errors"], report["passed"]["items"], report["passed"]["passed"]) == (7, 13, 13)
    assert report["failed_calls"]["failed"] == 0
    before = len(oracle.chats())
    oracle.respond = perfect()
    code, report = ask(*options)
    assert code == 0 and report["passed"]["passed"] == 20 and report["errors"] == 0
    assert sum(is_item(body) for body in oracle.chats()[before:]) == 7


def test_an_endpoint_that_dies(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    asked = count()

    def change(body: dict[str, Any], reply: Reply) -> Reply:
        return Reply("dead", status=503) if is_item(body) and next(asked) >= 3 else reply

    oracle.respond = changed(change)
    code, report = ask(*SMALL, "--concurrency", "1")
    assert code == 70 and "stopped after 5 errors in a row" in report["error"]
    run = read_run(tmp_path / "tools.jsonl")
    assert len(run.with_status("passed")) == 3
    partial = replace(run, manifest=replace(run.manifest, items_total=10))
    assert "Not whole: 7 of 10 conversations have no outcome yet." in text(summarize(partial))


def test_other_scenarios_are_another_run(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    ask(*SMALL)
    code, report = ask("--depth-tokens", "0", "--variants", "whole,plain", "--scenarios", "errors")
    assert code == 65 and "holds another run: scenarios was" in report["error"]


def test_report(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    def change(body: dict[str, Any], reply: Reply) -> Reply:
        return Reply("No.") if is_item(body) and len(reply.tool_calls) > 1 else reply

    oracle.respond = changed(change)
    ask("--depth-tokens", "0", "--variants", "plain")
    run = read_run(tmp_path / "tools.jsonl")
    summary = summarize(run)
    document = markdown(run, summary, tmp_path)
    assert "| parallel | 0 | 14 | 0.0% [0.0%, 21.5%] |" in document
    assert (
        "| missing call | 14 |" in document
        and "0 malformed in 56 scenarios still allows up to 6.42% of scenarios" in document
    )
    assert "Streamed and whole answers alike" in document and "names no count" in document
    picture = (tmp_path / "tools.svg").read_text()
    assert picture.startswith("<?xml") and len(picture) > 10_000
    assert headline(summary).startswith("38 of 154 calls failed, in 7 of 56 scenarios, 12.5%") and headline(
        summary
    ).endswith("120 of 134 conversations passed")
    scores = score(run)
    assert len(scores) == len(SCENARIOS) and sum(scores.values()) == 60
    empty = replace(run, items={}, manifest=replace(run.manifest, items_total=5))
    assert "Not whole: 5 of 5" in markdown(empty, summarize(empty), tmp_path)
    assert "so nothing can be said" in text(summarize(empty)) and headline(summarize(empty)) == "nothing answered"


def test_list_asks_nothing(ask: Ask, oracle: Oracle) -> None:
    code, report = ask("--list", "--scenarios", "choice")
    assert code == 0 and len(report["scenarios"]) == 4 and oracle.requests == []


def test_wrong_usage(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ask("--variants", "whole,loud")
    assert "unknown: loud" in capsys.readouterr().err
    assert ask("--scenarios", "nothing")[0] == 65

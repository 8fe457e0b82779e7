"""``step128-eval reasoning``: lengths, right answers and verdict are exactly what the oracle was scripted to give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle, Reply, words

from step128_evals.cli import main
from step128_evals.reasoning.problems import make_problems
from step128_evals.reasoning.summary import headline, markdown, score, summarize, text
from step128_evals.runs import Item, Manifest, Run, read_run

Report = dict[str, Any]
PROBLEMS = make_problems(12)
BY_QUESTION = {problem.question: problem for problem in PROBLEMS}
WORDS = {"low": 10, "medium": 20, "high": 40}


def thinking(lengths: dict[str, int], usage: int | None = None) -> Callable[[str, dict[str, Any]], Reply | None]:
    """Thinks so many words a level, and one more for each problem; right but for the second problem."""

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        if path != "/v1/chat/completions" or body["max_tokens"] == 4:
            return None
        problem = BY_QUESTION[body["messages"][0]["content"]]
        number = PROBLEMS.index(problem)
        said = "17" if number == 1 else problem.answer
        return Reply(f"So that is it.\n**Answer:** {said}.", "a" * (lengths[body["reasoning_effort"]] + number))

    return respond


@pytest.fixture
def ask(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Report]]:
    oracle.respond = thinking(WORDS)

    def run(*options: str) -> tuple[int, Report]:
        arguments = ["reasoning", "--base-url", oracle.url, "--json", "--out", "r.jsonl", "--problems", "12", *options]
        code = main(arguments)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


Ask = Callable[..., tuple[int, Report]]


def characters(oracle: Oracle) -> None:
    oracle.lacking = frozenset({"/tokenize"})


def test_levels_that_differ(ask: Ask, oracle: Oracle) -> None:
    characters(oracle)
    code, report = ask()
    assert code == 0 and report["changes"] is True and report["monotone"] is True
    assert report["verdict"] == "the level changes the amount of thinking"
    assert report["unit"].startswith("characters")
    # Lengths are the level's and 0 to 11 more: their mean is 5.5 above.
    assert {level: row["mean"] for level, row in report["levels"].items()} == {
        level: words + 5.5 for level, words in WORDS.items()
    }
    assert report["pairs"]["low_to_high"]["mean_difference"] == 30.0
    assert report["pairs"]["low_to_high"]["interval"] is None  # all differences are equal
    assert report["pairs"]["medium_to_high"]["longer"] == 12
    # Twelve differences of one sign: exact, 2 of the 2^12 ways to give them signs.
    assert report["pairs"]["low_to_medium"]["wilcoxon_p"] == pytest.approx(2 / 2**12)
    assert [row["correct"] for row in report["levels"].values()] == [11, 11, 11]
    assert (report["leaked"], report["truncated"]) == (0, 0)
    asked = [body for body in oracle.chats() if body["max_tokens"] == 16384]
    assert sorted(body["reasoning_effort"] for body in asked) == ["high"] * 12 + ["low"] * 12 + ["medium"] * 12


def test_levels_that_change_nothing_are_a_result(ask: Ask, oracle: Oracle) -> None:
    characters(oracle)
    oracle.respond = thinking(dict.fromkeys(WORDS, 30))
    code, report = ask()
    assert code == 0 and report["changes"] is False and report["monotone"] is False
    assert report["verdict"].startswith("no change of the amount of thinking was measured")
    assert report["pairs"]["low_to_high"]["wilcoxon_p"] == 1.0


def test_levels_the_wrong_way(ask: Ask, oracle: Oracle) -> None:
    characters(oracle)
    oracle.respond = thinking({"low": 40, "medium": 20, "high": 10})
    report = ask()[1]
    assert report["changes"] is True and "the wrong way" in report["verdict"] and report["monotone"] is False


def test_no_reasoning_at_all(ask: Ask, oracle: Oracle) -> None:
    oracle.respond = lambda path, body: Reply("Answer: 1") if path == "/v1/chat/completions" else None
    report = ask()[1]
    assert report["verdict"] == "the endpoint takes reasoning_effort and shows no reasoning at any level"
    assert report["changes"] is False


def test_tokens_by_the_servers_tokenizer(ask: Ask, oracle: Oracle) -> None:
    oracle.respond = lambda path, body: Reply("Answer: 1", "one two three") if path == "/v1/chat/completions" else None
    report = ask("--levels", "low,high")[1]
    assert report["unit"] == "tokens (the reasoning, by the server's tokenizer)"
    assert report["levels"]["low"]["mean"] == len(words("one two three")) == 5
    assert list(report["pairs"]) == ["low_to_high"]


def test_reasoning_left_in_the_text_is_measured_and_is_a_leak(ask: Ask, oracle: Oracle) -> None:
    characters(oracle)

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        reply = thinking(WORDS)(path, body)
        return reply and Reply(f"<think>{reply.reasoning}</think>\n{reply.text}")

    oracle.respond = respond
    report = ask()[1]
    assert report["leaked"] == 36 and report["levels"]["low"]["mean"] == 15.5
    assert report["levels"]["low"]["correct"] == 11


def test_cut_answers_are_counted(ask: Ask, oracle: Oracle) -> None:
    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        reply = thinking(WORDS)(path, body)
        high = reply is not None and body["reasoning_effort"] == "high"
        return replace(reply, text="", finish_reason="length") if reply and high else reply

    oracle.respond = respond
    report = ask("--max-tokens", "99")[1]
    assert report["truncated"] == report["levels"]["high"]["truncated"] == 12
    assert report["levels"]["high"]["correct"] == 0


def test_an_endpoint_that_refuses(ask: Ask, oracle: Oracle) -> None:
    right = thinking(WORDS)
    oracle.respond = lambda path, body: (
        Reply("no such field", status=400) if "reasoning_effort" in body else right(path, body)
    )
    code, report = ask()
    assert code == 4 and "has no reasoning effort" in report["error"] and "no such field" in report["error"]
    oracle.respond = lambda path, body: (
        Reply("only low", status=400) if body.get("reasoning_effort", "low") != "low" else right(path, body)
    )
    code, report = ask()
    assert code == 0 and list(report["levels"]) == ["low"] and len(report["unsupported"]) == 1
    assert report["verdict"].startswith("cannot be said") and report["changes"] is None


def test_failures_are_errors_and_are_asked_again(ask: Ask, oracle: Oracle) -> None:
    asked = count()
    bad = (Reply("oh", status=500), Reply("cut off here", cut_after=1), Reply("", raw="<html>"))
    right = thinking(WORDS)

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        reply = right(path, body)
        number = next(asked) if reply is not None else -1
        return bad[number // 4 % 3] if reply is not None and number % 4 == 0 else reply

    oracle.respond = respond
    code, report = ask("--concurrency", "1")
    assert code == 70 and report["errors"] == 9
    assert sum(row["items"] for row in report["levels"].values()) == 27
    oracle.respond = right
    before = len(oracle.chats())
    code, report = ask()
    assert code == 0 and [row["items"] for row in report["levels"].values()] == [12, 12, 12]
    assert sum(body["max_tokens"] > 4 for body in oracle.chats()[before:]) == 9


def test_a_small_context(ask: Ask, oracle: Oracle) -> None:
    oracle.context_tokens = 3000
    assert ask("--problems", "1")[0] == 0
    assert oracle.chats()[-1]["max_tokens"] == 1976
    code, report = ask("--problems", "1", "--max-tokens", "2500", "--fresh")
    assert code == 65 and "the context of 3000 tokens has no room" in report["error"]
    oracle.context_tokens = 900
    assert ask("--problems", "1", "--fresh")[0] == 65


def test_report(ask: Ask, oracle: Oracle, tmp_path: Path) -> None:
    characters(oracle)
    ask()
    run = read_run(tmp_path / "r.jsonl")
    summary = summarize(run)
    document = markdown(run, summary, tmp_path)
    assert "Verdict: the level changes the amount of thinking." in document
    assert "| low | 12 | 15.5 [13.5, 17.5] | 16 | 92 [65, 99] % | 0 |" in document
    assert "| low to high | 12 | 30.0 | 12 | 0 | 0.0005 |" in document
    assert "(reasoning.svg)" in document and (tmp_path / "reasoning.svg").stat().st_size > 5000
    assert headline(summary) == "the level changes the amount of thinking (low/medium/high: 16 / 26 / 46 characters)"
    assert sum(score(run).values()) == 33 and len(score(run)) == 36
    half = dict(list(run.items.items())[:18])
    partial = replace(run, items=half, manifest=replace(run.manifest, items_total=36))
    assert "Not whole: 18 of 36 questions have no outcome yet." in text(summarize(partial))
    none = replace(run, items={})
    assert (
        "cannot be said" in markdown(none, summarize(none), tmp_path)
        and headline(summarize(none)) == "nothing answered"
    )


def made(lengths: dict[str, list[int]], usage: bool) -> Run:
    items = [
        Item(
            f"p{number}.{level}",
            "passed",
            data={
                "problem": f"p{number}",
                "level": level,
                "correct": True,
                "leaked": False,
                "truncated": False,
                "reasoning": {"usage_tokens": value if usage else 0, "tokenizer_tokens": None, "characters": 4 * value},
            },
        )
        for level, values in lengths.items()
        for number, value in enumerate(values)
    ]
    return Run(Manifest("reasoning", "m", "http://h", {}, {}), {item.id: item for item in items}, Path("r.jsonl"))


def test_noise_is_no_change_and_a_server_that_counts_nought_is_not_believed() -> None:
    generator = np.random.default_rng(42)
    low, high = (generator.integers(50, 500, 24).tolist() for _ in range(2))
    noise = summarize(made({"low": low, "high": high}, usage=True))
    assert noise["changes"] is False and noise["pairs"]["low_to_high"]["wilcoxon_p"] > 0.05
    first = summarize(made({"low": [1, 1, 1, 1, 1, 1], "high": [2, 3, 4, 5, 6, 7]}, usage=True))
    assert first["pairs"]["low_to_high"]["wilcoxon_p"] == 2 / 2**6
    summary = summarize(made({"low": low, "high": [value + 200 for value in low]}, usage=True))
    assert summary["changes"] is True and summary["unit"] == "tokens (the server's own count of reasoning)"
    assert summarize(made({"low": low}, usage=False))["unit"].startswith("characters")


def test_a_few_pairs_are_not_enough() -> None:
    """Five rises of five are p = 0.0625, which a bootstrap takes for certain."""
    few = summarize(made({"low": [1] * 5, "high": [2, 3, 4, 5, 6]}, usage=True))
    assert few["changes"] is None and few["verdict"].startswith("cannot be said: fewer than 6")
    # The interval of the mean lies above zero; the ranks, p = 0.156, do not tell.
    ranks = summarize(made({"low": [10] * 6, "high": [9, 8, 20, 21, 22, 23]}, usage=True))
    pair = ranks["pairs"]["low_to_high"]
    assert pair["interval"]["low"] > 0 and pair["wilcoxon_p"] > 0.05 and ranks["changes"] is False


def test_figures_do_not_depend_on_which_answer_came_first() -> None:
    run = made({"low": [3, 1, 4, 1, 5, 9, 2, 6], "high": [2, 7, 1, 8, 2, 8, 1, 8]}, usage=True)
    backwards = replace(run, items=dict(reversed(run.items.items())))
    assert summarize(run) == summarize(backwards)

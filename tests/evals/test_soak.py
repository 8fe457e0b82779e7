from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from counting import Counting
from oracle import Oracle, Reply

from step128_evals.cli import main
from step128_evals.evaluation import summary_of
from step128_evals.runs import read_run
from step128_evals.soak.plan import WEIGHTS, Plan

QUICK = ["--minutes", "0.02", "--canary-seconds", "0.3", "--sample-seconds", "0.1", "--concurrency", "2", "--json"]


def run(oracle: Oracle, *options: str) -> int:
    return main(["soak", "--base-url", oracle.url, *options])


@pytest.fixture
def server(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Counting:
    # A real server takes time to answer; this one would answer thousands of requests in a second.
    monkeypatch.setattr("step128_evals.soak.session._STEP_SECONDS", 0.02)
    counting = Counting(oracle, resident=lambda: 1e9)
    counting.answer = lambda path, body: Reply("one two three", tokens=8, delay_seconds=0.02)
    return counting


def test_a_sound_server_passes(server: Counting, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(server.oracle, *QUICK, "--out", "soak.jsonl") == 0
    report = json.loads(capsys.readouterr().out)
    outcomes = {name: verdict["outcome"] for name, verdict in report["verdicts"].items()}
    assert report["failed"] == 0 and report["whole"] and report["requests"] > 10
    assert outcomes["errors"] == outcomes["drained"] == outcomes["canary"] == "passed"
    assert "failed" not in outcomes.values()
    assert report["minutes"] == pytest.approx(0.02, rel=0.01)
    result = read_run(tmp_path / "soak.jsonl")
    asked = [item.data["kind"] for id, item in result.items.items() if id.startswith("request-")]
    plan = Plan(1.2, 2, tuple(WEIGHTS), 42)
    assert sorted(asked) == sorted(plan.request(number).kind for number in range(len(asked)))
    module = summary_of("soak")
    summary = module.summarize(result)
    assert "![timeline](soak.svg)" in module.markdown(result, summary, tmp_path)
    assert (tmp_path / "soak.svg").stat().st_size > 5000
    assert set(module.score(result).values()) == {1.0}
    assert module.text(summary).startswith(f"0.0 of 0.02 minutes, {len(asked)} requests.")
    count = len(server.oracle.requests)
    assert run(server.oracle, *QUICK, "--out", "soak.jsonl") == 0  # nothing is left to do but the probe
    assert len(server.oracle.requests) < count + 12


def test_failures_are_counted_and_the_soak_goes_on(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        if "tools" in body and body["max_tokens"] > 4:  # the probe asks for 4 tokens
            return Reply("no tools today", status=500)
        return Reply("one two three", tokens=8, delay_seconds=0.02)

    server.answer = answer
    assert run(server.oracle, *QUICK) == 70
    report = json.loads(capsys.readouterr().out)
    failed = report["kinds"]["tools"]["failed"]
    assert report["failed"] == failed == report["kinds"]["tools"]["requests"] > 0
    verdict = report["verdicts"]["errors"]
    assert (
        verdict["outcome"] == "failed" and f"{failed} times: " in verdict["why"] and "no tools today" in verdict["why"]
    )


def test_cut_streams_are_failures_and_our_own_are_not(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        long = Reply("word " * 400, tokens=400, delay_seconds=0.01)
        return long if body.get("stream") else Reply("one two", tokens=2, delay_seconds=0.01)

    server.answer = answer
    assert run(server.oracle, *QUICK, "--kinds", "cancelled,whole") == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["kinds"]["cancelled"]["cancelled"] <= report["kinds"]["cancelled"]["requests"]
    server.answer = lambda path, body: Reply("x" * 90, cut_after=4) if body.get("max_tokens", 0) > 4 else None
    assert run(server.oracle, *QUICK, "--kinds", "chat", "--out", "cut.jsonl") == 70


def test_a_server_that_is_gone_ends_the_soak(
    server: Counting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step128_evals.soak.session.FAILURES_IN_A_ROW", 4)
    server.answer = lambda path, body: Reply("x" * 90, cut_after=1) if len(server.oracle.requests) > 20 else None
    assert run(server.oracle, *QUICK, "--minutes", "5", "--kinds", "chat") == 70
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert not report["whole"] and report["minutes"] < 1 and report["failed"] >= 4
    assert report["verdicts"]["drained"]["outcome"] == "unsupported"
    assert "the same command goes on with the rest" in captured.err


def test_an_interrupted_soak_goes_on_with_what_is_left(
    server: Counting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from step128_evals.soak import command

    class Stopped(command.Session):
        async def run(self) -> None:
            async with asyncio.timeout(0.7):
                await super().run()

    with monkeypatch.context() as patch:
        patch.setattr(command, "Session", Stopped)
        run(server.oracle, *QUICK, "--out", "soak.jsonl")
    capsys.readouterr()
    before = read_run(tmp_path / "soak.jsonl")
    assert main(["show", "soak.jsonl", "--json"]) != 1
    assert "not whole" in summary_of("soak").text(summary_of("soak").summarize(before))
    assert run(server.oracle, *QUICK, "--out", "soak.jsonl") == 0
    after = read_run(tmp_path / "soak.jsonl")
    assert after.items["session-2"].data["at"] == pytest.approx(max(i.data.get("at", 0) for i in before.items.values()))
    ids = [id for id in after.items if id.startswith("request-")]
    assert len(ids) == len(set(ids)) > sum(id.startswith("request-") for id in before.items)
    assert after.items["whole"].data["at"] < 1.2 + 1.0  # not the whole time anew
    text = summary_of("soak").text(summary_of("soak").summarize(after))
    assert "interrupted and resumed at minute 0.0" in text
    assert run(server.oracle, *QUICK, "--minutes", "1", "--out", "soak.jsonl") == 65


def test_what_the_server_does_not_take_is_left_out(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        picture = any(isinstance(message.get("content"), list) for message in body.get("messages", []))
        return Reply("no such feature", status=400) if picture or "tools" in body else None

    server.answer = answer
    server.oracle.metrics = None
    assert run(server.oracle, *QUICK) == 0
    report = json.loads(capsys.readouterr().out)
    assert not {"tools", "image"} & set(report["kinds"])
    assert report["verdicts"]["memory"]["outcome"] == report["verdicts"]["drained"]["outcome"] == "unsupported"
    assert run(server.oracle, *QUICK, "--kinds", "image", "--out", "other.jsonl") == 4
    server.oracle.lacking = frozenset({"/v1/chat/completions"})
    assert run(server.oracle, *QUICK, "--out", "third.jsonl") == 4


def test_thirds_have_the_same_load() -> None:
    plan = Plan(600, 8, ("chat",), 42)
    thirds = [
        Counter(plan.requests_at_once(second + 0.5) for second in range(start, start + 200)) for start in (0, 200, 400)
    ]
    assert thirds[0] == thirds[1] == thirds[2] and set(thirds[0]) == {1, 2, 4, 8}
    orders = [[plan.requests_at_once(s) for s in range(start, start + 200)] for start in (0, 200, 400)]
    assert orders[0] != orders[1]
    assert Plan(600, 1, ("chat",), 42).requests_at_once(599.9) == 1
    shares = Counter(Plan(1, 8, tuple(WEIGHTS), 42).request(number).kind for number in range(3000))
    for kind, weight in WEIGHTS.items():
        assert shares[kind] / 3000 == pytest.approx(weight / sum(WEIGHTS.values()), abs=0.03)


def test_a_stream_that_is_broken_off_is_closed(oracle: Oracle) -> None:
    """The server must see that the client went away, or it would go on generating."""
    from step128_evals.client import Client
    from step128_evals.depth.prompts import PromptMaker
    from step128_evals.probe import probe_endpoint
    from step128_evals.soak.plan import Request
    from step128_evals.soak.requests import Asker

    oracle.respond = lambda path, body: Reply("word " * 100_000) if body.get("max_tokens", 0) > 4 else None
    threads = threading.active_count()

    async def ask() -> dict[str, Any]:
        async with Client(oracle.url, "secret") as client:
            endpoint = await probe_endpoint(client, None, only=("streaming",))
            asker = Asker(client, endpoint, PromptMaker(client, endpoint), 64, 64)
            kept = await asker.ask(Request(0, "cancelled", 0.1))
            for _ in range(200):  # a handler that waits for a reader would stay
                if threading.active_count() <= threads + 1:
                    break
                await asyncio.sleep(0.01)
            return kept | {"threads": threading.active_count() - threads}

    kept = asyncio.run(ask())
    assert kept["cancelled"] and kept["pieces"] == 3
    assert kept["threads"] <= 1

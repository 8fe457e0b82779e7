from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from counting import Counting
from oracle import Oracle, Reply

from step128_evals.cli import main
from step128_evals.evaluation import summary_of
from step128_evals.runs import Item, Manifest, Run, read_run
from step128_evals.soak.plan import WEIGHTS, Plan
from step128_evals.soak.verdicts import all_verdicts

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


def soak(*items: Item, minutes: float = 60) -> Run:
    manifest = Manifest("soak", "m", "http://h", {"minutes": minutes}, {})
    return Run(manifest, {item.id: item for item in items}, Path("x"))


def samples(memory: Any, count: int = 100) -> list[Item]:
    noise = random.Random(1)
    shared = {"kind": "sample", "drained": False, "running": 1, "waiting": 0, "kv_cache_usage": 0.1}
    return [
        Item(f"s{i}", "measured", data=shared | {"at": i * 36.0, "resident_bytes": memory(i) + noise.gauss(0, 1e6)})
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("memory", "outcome"),
    [
        (lambda i: 1e9, "passed"),
        (lambda i: 1e9 + 1e6 * i, "failed"),  # 0.1 GB an hour
        (lambda i: 1e9 + min(i, 15) * 2e7, "passed"),  # grows in the first fifth, then rests
        (lambda i: 1e9 + (i > 45) * 2e8, "passed"),  # taken once, in the middle
        (lambda i: 1e9 + 1e4 * i, "passed"),  # surely more than nothing, and too little to matter
    ],
)
def test_memory(memory: Any, outcome: str) -> None:
    verdict = all_verdicts(soak(*samples(memory)))["memory"]
    assert verdict["outcome"] == outcome
    if outcome == "failed":
        assert verdict["mib_per_hour"] == pytest.approx(1e6 * 100 / 2**20, rel=0.05)
        assert verdict["mib_per_hour_interval"]["low"] > 90
    assert all_verdicts(soak(*samples(memory, count=7)))["memory"]["outcome"] == "unsupported"


def test_memory_that_never_changes_has_a_slope_of_zero() -> None:
    still = [Item(item.id, "measured", data=item.data | {"resident_bytes": 5e8}) for item in samples(lambda i: 0)]
    verdict = all_verdicts(soak(*still))["memory"]
    assert verdict["outcome"] == "passed" and verdict["mib_per_hour_interval"] == {"low": 0, "high": 0}


def chats(speed: Any, first: Any, count: int = 90) -> list[Item]:
    noise = random.Random(2)
    items = []
    for i in range(count):
        wait = first(i) * noise.uniform(0.9, 1.1)
        data = {"kind": "chat", "started_at": i * 40.0, "at": i * 40.0 + 1, "tokens": 11, "first_token_seconds": wait}
        items.append(Item(f"request-{i}", "passed", data=data | {"seconds": wait + 10 / speed(i)}))
    return items


@pytest.mark.parametrize(
    ("speed", "first", "decode", "first_token"),
    [
        (lambda i: 20, lambda i: 1.0, "passed", "passed"),
        (lambda i: 20 - i / 9, lambda i: 1.0, "failed", "passed"),
        (lambda i: 20, lambda i: 1 + i / 90, "passed", "failed"),
        (lambda i: 20 + i, lambda i: 1.0, "passed", "passed"),  # faster is no drift to complain of
    ],
)
def test_drift(speed: Any, first: Any, decode: str, first_token: str) -> None:
    verdicts = all_verdicts(soak(*chats(speed, first)))
    assert verdicts["drift_decode"]["outcome"] == decode
    assert verdicts["drift_first_token"]["outcome"] == first_token
    assert all_verdicts(soak(*chats(speed, first, 20)))["drift_decode"]["outcome"] == "unsupported"


@pytest.mark.parametrize(
    ("running", "usage", "outcome"),
    [(0, 0.0, "passed"), (1, 0.0, "failed"), (0, 0.3, "failed"), (None, None, "unsupported")],
)
def test_drained(running: int | None, usage: float | None, outcome: str) -> None:
    data = {"kind": "sample", "drained": True, "at": 9.0, "running": running, "waiting": 0, "kv_cache_usage": usage}
    verdict = all_verdicts(soak(Item("drained-1", "measured", data=data | {"resident_bytes": None})))["drained"]
    assert verdict["outcome"] == outcome


def sung(id: str, text: str, alone: str = "") -> Item:
    return Item(id, "passed", data={"kind": "canary", "at": 1.0, "alone": alone, "text": text})


def test_canary() -> None:
    before = [sung("a", "one, two", "before"), sung("b", "one, two", "before")]
    loaded = [sung("c", "one, two"), sung("d", "one, too")]
    verdict = all_verdicts(soak(*before, *loaded, sung("e", "one, two", "after")))["canary"]
    assert verdict["outcome"] == "passed" and verdict["distinct_under_load"] == 2
    assert verdict["as_before_under_load"] == 0.5
    assert all_verdicts(soak(*before, sung("e", "!!!!", "after")))["canary"]["outcome"] == "failed"
    assert all_verdicts(soak(*before, *loaded))["canary"]["outcome"] == "unsupported"


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

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from step128_evals.runs import Item, Manifest, Run
from step128_evals.soak.verdicts import all_verdicts


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

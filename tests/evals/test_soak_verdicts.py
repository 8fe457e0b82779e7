from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from step128_evals.runs import Item, Manifest, Run
from step128_evals.soak.summary import summarize, text
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
    ("memory", "outcome", "told"),
    [
        (lambda i: 1e9, "passed", "within the limit"),
        (lambda i: 1e9 + 1e6 * i, "failed", "so 64.0 MiB"),  # 0.1 GB an hour
        (lambda i: 1e9 + 6e5 * i, "passed", "64 MiB an hour"),  # 57 MiB an hour: surely something, and not enough
        (lambda i: 1e10 + 9e5 * i, "passed", "so 95.9 MiB"),  # 86 MiB an hour, and less than 1 % of 9.4 GiB
        (lambda i: 1e9 + min(i, 15) * 2e7, "passed", "within the limit"),  # grows in the first fifth, then rests
        (lambda i: 1e9 + (i > 45) * 2e8, "passed", "MiB were taken in the first half"),
        (lambda i: 1e9 + 7e5 * i + 4e7 * (i % 13), "unsupported", "too uncertain to tell: soak longer"),
    ],
)
def test_memory(memory: Any, outcome: str, told: str) -> None:
    verdict = all_verdicts(soak(*samples(memory)))["memory"]
    assert verdict["outcome"] == outcome, verdict
    assert told in verdict["why"] and "a leak is more than 1% and 64 MiB an hour" in verdict["why"]
    if outcome == "failed":
        assert verdict["mib_per_hour"] == pytest.approx(1e6 * 100 / 2**20, rel=0.05)
        assert verdict["mib_per_hour_interval"]["low"] > 90
    few = all_verdicts(soak(*samples(memory, count=7)))["memory"]
    assert few["outcome"] == "unsupported" and "soak longer" in few["why"]


def test_a_leak_is_found_in_ten_minutes_and_not_guessed_at_in_five() -> None:
    def leak(seconds: float) -> Item:
        data = {"kind": "sample", "drained": False, "running": 1, "waiting": 0, "kv_cache_usage": 0.1}
        return Item(f"s{seconds}", "measured", data=data | {"at": seconds, "resident_bytes": 4e9 + 1.6e5 * seconds})

    ten = all_verdicts(soak(*(leak(5.0 * i) for i in range(121)), minutes=10))["memory"]
    assert ten["outcome"] == "failed" and ten["mib_per_hour"] == pytest.approx(1.6e5 * 3600 / 2**20)
    five = all_verdicts(soak(*(leak(5.0 * i) for i in range(61)), minutes=5))["memory"]
    assert five["outcome"] == "unsupported" and "over 5 minutes" in five["why"]


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
        decode = 10 / speed(i) * noise.uniform(0.95, 1.05)
        items.append(Item(f"request-{i}", "passed", data=data | {"seconds": wait + decode}))
    return items


@pytest.mark.parametrize(
    ("speed", "first", "decode", "first_token"),
    [
        (lambda i: 20, lambda i: 1.0, "passed", "passed"),
        (lambda i: 20 - i / 9, lambda i: 1.0, "failed", "passed"),
        (lambda i: 20, lambda i: 1 + i / 90, "passed", "failed"),
        (lambda i: 20 - 4 * (i > 45), lambda i: 1.0, "failed", "passed"),
        (lambda i: 20, lambda i: 1 + 0.25 * (i > 45), "passed", "failed"),
        (lambda i: 20, lambda i: 1 + 0.1 * (i > 45), "passed", "unsupported"),  # the limit lies in the interval
        (lambda i: 20 - 1.8 * (i > 45), lambda i: 1.0, "unsupported", "passed"),
        (lambda i: 20 + i, lambda i: 1.0, "passed", "passed"),  # faster is no drift to complain of
    ],
)
def test_drift(speed: Any, first: Any, decode: str, first_token: str) -> None:
    verdicts = all_verdicts(soak(*chats(speed, first)))
    assert verdicts["drift_decode"]["outcome"] == decode
    assert verdicts["drift_first_token"]["outcome"] == first_token
    assert "the limit is at least 0.91" in verdicts["drift_decode"]["why"]
    assert "the limit is at most 1.10" in verdicts["drift_first_token"]["why"]
    for verdict in verdicts.values():
        assert ("too few chats to tell" in verdict["why"]) == (
            verdict["outcome"] == "unsupported" and "ratio" in verdict
        )
    assert all_verdicts(soak(*chats(speed, first, 20)))["drift_decode"]["outcome"] == "unsupported"


def test_little_evidence_is_no_pass() -> None:
    noise = random.Random(1)
    scattered = chats(lambda i: noise.lognormvariate(3, 1), lambda i: noise.lognormvariate(0, 1), 36)
    spread = [
        Item(i.id, "passed", data=i.data | {"started_at": n * 100.0, "at": n * 100.0 + 1})
        for n, i in enumerate(scattered)
    ]
    verdicts = all_verdicts(soak(*spread))
    assert verdicts["drift_first_token"]["ratio_interval"]["high"] > 1.1
    assert verdicts["drift_first_token"]["outcome"] == verdicts["drift_decode"]["outcome"] == "unsupported"


def test_answers_that_show_nothing_have_no_speed() -> None:
    silent = [
        Item(i.id, "passed", data=i.data | {"first_token_seconds": 0.0, "seconds": 0.0})
        for i in chats(lambda i: 20, lambda i: 1.0)
    ]
    verdicts = all_verdicts(soak(*silent))
    assert "no ratio" in verdicts["drift_first_token"]["why"]
    assert "fewer than 10" in verdicts["drift_decode"]["why"]
    assert {verdicts[name]["outcome"] for name in ("drift_first_token", "drift_decode")} == {"unsupported"}
    alike = [
        Item(i.id, "passed", data=i.data | {"first_token_seconds": 2.0, "seconds": 4.0})
        for i in chats(lambda i: 20, lambda i: 1.0)
    ]
    verdict = all_verdicts(soak(*alike))["drift_first_token"]
    assert verdict["outcome"] == "unsupported" and "has no interval" in verdict["why"]


def reading(id: str, running: int | None, usage: float | None, drained: bool) -> Item:
    data = {"kind": "sample", "drained": drained, "at": 9.0, "waiting": 0, "resident_bytes": None}
    return Item(id, "measured", data=data | {"running": running, "kv_cache_usage": usage})


@pytest.mark.parametrize(
    ("before", "running", "usage", "outcome"),
    [
        (None, 0, 0.0, "passed"),
        (None, 1, 0.0, "failed"),
        (None, 0, 0.0001, "failed"),
        ((0, 0.0), 0, 0.0099, "failed"),
        ((0, 0.0099), 0, 0.0099, "passed"),  # what it holds at rest is no leak
        ((0, 0.0099), 0, 0.01, "failed"),
        ((1, 0.5), 0, 0.3, "failed"),  # requests of others ran before: that was no rest
        (None, 0, None, "passed"),
        (None, None, None, "unsupported"),
    ],
)
def test_drained(before: tuple[int, float] | None, running: int | None, usage: float | None, outcome: str) -> None:
    rest = [reading("alone-before", *before, drained=False)] if before else []
    verdict = all_verdicts(soak(*rest, reading("drained-1", running, usage, drained=True)))["drained"]
    assert verdict["outcome"] == outcome


def sung(when: str, *texts: str) -> list[Item]:
    data = {"kind": "canary", "at": 1.0, "alone": when}
    return [Item(f"{when}{i}", "passed", data=data | {"text": text}) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("before", "loaded", "after", "outcome", "told"),
    [
        (["a"] * 3, ["a", "b"] * 3, ["a"] * 3, "passed", "6 answers, 2 distinct, 3 as alone before"),
        (["a"] * 3, ["b"] * 4, ["a"] * 3, "passed", "too few to judge"),
        (["a"] * 3, ["b"] * 5, ["a"] * 3, "failed", "never that one under load"),
        (["a", "c", "a"], ["b"] * 5, ["a", "c", "c"], "passed", "0 as alone before"),  # not stable alone either
        (["a"] * 3, ["a"] * 5, ["a", "a", "!"], "failed", "1 of the answers after were not given before"),
        (["a"] * 3, ["a"] * 5, ["!"] * 3, "failed", "were not given before"),
        ([" "] * 3, [""] * 5, [" "] * 3, "failed", "11 of 11 answers are empty"),
        (["a"] * 3, ["a"] * 5 + [""], ["a"] * 3, "failed", "1 of 12 answers are empty"),
        (["a"] * 3, ["a"] * 5, [], "unsupported", "both before and after"),
    ],
)
def test_canary(before: list[str], loaded: list[str], after: list[str], outcome: str, told: str) -> None:
    items = [*sung("before", *before), *sung("", *loaded), *sung("after", *after)]
    verdict = all_verdicts(soak(*items))["canary"]
    assert verdict["outcome"] == outcome and told in verdict["why"], verdict
    assert verdict["as_before_under_load"] == sum(text in before for text in loaded) / len(loaded)


def test_medians_have_intervals() -> None:
    items = [
        Item(i.id, "passed", data=i.data | {"first_token_seconds": n / 100, "seconds": n / 10})
        for n, i in enumerate(chats(lambda i: 20, lambda i: 1.0, 20), start=1)
    ]
    summary = summarize(soak(*items))
    # Of 20 values the 6th and the 15th: a table of the sign test has them.
    assert summary["kinds"]["chat"]["median_seconds_interval"] == {"low": 0.6, "high": 1.5}
    assert "1.05 [0.60, 1.50]" in text(summary) and "95 % intervals" in text(summary)
    few = summarize(soak(*items[:5]))["kinds"]["chat"]
    assert few["median_seconds_interval"] is None

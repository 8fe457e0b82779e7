from __future__ import annotations

import asyncio

import pytest
from counting import Counting
from oracle import Oracle

from step128_evals.client import Client
from step128_evals.metrics import (
    DraftCounters,
    ServerCounters,
    acceptance_between,
    drafts_between,
    foreign_traffic,
    parse_counters,
    parse_metrics,
    read_at_rest,
    read_counters,
    read_metrics,
)

LLAMA_CPP = """# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 77
# TYPE llamacpp:spec_decode_num_drafts_total counter
llamacpp:spec_decode_num_drafts_total {drafts}
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 1
"""
LLAMA_CPP_DRAFTING = """# TYPE llamacpp:spec_decode_num_accepted_tokens_per_pos_total counter
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 6
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="1"} 3
"""


def test_counters_are_summed_over_engines() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    lines = ["# TYPE vllm:spec_decode_num_drafts counter"]
    lines += [f'vllm:spec_decode_num_drafts_total{{engine="{engine}"}} 10' for engine in (0, 1)]
    lines += [f"# TYPE {name} counter"]
    lines += [f'{name}_total{{engine="{e}",position="{p}"}} {5 - p}' for e in (0, 1) for p in (1, 0)]
    lines += ["# TYPE vllm:kv_cache_usage_perc gauge"]
    lines += [f'vllm:kv_cache_usage_perc{{engine="{engine}"}} 0.{engine + 2}' for engine in (1, 0)]
    document = "\n".join(lines) + "\n"
    assert parse_counters(document) == DraftCounters(20, (10, 8))
    found = parse_metrics(document)
    assert found.kv_cache_usage == 0.3 and found.num_speculative_tokens == 2 and found.running is None


def test_no_drafts_is_no_acceptance() -> None:
    counters = DraftCounters(5, (3, 2))
    assert acceptance_between(counters, counters) is None
    assert acceptance_between(None, None) is None
    first = acceptance_between(None, counters)
    assert first is not None and first.rates == (0.6, 0.4)
    assert drafts_between(DraftCounters(1, ()), counters) == DraftCounters(4, (3, 2))


def test_llama_cpp() -> None:
    plain = parse_metrics(LLAMA_CPP.format(drafts=0))
    # It may draft or not: the positions show only after the first draft.
    assert plain.num_speculative_tokens is None and parse_counters(LLAMA_CPP.format(drafts=0)) is None
    assert plain.drafts == DraftCounters(0, ())
    assert parse_metrics("# TYPE vllm:num_requests_running gauge\n").num_speculative_tokens == 0
    assert plain.busy == 3 and plain.generated_tokens == 77 and plain.finished_requests is None
    drafting = parse_metrics(LLAMA_CPP.format(drafts=8) + LLAMA_CPP_DRAFTING)
    assert drafting.drafts == DraftCounters(8, (6, 3)) and drafting.num_speculative_tokens == 2


def test_another_server_says_nothing_of_drafts() -> None:
    found = parse_metrics("# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs 4\n")
    assert found == ServerCounters(running=4)


@pytest.mark.parametrize("document", [None, "<html><body>no metrics</body></html>", "a{b 1\n"])
def test_no_metrics_is_none(oracle: Oracle, document: str | None) -> None:
    oracle.metrics = document

    async def read() -> tuple[object, object, object]:
        async with Client(oracle.url, "secret") as client:
            return await read_metrics(client), await read_at_rest(client), await read_counters(client)

    assert asyncio.run(read()) == (None, None, None)


def test_reading_waits_for_rest(oracle: Oracle) -> None:
    counting, readings = Counting(oracle), 0

    def document(_: int) -> str:
        nonlocal readings
        readings += 1
        counting.running = int(readings < 3)
        counting.generated += readings < 4
        return counting.document()

    oracle.metrics = document

    async def read() -> ServerCounters | None:
        async with Client(oracle.url, "secret") as client:
            return await read_at_rest(client)

    found = asyncio.run(read())
    assert found is not None and found.running == 0 and found.generated_tokens == 5003
    assert readings == 4


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"running": 1, "waiting": 2}, {"running": 0}, "3 requests of others were in the server before ours"),
        ({"running": 0}, {"running": 1}, "1 requests of others were in the server after ours"),
        ({"finished_requests": 5}, {"finished_requests": 8}, "the server finished 3 requests, ours were 2"),
        ({"finished_requests": 5}, {"finished_requests": 7}, None),
        ({"generated_tokens": 5}, {"generated_tokens": 26}, "the server generated 21 tokens, ours were 20"),
        ({"generated_tokens": 5}, {"generated_tokens": 25}, None),
        (
            {"finished_requests": 5, "generated_tokens": 5},
            {"finished_requests": 7, "generated_tokens": 26},
            "the server generated 21 tokens, ours were 20",  # another's was broken off
        ),
        ({}, {}, None),
    ],
)
def test_foreign_traffic(before: dict[str, float], after: dict[str, float], reason: str | None) -> None:
    assert foreign_traffic(ServerCounters(**before), ServerCounters(**after), requests=2, tokens=20) == reason  # type: ignore[arg-type]
    if reason and "generated" in reason:
        assert foreign_traffic(ServerCounters(**before), ServerCounters(**after), requests=2, tokens=None) is None  # type: ignore[arg-type]

"""What a server counts of itself, from ``/metrics``: its load, and the drafts of speculative decoding by position.

vLLM's names are vLLM 0.32's, llama.cpp's those of its ``server-task.cpp`` (2026-11; it needs ``--metrics``), both read
on live servers; SGLang's are from its documentation and untried.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from step128_evals.client import Client
from step128_evals.errors import EvalError, ServerUnreachableError

_SETTLE_SECONDS = 0.2
_SETTLE_READINGS = 10

_NAMES = {
    "running": ("vllm:num_requests_running", "llamacpp:requests_processing", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "llamacpp:requests_deferred", "sglang:num_queue_reqs"),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "sglang:token_usage"),
    "finished_requests": ("vllm:request_success_total", "sglang:num_requests_total"),
    "generated_tokens": (
        "vllm:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
        "sglang:generation_tokens_total",
    ),
    "cached_prompt_tokens": (
        "vllm:prefix_cache_hits_total",
        "llamacpp:prompt_tokens_cached_total",
        "sglang:cached_tokens_total",
    ),
    "resident_bytes": ("process_resident_memory_bytes",),
}
_FIELDS = {name: field for field, names in _NAMES.items() for name in names}
_DRAFTS = re.compile(r"(vllm|llamacpp):spec_decode_num_drafts_total")
_ACCEPTED = re.compile(r"(vllm|llamacpp):spec_decode_num_accepted_tokens_per_pos_total")


@dataclass(frozen=True)
class DraftCounters:
    """Running totals. ``accepted[i]``: drafts whose token at position i (from 0) was accepted."""

    drafts: float
    accepted: tuple[float, ...]


@dataclass(frozen=True)
class Acceptance:
    """``rates[i]`` = drafts accepted at position i / all drafts; a rate includes that all positions before held."""

    drafts: int
    rates: tuple[float, ...]

    @property
    def mean_accepted_length(self) -> float:
        """Tokens gained by a step of the target model: its own one plus the accepted drafts."""
        return 1 + sum(self.rates)


@dataclass(frozen=True)
class ServerCounters:
    """One reading, summed over engines; None for what the server does not tell.

    ``kv_cache_usage`` is the fullest engine's share (0 to 1) of the cache that requests hold. ``resident_bytes`` is the
    memory of the process that answers ``/metrics``, which need not be the one that holds the model.
    ``num_speculative_tokens``: drafted positions. 0: it drafts nothing, which only vLLM tells, since it counts every
    position from its start. llama.cpp shows no position before it drafted, whether it ever will or not: None.
    """

    drafts: DraftCounters | None = None
    num_speculative_tokens: int | None = None
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None
    finished_requests: float | None = None
    generated_tokens: float | None = None
    cached_prompt_tokens: float | None = None
    resident_bytes: float | None = None

    @property
    def busy(self) -> float:
        """Requests in the server, as far as it tells."""
        return (self.running or 0.0) + (self.waiting or 0.0)


def parse_metrics(metrics_text: str) -> ServerCounters:
    """Read a Prometheus text document.

    Raises:
        ValueError: it is none.
    """
    values: dict[str, float] = {}
    drafts: float | None = None
    accepted: dict[int, float] = {}
    vllm = False
    for family in text_string_to_metric_families(metrics_text):
        vllm |= family.name.startswith("vllm:")
        for sample in family.samples:
            if _DRAFTS.fullmatch(sample.name):
                drafts = (drafts or 0.0) + sample.value
            elif _ACCEPTED.fullmatch(sample.name):
                position = int(sample.labels["position"])
                accepted[position] = accepted.get(position, 0.0) + sample.value
            elif field := _FIELDS.get(sample.name):
                before = values.get(field, 0.0)
                values[field] = max(before, sample.value) if field == "kv_cache_usage" else before + sample.value
    # llama.cpp has the total, 0, without speculation too, but then no positions.
    counters = DraftCounters(drafts, tuple(accepted[i] for i in sorted(accepted))) if drafts is not None else None
    depth = len(accepted) if accepted else 0 if vllm else None
    return ServerCounters(drafts=counters, num_speculative_tokens=depth, **values)


def parse_counters(metrics_text: str) -> DraftCounters | None:
    """Read the totals of speculative decoding; None if nothing was drafted yet, and nothing shows that it will be."""
    return _drafting(parse_metrics(metrics_text))


def _drafting(counters: ServerCounters | None) -> DraftCounters | None:
    drafts = counters.drafts if counters else None
    return drafts if drafts and (drafts.accepted or drafts.drafts) else None


def acceptance_between(before: DraftCounters | None, after: DraftCounters | None) -> Acceptance | None:
    """Acceptance of what ran between two readings; None if nothing was drafted."""
    gained = drafts_between(before, after)
    if gained is None or gained.drafts <= 0:
        return None
    return Acceptance(int(gained.drafts), tuple(accepted / gained.drafts for accepted in gained.accepted))


def drafts_between(before: DraftCounters | None, after: DraftCounters | None) -> DraftCounters | None:
    """The totals of what ran between two readings; None without speculative decoding."""
    if after is None:
        return None
    # llama.cpp counts a position from its first use on.
    old = (before.accepted if before else ()) + (0.0,) * len(after.accepted)
    accepted = tuple(new - was for new, was in zip(after.accepted, old, strict=False))
    return DraftCounters(after.drafts - (before.drafts if before else 0.0), accepted)


async def read_metrics(client: Client) -> ServerCounters | None:
    """One reading; None if the server has no ``/metrics``, refuses it or sends no Prometheus document.

    Raises:
        ServerUnreachableError: no answer at all.
    """
    try:
        return parse_metrics(await client.get_text("/metrics"))
    except ServerUnreachableError:
        raise
    except (EvalError, ValueError):  # llama.cpp without --metrics answers 501
        return None


async def read_at_rest(client: Client) -> ServerCounters | None:
    """A reading that the next one repeats: a server updates its counters a moment after it answers.

    Raises:
        ServerUnreachableError: no answer at all.
    """
    counters = await read_metrics(client)
    for _ in range(_SETTLE_READINGS if counters else 0):
        await asyncio.sleep(_SETTLE_SECONDS)
        previous, counters = counters, await read_metrics(client)
        if counters and previous and not counters.busy and _totals(counters) == _totals(previous):
            break
    return counters


def _totals(counters: ServerCounters) -> tuple[object, ...]:
    return counters.drafts, counters.finished_requests, counters.generated_tokens


async def read_counters(client: Client) -> DraftCounters | None:
    """The totals of speculative decoding at rest; None as :func:`parse_counters`."""
    return _drafting(await read_at_rest(client))


def foreign_traffic(before: ServerCounters, after: ServerCounters, requests: int, tokens: int | None) -> str | None:
    """Say what else the server did between two readings; None if nothing, or if it does not tell.

    Args:
        before: when none of ours ran.
        after: when none of ours ran any more.
        requests: ours in between.
        tokens: generated in them; None if the server did not say. A request that was broken off is no finished one in
            vLLM's counters, but its tokens are counted.
    """
    if before.busy:
        return f"{before.busy:.0f} requests of others were in the server before ours"
    if after.busy:
        return f"{after.busy:.0f} requests of others were in the server after ours"
    if before.finished_requests is not None and after.finished_requests is not None:
        finished = after.finished_requests - before.finished_requests
        if finished > requests:
            return f"the server finished {finished:.0f} requests, ours were {requests}"
    if tokens is not None and before.generated_tokens is not None and after.generated_tokens is not None:
        generated = after.generated_tokens - before.generated_tokens
        if generated > tokens:
            return f"the server generated {generated:.0f} tokens, ours were {tokens}"
    return None


def describe(acceptance: Acceptance | None) -> str:
    """One line for a person."""
    if acceptance is None:
        return "MTP: nothing was drafted"
    rates = ", ".join(f"position {i}: {rate:.3f}" for i, rate in enumerate(acceptance.rates, start=1))
    return (
        f"MTP acceptance over {acceptance.drafts} drafts: {rates}; {acceptance.mean_accepted_length:.2f} tokens a step"
    )

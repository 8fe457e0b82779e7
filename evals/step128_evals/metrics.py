"""Speculative decoding as the server counts it: acceptance by position, from ``/metrics`` before and after."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from step128_evals.client import Client
from step128_evals.errors import UnsupportedError

_DRAFTS = "vllm:spec_decode_num_drafts_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_SETTLE_SECONDS = 0.2


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


def parse_counters(metrics_text: str) -> DraftCounters | None:
    """Read the totals from a Prometheus text document, summed over engines; None without speculative decoding."""
    drafts: float | None = None
    accepted: dict[int, float] = {}
    for family in text_string_to_metric_families(metrics_text):
        for sample in family.samples:
            if sample.name == _DRAFTS:
                drafts = (drafts or 0.0) + sample.value
            elif sample.name == _ACCEPTED:
                position = int(sample.labels["position"])
                accepted[position] = accepted.get(position, 0.0) + sample.value
    if drafts is None:
        return None
    return DraftCounters(drafts, tuple(accepted[position] for position in sorted(accepted)))


def acceptance_between(before: DraftCounters | None, after: DraftCounters | None) -> Acceptance | None:
    """Acceptance of what ran between two readings; None if nothing was drafted."""
    if after is None:
        return None
    before = before or DraftCounters(0.0, (0.0,) * len(after.accepted))
    drafts = after.drafts - before.drafts
    if drafts <= 0:
        return None
    rates = (new - old for new, old in zip(after.accepted, before.accepted, strict=True))
    return Acceptance(int(drafts), tuple(rate / drafts for rate in rates))


async def read_counters(client: Client) -> DraftCounters | None:
    """Read the totals when they have come to rest: the server updates them a moment after it answers.

    None if the server has no ``/metrics``, or none about speculative decoding.
    """
    try:
        counters = parse_counters(await client.get_text("/metrics"))
        for _ in range(10):
            await asyncio.sleep(_SETTLE_SECONDS)
            previous, counters = counters, parse_counters(await client.get_text("/metrics"))
            if counters == previous:
                break
    except UnsupportedError:
        return None
    return counters


def describe(acceptance: Acceptance | None) -> str:
    """One line for a person."""
    if acceptance is None:
        return "MTP: nothing was drafted"
    rates = ", ".join(f"position {i}: {rate:.3f}" for i, rate in enumerate(acceptance.rates, start=1))
    return (
        f"MTP acceptance over {acceptance.drafts} drafts: {rates}; {acceptance.mean_accepted_length:.2f} tokens a step"
    )

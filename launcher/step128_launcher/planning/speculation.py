"""Expected decode speed at each MTP depth: a model of memory traffic, marked as such, with its inputs beside it.

A step that verifies n = 1 + depth tokens a request reads the routed experts those tokens choose, every other weight
once, the KV cache once, and one MTP layer for each drafted token; on several ranks it pays two all-reduces a layer.
Compute, kernel launches and sampling are left out, so the figures are bounds for comparing depths, not promises.

Distinct experts: tokens choose k of E each; if they choose independently, E * (1 - (1 - k/E)^n) are distinct.
Tokens a step: acceptances a_1, a_2, ... given by position are conditional (the share of drafts at position i that is
accepted where all before were) or unconditional (the share of all steps). Conditional: 1 + a1 + a1*a2 + ...;
unconditional: 1 + a1 + a2 + .... The model card's 0.92 / 0.75 / 0.55 give 2.99 and 3.22.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

SHORT_CONTEXT_TOKENS = 2048

# A depth is worth its memory if the model says it is this close to the fastest: its inputs are no surer than that.
TIE = 0.10


@dataclass(frozen=True)
class SpeedInputs:
    """What the model rests on, from the profile, the command line or a measurement.

    `memory_bandwidth` is of one rank, in bytes a second; `bandwidth_efficiency` the share of it that kernels reach;
    `all_reduce_seconds` one small all-reduce over all ranks. `sources` is input -> where it comes from.
    """

    memory_bandwidth: float
    bandwidth_efficiency: float
    all_reduce_seconds: float
    acceptance: tuple[float, ...]
    conditional: bool
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Traffic:
    """Bytes on one rank: read once a step, a single expert in all layers, one MTP layer, KV cache of a context.

    `kv_bytes_per_token` is the cache of the full-attention layers; `kv_window_bytes` what the sliding layers read of
    one request, at most. `layers` counts those that pay all-reduces.
    """

    shared_bytes: float
    expert_bytes: float
    draft_layer_bytes: float
    kv_bytes_per_token: float
    kv_window_bytes: float
    num_experts: int
    experts_per_token: int
    layers: int


@dataclass(frozen=True)
class SpeedRow:
    """One depth at one context, for `requests` requests at once; tokens a second are of all of them together."""

    num_speculative_tokens: int
    context_tokens: int
    requests: int
    tokens_per_step: float
    tokens_per_step_unconditional: float
    distinct_experts: float
    read_bytes: float
    step_seconds: float
    tokens_per_second: float


def tokens_per_step(acceptance: Sequence[float], depth: int, conditional: bool) -> float:
    """Return the expected tokens of one step and request: the one the model itself makes, and the accepted drafts."""
    used = acceptance[:depth]
    return 1.0 + sum(itertools.accumulate(used, lambda a, b: a * b) if conditional else used)


def distinct_experts(num_experts: int, experts_per_token: int, tokens: int) -> float:
    """Return the expected number of different experts of one layer that `tokens` tokens choose."""
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** tokens)


def speed(
    traffic: Traffic, inputs: SpeedInputs, ranks: int, depth: int, context_tokens: int, requests: int = 1
) -> SpeedRow:
    """Return the modelled speed of one depth. A depth beyond the acceptances given counts them as 0."""
    tokens = requests * (1 + depth)
    experts = distinct_experts(traffic.num_experts, traffic.experts_per_token, tokens)
    kv = requests * (context_tokens * traffic.kv_bytes_per_token + traffic.kv_window_bytes)
    read = traffic.shared_bytes + experts * traffic.expert_bytes + depth * traffic.draft_layer_bytes + kv
    reduces = 2 * (traffic.layers + depth) if ranks > 1 else 0
    seconds = read / (inputs.memory_bandwidth * inputs.bandwidth_efficiency) + reduces * inputs.all_reduce_seconds
    made = tokens_per_step(inputs.acceptance, depth, inputs.conditional)
    return SpeedRow(
        num_speculative_tokens=depth,
        context_tokens=context_tokens,
        requests=requests,
        tokens_per_step=made,
        tokens_per_step_unconditional=tokens_per_step(inputs.acceptance, depth, conditional=False),
        distinct_experts=experts,
        read_bytes=read,
        step_seconds=seconds,
        tokens_per_second=requests * made / seconds if seconds else math.inf,
    )


def worthwhile_depth(rows: Sequence[SpeedRow], tie: float = TIE) -> int:
    """Return the deepest depth whose modelled speed is within `tie` of the fastest; `rows` are of one context."""
    fastest = max(row.tokens_per_second for row in rows)
    return max(row.num_speculative_tokens for row in rows if row.tokens_per_second >= (1 - tie) * fastest)

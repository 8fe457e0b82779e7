"""Requests: how many, how long they wait, how long they are, how they end."""

from __future__ import annotations

from layout import SERVER, SOURCE, Band, dashboard
from panels import GREEN, ORANGE, RED, YELLOW, Json, Query, stat, steps, time_series

S = 'server=~"$server"'
QUANTILES = {"median": 0.5, "95th": 0.95, "99th": 0.99}
NONE = "no requests"


def _rate(name: str, by: str = "server") -> str:
    return f"sum by ({by}) (rate(vllm:{name}{{{S}}}[$__rate_interval]))"


def _quantiles(name: str) -> tuple[Query, ...]:
    buckets = _rate(f"{name}_bucket", "server, le")
    return tuple(
        Query(f"histogram_quantile({q:g}, {buckets})", f"{{{{server}}}} {text}") for text, q in QUANTILES.items()
    )


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "requests",
        "requests",
        "What clients ask and what they get. A request waits, its prompt is read, then tokens come one step after "
        "another.",
        [
            Band(4, ((5, _rate_now()), (5, _first_now()), (5, _each_now()), (4, _queue_now()), (5, _prefix()))),
            Band(8, ((8, _running()), (8, _ended()), (8, _refused()))),
            Band(8, ((8, _first()), (8, _each()), (8, _whole())), "How long"),
            Band(8, ((8, _queue()), (8, _prompt_time()), (8, _preempted())), "Why so long"),
            Band(8, ((8, _tokens()), (8, _prompts()), (8, _answers())), "How much"),
        ],
        SOURCE,
        SERVER,
    )


def _rate_now() -> Json:
    return stat(
        "Requests ended a minute",
        "vllm:request_success_total, whatever they ended by.",
        "reqpm",
        Query(f"60 * {_rate('request_success_total')}", "{{server}}"),
        decimals=1,
        no_value="no vLLM",
    )


def _first_now() -> Json:
    return stat(
        "First token, 95th percentile",
        "Recorded over 5 minutes (step128:time_to_first_token_seconds:p95_5m). Long prompts take long; see How much.",
        "s",
        Query(f"max by (server) (step128:time_to_first_token_seconds:p95_5m{{{S}}})", "{{server}}"),
        decimals=2,
        no_value=NONE,
    )


def _each_now() -> Json:
    return stat(
        "Each further token, 95th percentile",
        "Recorded over 5 minutes (step128:inter_token_latency_seconds:p95_5m). With drafts several tokens come at "
        "once, which count with nearly no time between them.",
        "s",
        Query(f"max by (server) (step128:inter_token_latency_seconds:p95_5m{{{S}}})", "{{server}}"),
        decimals=3,
        no_value=NONE,
    )


def _queue_now() -> Json:
    return stat(
        "Waiting",
        "vllm:num_requests_waiting. The alert fires if more than 8 wait and it gets more for a quarter of an hour.",
        "short",
        Query(f"sum by (server) (vllm:num_requests_waiting{{{S}}})", "{{server}}"),
        thresholds=steps((1, YELLOW), (8, ORANGE)),
        decimals=0,
        no_value="no vLLM",
        alerts=("Step128QueueGrowing",),
    )


def _prefix() -> Json:
    return stat(
        "Prompt tokens from the cache",
        "vllm:prefix_cache_hits_total over vllm:prefix_cache_queries_total, both in tokens: what need not be read "
        "again because an earlier prompt began the same.",
        "percentunit",
        Query(f"{_rate('prefix_cache_hits_total')} / ({_rate('prefix_cache_queries_total')} > 0)", "{{server}}"),
        decimals=0,
        no_value=NONE,
    )


def _running() -> Json:
    return time_series(
        "Running and waiting",
        "vllm:num_requests_running, and vllm:num_requests_waiting_by_reason: capacity (no room in the KV cache or in "
        "the batch) or deferred.",
        "short",
        Query(f"sum by (server) (vllm:num_requests_running{{{S}}})", "{{server}} running"),
        Query(
            f"sum by (server, reason) (vllm:num_requests_waiting_by_reason{{{S}}})", "{{server}} waiting: {{reason}}"
        ),
        min=0,
        decimals=0,
        alerts=("Step128QueueGrowing",),
    )


def _ended() -> Json:
    return time_series(
        "Ended, by reason",
        "vllm:request_success_total a second: stop (the model ended), length (max_tokens or the context), abort (the "
        "client went away), error.",
        "reqps",
        Query(_rate("request_success_total", "server, finished_reason"), "{{server}} {{finished_reason}}"),
        min=0,
        stack=True,
    )


def _refused() -> Json:
    refused = f"sum by (server, reason) (rate(step128_requests_refused_total{{{S}}}[$__rate_interval]))"
    none = f'label_replace(0 * max by (server) (up{{job="vllm",{S}}} == 1), "reason", "none", "", "")'
    return time_series(
        "Refused before vLLM",
        "step128_requests_refused_total a second: no_key, wrong_key, not_served (no such path), method, body_size, "
        "body_slow, request (over a limit), media. Many wrong_key: somebody tries keys, or one was changed.",
        "reqps",
        Query(f"{refused} or on (server) {none}", "{{server}} {{reason}}"),
        min=0,
        stack=True,
    )


def _first() -> Json:
    return time_series(
        "To the first token",
        "vllm:time_to_first_token_seconds: waiting, and reading the prompt.",
        "s",
        *_quantiles("time_to_first_token_seconds"),
        min=0,
        no_value=NONE,
    )


def _each() -> Json:
    return time_series(
        "Between tokens",
        "vllm:inter_token_latency_seconds. Slower than usual without load: throttled GPUs, or drafts that are not "
        "accepted.",
        "s",
        *_quantiles("inter_token_latency_seconds"),
        min=0,
        no_value=NONE,
        alerts=("Step128GpuThrottled", "Step128MtpAcceptanceCollapsed"),
    )


def _whole() -> Json:
    return time_series(
        "Whole request",
        "vllm:e2e_request_latency_seconds, from arrival to the last token.",
        "s",
        *_quantiles("e2e_request_latency_seconds"),
        min=0,
        no_value=NONE,
    )


def _queue() -> Json:
    return time_series(
        "Waiting to be started",
        "vllm:request_queue_time_seconds. More than a moment: as many requests run as the plan allows, or the KV "
        "cache is full.",
        "s",
        *_quantiles("request_queue_time_seconds"),
        min=0,
        no_value=NONE,
        alerts=("Step128QueueGrowing", "Step128KvCacheFull"),
    )


def _prompt_time() -> Json:
    return time_series(
        "Reading the prompt",
        "vllm:request_prefill_time_seconds. It grows with the prompt's length, see below.",
        "s",
        *_quantiles("request_prefill_time_seconds"),
        min=0,
        no_value=NONE,
    )


def _preempted() -> Json:
    return time_series(
        "Pushed out of the KV cache, a minute",
        "vllm:num_preemptions_total: such a request is computed again from its beginning. Should be 0.",
        "opm",
        Query(f"60 * {_rate('num_preemptions_total')}", "{{server}}"),
        min=0,
        thresholds=steps((0.33, RED), base=GREEN),
        alerts=("Step128Preemptions",),
    )


def _tokens() -> Json:
    return time_series(
        "Tokens a second",
        "vllm:generation_tokens_total; vllm:prompt_tokens_total, of which vllm:prompt_tokens_cached_total came from "
        "the cache.",
        "suffix: tok/s",
        Query(_rate("generation_tokens_total"), "{{server}} generated"),
        Query(_rate("prompt_tokens_total"), "{{server}} prompt"),
        Query(_rate("prompt_tokens_cached_total"), "{{server}} prompt, from the cache"),
        min=0,
    )


def _prompts() -> Json:
    return time_series(
        "Length of prompts",
        "vllm:request_prompt_tokens, in tokens, of requests as they end.",
        "suffix: tok",
        *_quantiles("request_prompt_tokens"),
        min=0,
        no_value=NONE,
    )


def _answers() -> Json:
    return time_series(
        "Length of answers",
        "vllm:request_generation_tokens, in tokens.",
        "suffix: tok",
        *_quantiles("request_generation_tokens"),
        min=0,
        no_value=NONE,
    )

"""At a glance: is it serving, what is wrong, how fast is it, what do the GPUs do."""

from __future__ import annotations

from layout import SERVER, SOURCE, Band, dashboard, runbook_ids
from panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    Json,
    Query,
    bars,
    override,
    runbook_link,
    stat,
    steps,
    time_series,
    timeline,
)

S = 'server=~"$server"'
STATES = {
    -1.0: ("unreachable", RED),
    0.0: ("planned", GREY),
    1.0: ("starting", YELLOW),
    2.0: ("verifying", YELLOW),
    3.0: ("ready", GREEN),
    4.0: ("restarting", ORANGE),
    5.0: ("draining", BLUE),
    6.0: ("stopped", GREY),
    7.0: ("failed", RED),
}
_NUMBERED = " or ".join(
    f'{value:g} * step128_server_state{{{S},state="{name}"}}' for value, (name, _) in STATES.items() if value >= 0
)
STATE = f'sum by (server) ({_NUMBERED}) or max by (server) (up{{job="step128",{S}}}) - 1'
SERVING = f'max by (server) (step128_server_healthy{{{S}}}) or 0 * max by (server) (up{{job="step128",{S}}})'
MARGIN = (
    f"min by (server) (step128_gpu_temperature_critical_celsius{{{S}}} - step128_gpu_temperature_celsius{{{S}}})"
    f' or min by (server) (95 - step128_gpu_temperature_celsius{{{S},sensor=~"edge|junction|soc"}})'
)
ALERT_LEVELS = {0.0: ("quiet", GREEN), 1.0: ("info", BLUE), 2.0: ("warning", ORANGE), 3.0: ("critical", RED)}


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "overview",
        "overview",
        "Start here. Green in the first row: go back to bed. Otherwise click the alert, it leads to what to do.",
        [
            Band(4, ((5, _serving()), (5, _state()), (4, _alerts_now()), *_figures())),
            Band(3, ((24, _states()),)),
            Band(7, ((24, _alerts()),)),
            Band(8, ((8, _tokens()), (8, _waiting()), (8, _latency())), "Requests"),
            Band(6, ((8, _memory()), (8, _power()), (8, _temperature())), "GPUs"),
        ],
        SOURCE,
        SERVER,
    )


def _serving() -> Json:
    return stat(
        "Is it serving?",
        "step128_server_healthy: the server is ready and answers /health. NO also while the launcher itself cannot be "
        "reached.",
        "none",
        Query(SERVING, "{{server}}"),
        words={1.0: ("YES", GREEN), 0.0: ("NO", RED)},
        loud=True,
        no_value="no launcher known",
        alerts=("Step128LauncherDown", "Step128ServerHeld", "Step128ServerNotReady"),
    )


def _state() -> Json:
    return stat(
        "State",
        "step128_server_state. failed: the launcher gave up and says why in the log; unreachable: the container is "
        "gone or cut off.",
        "none",
        Query(STATE, "{{server}}"),
        words=STATES,
        loud=True,
        no_value="no launcher known",
        alerts=("Step128ServerHeld", "Step128ServerRestarting"),
    )


def _alerts_now() -> Json:
    return stat(
        "Alerts firing",
        "Alerts of Prometheus that fire now, those of severity info left out.",
        "none",
        Query(f"count({_firing('!=', 'info')}) or vector(0)", "alerts"),
        thresholds=steps((1, RED)),
        loud=True,
    )


def _figures() -> tuple[tuple[int, Json], ...]:
    speed = stat(
        "Tokens a second",
        "Generated, by all requests together, over a minute (step128:generation_tokens:rate1m). 0 without requests.",
        "suffix: tok/s",
        Query(f"sum by (server) (step128:generation_tokens:rate1m{{{S}}})", "{{server}}"),
        decimals=1,
        no_value="no vLLM",
    )
    cache = stat(
        "KV cache",
        "How much of the KV cache is in use (vllm:kv_cache_usage_perc). When it is full, requests wait.",
        "percentunit",
        Query(f"max by (server) (step128:kv_cache_usage:ratio{{{S}}})", "{{server}}"),
        thresholds=steps((0.8, YELLOW), (0.95, RED)),
        no_value="no vLLM",
        alerts=("Step128KvCacheFull",),
    )
    margin = stat(
        "Degrees left",
        "Of the hottest sensor, to what its driver calls critical (to 95 °C where it names none). The alert fires at "
        "10.",
        "celsius",
        Query(MARGIN, "{{server}}"),
        thresholds=steps((10, YELLOW), (20, GREEN), base=RED),
        decimals=0,
        no_value="no sensor",
        alerts=("Step128GpuHot",),
    )
    return ((4, speed), (3, cache), (3, margin))


def _states() -> Json:
    return timeline(
        "State over time",
        "step128_server_state, or unreachable where Prometheus could not scrape the launcher. A gap: Prometheus itself "
        "was not running.",
        Query(STATE, "{{server}}"),
        words=STATES,
    )


def _alerts() -> Json:
    level = {"info": 1, "warning": 2, "critical": 3}
    union = " or ".join(f"{value} * max by (alertname) ({_firing('=', name)})" for name, value in level.items())
    ids = runbook_ids()
    links = [override("byName", name, links=[runbook_link(name, ids[name])]) for name in list(ids)[1:]]
    return timeline(
        "Alerts",
        "ALERTS of Prometheus that fired, by name. Click one: its link leads to the runbook. No row but `none`: "
        "nothing fired in this time.",
        Query(f'{union} or on () label_replace(vector(0), "alertname", "none", "", "")', "{{alertname}}"),
        words=ALERT_LEVELS,
        overrides=links,
    )


def _firing(relation: str, severity: str) -> str:
    return f'ALERTS{{alertstate="firing",alertname=~"Step128.+",severity{relation}"{severity}",{S}}}'


def _tokens() -> Json:
    return time_series(
        "Tokens a second",
        "vllm:generation_tokens_total and vllm:prompt_tokens_total. Long prompts lift the second by a factor of "
        "hundreds.",
        "suffix: tok/s",
        Query(f"sum by (server) (rate(vllm:generation_tokens_total{{{S}}}[$__rate_interval]))", "{{server}} generated"),
        Query(f"sum by (server) (rate(vllm:prompt_tokens_total{{{S}}}[$__rate_interval]))", "{{server}} prompt"),
        min=0,
    )


def _waiting() -> Json:
    return time_series(
        "Requests",
        "vllm:num_requests_running and vllm:num_requests_waiting. Waiting for long: too much load, or something slow.",
        "short",
        Query(f"sum by (server) (vllm:num_requests_running{{{S}}})", "{{server}} running"),
        Query(f"sum by (server) (vllm:num_requests_waiting{{{S}}})", "{{server}} waiting"),
        min=0,
        decimals=0,
        alerts=("Step128QueueGrowing",),
    )


def _latency() -> Json:
    return time_series(
        "Waiting for a token, 95th percentile",
        "Nineteen of twenty requests wait no longer for the first token, and for each one after it (recorded over 5 "
        "minutes). Gaps: no requests.",
        "s",
        Query(f"step128:time_to_first_token_seconds:p95_5m{{{S}}}", "{{server}} first token"),
        Query(f"step128:inter_token_latency_seconds:p95_5m{{{S}}}", "{{server}} each further token"),
        min=0,
        no_value="no requests",
    )


def _memory() -> Json:
    used = f"step128_gpu_vram_used_bytes{{{S}}} + step128_gpu_gtt_used_bytes{{{S}}}"
    discrete = f'step128_gpu_info{{{S},integrated="false"}}'
    card = f"step128_gpu_vram_used_bytes{{{S}}} / step128_gpu_vram_total_bytes{{{S}}} and on (server, gpu) {discrete}"
    total = f"(step128_gpu_vram_total_bytes{{{S}}} + step128_gpu_gtt_total_bytes{{{S}}})"
    return bars(
        "Memory in use",
        "Of a card: its VRAM. Of an APU: carve-out and GTT together. A served model fills most of it, and it stays "
        "there.",
        "percentunit",
        Query(f"({card}) or ({used}) / {total}", "{{server}} {{gpu}}"),
        min=0,
        max=1,
        thresholds=steps((0.97, ORANGE), base=BLUE),
        alerts=("Step128GpuMemoryLeak",),
    )


def _power() -> Json:
    return bars(
        "Power",
        "step128_gpu_power_watts. On an APU with the CPU cores. More in the dashboard GPUs.",
        "watt",
        Query(f"step128_gpu_power_watts{{{S}}}", "{{server}} {{gpu}}"),
        min=0,
        max=350,
        alerts=("Step128GpuPowerCapped",),
    )


def _temperature() -> Json:
    return bars(
        "Hottest sensor",
        "The highest step128_gpu_temperature_celsius of each GPU. How hot is too hot differs by sensor: see Degrees "
        "left.",
        "celsius",
        Query(f"max by (server, gpu) (step128_gpu_temperature_celsius{{{S}}})", "{{server}} {{gpu}}"),
        min=0,
        max=120,
        thresholds=steps((90, YELLOW), (100, RED)),
        alerts=("Step128GpuHot", "Step128GpuThrottled"),
    )

"""The memory plan beside what vLLM reports and what the driver and the host see."""

from __future__ import annotations

from layout import SERVER, SOURCE, Band, dashboard
from panels import BLUE, GREEN, ORANGE, RED, YELLOW, Json, Query, stat, steps, table, time_series, timeline

S = 'server=~"$server"'
BYTES, TOKENS = "bytes", "suffix: tok"
PLANNED = f"sum by (server) (step128_plan_memory_bytes{{{S}}})"


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "memory",
        "memory, plan against reality",
        "What was planned before anything was loaded, what vLLM then reported, and what the GPUs and the host say now.",
        [
            Band(4, ((5, _planned()), (4, _assumed()), (5, _context()), (5, _cache()), (5, _host()))),
            Band(9, ((12, _items()), (12, _reality()))),
            Band(7, ((12, _checks()), (12, _difference()))),
            Band(8, ((8, _gpu()), (8, _host_memory()), (8, _use_of_cache())), "Now"),
        ],
        SOURCE,
        SERVER,
    )


def _planned() -> Json:
    return stat(
        "Planned, a GPU",
        "Sum of step128_plan_memory_bytes: all items of the plan, of one GPU; of the host where the ranks share its "
        "memory.",
        BYTES,
        Query(PLANNED, "{{server}}"),
        no_value="no plan",
        thresholds=steps(base=BLUE),
    )


def _assumed() -> Json:
    part = f'sum by (server) (step128_plan_memory_bytes{{{S},evidence="assumed"}}) or 0 * {PLANNED}'
    return stat(
        "Of it assumed",
        "Items that rest on an assumption. `--measure` once, and `step128 calibrate`, put measured figures in their "
        "place. The KV cache takes what the others leave, so the plan always fills its budget.",
        BYTES,
        Query(part, "{{server}}"),
        thresholds=steps(base=BLUE),
        no_value="no plan",
        alerts=("Step128OutOfMemoryStepDown",),
    )


def _context() -> Json:
    return stat(
        "Longest context",
        "step128_plan_max_model_len_tokens: prompt and answer together. Smaller than usual: the plan was stepped down.",
        TOKENS,
        Query(f"max by (server) (step128_plan_max_model_len_tokens{{{S}}})", "{{server}}"),
        no_value="no plan",
        thresholds=steps(base=BLUE),
        alerts=("Step128OutOfMemoryStepDown",),
    )


def _cache() -> Json:
    return stat(
        "KV cache holds",
        "step128_plan_kv_cache_size_tokens: tokens of all requests together that fit into the KV cache.",
        TOKENS,
        Query(f"max by (server) (step128_plan_kv_cache_size_tokens{{{S}}})", "{{server}}"),
        no_value="no plan",
        thresholds=steps(base=BLUE),
        alerts=("Step128KvCacheFull",),
    )


def _host() -> Json:
    return stat(
        "Host memory left",
        "step128_host_memory_available_bytes. Where the GPU shares the host's memory, an alert fires below 1.5 GiB.",
        BYTES,
        Query(f"min by (server) (step128_host_memory_available_bytes{{{S}}})", "{{server}}"),
        thresholds=steps((1.5 * 2**30, YELLOW), (3 * 2**30, GREEN), base=RED),
        alerts=("Step128HostMemoryLow",),
    )


def _items() -> Json:
    return table(
        "The plan, item by item",
        "step128_plan_memory_bytes, the largest first, and what each figure rests on: computed, vLLM's code, "
        "measured, or assumed. `step128 plan --explain ITEM` says more.",
        BYTES,
        Query(f"sort_desc(sum by (item, evidence) (step128_plan_memory_bytes{{{S}}}))", "", table=True),
        columns={"item": ("item", None), "evidence": ("rests on", None), "Value": ("planned", BYTES)},
        no_value="no plan",
    )


def _reality() -> Json:
    return table(
        "Plan against what vLLM reports, one rank",
        "step128_planned_bytes, step128_measured_bytes and their ratio. On a CPU, and without --measure, vLLM "
        "reports only some of the items. Above 10 % more than planned, Step128PlanTooLow fires.",
        BYTES,
        Query(f"max by (server, item) (step128_planned_bytes{{{S}}})", "", table=True),
        Query(f"max by (server, item) (step128_measured_bytes{{{S}}})", "", table=True),
        Query(f"max by (server, item) (step128:plan_difference:ratio{{{S}}})", "", table=True),
        columns={
            "server": ("server", None),
            "item": ("item", None),
            "Value #A": ("planned", BYTES),
            "Value #B": ("measured", BYTES),
            "Value #C": ("difference", "percentunit"),
        },
        no_value="nothing measured",
        alerts=("Step128PlanTooLow",),
    )


def _checks() -> Json:
    return timeline(
        "Checks after the start",
        "step128_verification: is what runs what was planned? `differs`: not what was predicted, and it serves; "
        "`failed`: the server is held.",
        Query(f"min by (server, check) (step128_verification{{{S}}})", "{{check}}"),
        words={1.0: ("as planned", GREEN), 0.5: ("differs", ORANGE), 0.0: ("failed", RED)},
        no_value="not started yet",
        alerts=("Step128PlanMismatch",),
    )


def _difference() -> Json:
    return time_series(
        "More than planned",
        "step128:plan_difference:ratio by item. Below 0 the plan was careful. Dashed: where Step128PlanTooLow fires.",
        "percentunit",
        Query(f"max by (server, item) (step128:plan_difference:ratio{{{S}}})", "{{server}} {{item}}"),
        thresholds=steps((0.1, RED)),
        no_value="nothing measured",
        alerts=("Step128PlanTooLow",),
    )


def _gpu() -> Json:
    return time_series(
        "Memory of the GPUs",
        "VRAM and GTT in use by all processes, and for comparison what the plan gives each. It should be flat: growth "
        "without a restart is a leak.",
        BYTES,
        Query(f"step128_gpu_vram_used_bytes{{{S}}} + step128_gpu_gtt_used_bytes{{{S}}}", "{{server}} {{gpu}}"),
        Query(PLANNED, "{{server}} planned"),
        min=0,
        alerts=("Step128GpuMemoryLeak",),
    )


def _host_memory() -> Json:
    return time_series(
        "Memory of the host",
        "step128_host_memory_available_bytes, and swap in use. On a box with unified memory the model is in here too.",
        BYTES,
        Query(f"step128_host_memory_available_bytes{{{S}}}", "{{server}} available"),
        Query(f"step128_host_swap_total_bytes{{{S}}} - step128_host_swap_free_bytes{{{S}}}", "{{server}} swapped out"),
        min=0,
        alerts=("Step128HostMemoryLow",),
    )


def _use_of_cache() -> Json:
    return time_series(
        "KV cache in use",
        "vllm:kv_cache_usage_perc, of what the plan gives it. Dashed: where Step128KvCacheFull fires.",
        "percentunit",
        Query(f"max by (server) (vllm:kv_cache_usage_perc{{{S}}})", "{{server}}"),
        min=0,
        max=1,
        thresholds=steps((0.95, RED)),
        alerts=("Step128KvCacheFull",),
    )

"""Each GPU: load, memory, power, heat, clocks, its PCIe link, and why it is held back."""

from __future__ import annotations

from layout import GPU, SERVER, SOURCE, Band, dashboard
from panels import BLUE, GREEN, ORANGE, RED, Json, Query, bars, steps, table, time_series, timeline

S = 'server=~"$server",gpu=~"$gpu"'
NAME = "{{server}} {{gpu}}"
BYTES = "bytes"


def _all(metric: str, more: str = "") -> str:
    return f"step128_gpu_{metric}{{{S}{more}}}"


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "gpus",
        "GPUs",
        "With tensor parallelism the slowest card sets the pace: look for the one that is unlike the others.",
        [
            Band(5, ((14, _cards()), (10, _link()))),
            Band(5, ((24, _throttled()),)),
            Band(8, ((8, _busy()), (8, _memory()), (8, _power()))),
            Band(8, ((8, _temperature()), (8, _fan()), (8, _clocks()))),
            Band(7, ((16, _sources()), (8, _scrape())), "The telemetry itself"),
            Band(8, ((12, _bandwidth()), (12, _parts())), "APU only (empty for cards)"),
        ],
        SOURCE,
        SERVER,
        GPU,
    )


def _cards() -> Json:
    return table(
        "Which is which",
        "step128_gpu_info. The PCI address stays; card and render node may change at a boot.",
        "none",
        Query(f"max by (server, gpu, name, target, card, render_node) ({_all('info')})", "", table=True),
        columns={
            "server": ("server", None),
            "gpu": ("PCI address", None),
            "name": ("name", None),
            "target": ("target", None),
            "card": ("card", None),
            "render_node": ("device", None),
        },
        no_value="no AMD GPU",
    )


def _link() -> Json:
    share = f"{_all('pcie_width_lanes')} / {_all('pcie_max_width_lanes')}"
    return bars(
        "PCIe lanes, of what the path can do",
        "step128_gpu_pcie_width_lanes over step128_gpu_pcie_max_width_lanes of the narrowest link between card and "
        "host. Below 100 %: a riser, a slot or the firmware setup.",
        "percentunit",
        Query(share, NAME),
        min=0,
        no_value="no link (an APU)",
        max=1,
        thresholds=steps((1, GREEN), base=ORANGE),
    )


def _throttled() -> Json:
    heat = ',cause=~"temperature|prochot"'
    limits = ',cause!~"temperature|prochot"'

    def counted(causes: str) -> str:
        return f"ceil(clamp_max(increase({_all('throttle_residency_total', causes)}[$__rate_interval]), 1))"

    states = f"2 * {_all('throttled', heat)} or {_all('throttled', limits)} or 2 * {counted(heat)} or {counted(limits)}"
    return timeline(
        "Held back",
        "step128_gpu_throttled of cards, step128_gpu_throttle_residency_total of APUs, with the exact reason. At a "
        "limit of power or current: normal while prompts are read. Too hot, or PROCHOT (the board or the power supply "
        "asks for it): not normal.",
        Query(f"max by (server, gpu) ({states})", NAME),
        words={0.0: ("free", GREEN), 1.0: ("at a limit", BLUE), 2.0: ("hot, or PROCHOT", RED)},
        no_value="the firmware's table is not known here",
        alerts=("Step128GpuThrottled", "Step128GpuPowerCapped", "Step128GpuMetricsUnknown"),
    )


def _busy() -> Json:
    return time_series(
        "Busy",
        "step128_gpu_busy_ratio: share of time in which anything ran. 100 % says nothing of how well.",
        "percentunit",
        Query(_all("busy_ratio"), NAME),
        min=0,
        max=1,
        alerts=("Step128ServerHung",),
    )


def _memory() -> Json:
    return time_series(
        "Memory",
        "step128_gpu_vram_used_bytes and step128_gpu_gtt_used_bytes (host memory that the GPU uses) by all "
        "processes. A card's GTT should stay small; an APU's holds the model.",
        BYTES,
        Query(_all("vram_used_bytes"), f"{NAME} VRAM"),
        Query(_all("gtt_used_bytes"), f"{NAME} GTT"),
        min=0,
        alerts=("Step128GpuMemoryLeak",),
    )


def _power() -> Json:
    return time_series(
        "Power",
        "step128_gpu_power_watts, and the lowest step128_gpu_power_cap_watts of the cards. An APU tells no cap, and "
        "its power is with the CPU cores.",
        "watt",
        Query(_all("power_watts"), NAME),
        Query(f"min by (server) ({_all('power_cap_watts')})", "{{server}} cap"),
        min=0,
        alerts=("Step128GpuPowerCapped",),
    )


def _temperature() -> Json:
    return time_series(
        "Temperatures",
        "step128_gpu_temperature_celsius: edge, junction (the hottest spot), mem, vr_* (voltage regulators), soc, "
        "skin.",
        "celsius",
        Query(_all("temperature_celsius", ',sensor=~"edge|junction|mem|soc"'), f"{NAME} {{{{sensor}}}}"),
        min=20,
        alerts=("Step128GpuHot",),
    )


def _fan() -> Json:
    return bars(
        "Fan",
        "step128_gpu_fan_ratio. A fan that stands while the card is hot is broken. An APU's fan is the box's own and "
        "is not seen here.",
        "percentunit",
        Query(_all("fan_ratio"), NAME),
        min=0,
        max=1,
        no_value="no fan seen",
        alerts=("Step128GpuHot",),
    )


def _clocks() -> Json:
    return time_series(
        "Clocks",
        "step128_gpu_clock_hertz: sclk (shaders) and mclk (memory). Decoding needs mclk; a card on a lower one than "
        "the others slows all. An APU may tell no mclk while it is between two levels.",
        "hertz",
        Query(_all("clock_hertz", ',clock=~"sclk|mclk"'), f"{NAME} {{{{clock}}}}"),
        min=0,
    )


def _bandwidth() -> Json:
    return time_series(
        "Memory bandwidth of an APU",
        "step128_gpu_dram_read_bytes_per_second and write, CPU included. The firmware's figure ends at 65.5 GB/s, so "
        "a flat line there means that or more.",
        "Bps",
        Query(_all("dram_read_bytes_per_second"), f"{NAME} read"),
        Query(_all("dram_write_bytes_per_second"), f"{NAME} written"),
        min=0,
        no_value="no APU",
    )


def _parts() -> Json:
    return time_series(
        "Power of an APU by part",
        "step128_gpu_part_power_watts: gfx is the GPU, cores the CPU; socket is all of it. The limits (spl, fppt, "
        "sppt) are the firmware's, set by the power mode of the box.",
        "watt",
        Query(_all("part_power_watts"), f"{NAME} {{{{part}}}}"),
        min=0,
        no_value="no APU",
    )


def _sources() -> Json:
    return timeline(
        "Sources of the exporter",
        "step128_exporter_source_error: something of this source could not be read, so its figures are missing here "
        "and alerts on them are blind. `docker compose logs serve | grep telemetry` names the file.",
        Query('max by (server, source) (step128_exporter_source_error{server=~"$server"})', "{{server}} {{source}}"),
        words={0.0: ("read", GREEN), 1.0: ("error", RED)},
        alerts=("Step128ExporterSourceError",),
    )


def _scrape() -> Json:
    return time_series(
        "Time of a reading",
        "step128_exporter_collect_seconds: what reading all sources took. More than a second: a driver is slow to "
        "answer.",
        "s",
        Query('max by (server) (step128_exporter_collect_seconds{server=~"$server"})', "{{server}}"),
        min=0,
        thresholds=steps((1, RED), base=BLUE),
        alerts=("Step128ExporterSourceError",),
    )

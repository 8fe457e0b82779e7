"""Every metric of the telemetry: its name, kind, help text and labels, in one table; and one sample of one of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric


@dataclass(frozen=True)
class Family:
    """One metric; a counter's name is without the suffix _total, which the client adds."""

    help: str
    labels: tuple[str, ...]
    counter: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a family, with its labels' values in the family's order."""

    name: str
    labels: tuple[str, ...]
    value: float


_GPU = ("gpu", "card")  # PCI address, which stays, and the kernel's name, which may change at a boot

FAMILIES = {
    # The cards and their memory
    "step128_gpu_info": Family(
        "1 for each AMD GPU; `integrated` is true where it shares the host's memory.",
        (*_GPU, "name", "target", "pci_id", "integrated", "render_node"),
    ),
    "step128_gpu_vram_total_bytes": Family("VRAM; on an APU the firmware's carve-out.", _GPU),
    "step128_gpu_vram_used_bytes": Family("VRAM in use by all processes.", _GPU),
    "step128_gpu_visible_vram_total_bytes": Family("VRAM that the CPU reaches through the PCIe BAR.", _GPU),
    "step128_gpu_visible_vram_used_bytes": Family("The part of it that is in use.", _GPU),
    "step128_gpu_gtt_total_bytes": Family("Host memory that the driver lets this GPU use.", _GPU),
    "step128_gpu_gtt_used_bytes": Family("Host memory that this GPU uses, by all processes.", _GPU),
    # Load, power, temperatures, fan, clocks
    "step128_gpu_busy_ratio": Family("Share of time the GPU was busy (gpu_busy_percent).", _GPU),
    "step128_gpu_memory_busy_ratio": Family("Share of time the memory controller was busy; cards only.", _GPU),
    "step128_gpu_power_watts": Family("Power of the package; on an APU with the CPU cores.", _GPU),
    "step128_gpu_power_cap_watts": Family("Power the package may take now.", _GPU),
    "step128_gpu_power_cap_default_watts": Family("The same as the card comes.", _GPU),
    "step128_gpu_power_cap_max_watts": Family("Highest cap that can be set.", _GPU),
    "step128_gpu_part_power_watts": Family(
        "An APU's power by part, as its firmware filters it over time: socket, apu, gfx, cores.", (*_GPU, "part")
    ),
    "step128_gpu_temperature_celsius": Family(
        "Temperature: edge, junction (the hottest spot), mem, vr_* (voltage regulators), soc, skin.", (*_GPU, "sensor")
    ),
    "step128_gpu_temperature_critical_celsius": Family("Temperature the driver calls critical.", (*_GPU, "sensor")),
    "step128_gpu_fan_rpm": Family("Turns of the fan in a minute.", _GPU),
    "step128_gpu_fan_max_rpm": Family("The most turns the fan can do.", _GPU),
    "step128_gpu_fan_ratio": Family("Duty cycle of the fan (pwm1 of 255).", _GPU),
    "step128_gpu_clock_hertz": Family(
        "Clock now: sclk (shaders), mclk (memory), socclk, fclk; absent while it is between two levels.",
        (*_GPU, "clock"),
    ),
    "step128_gpu_clock_max_hertz": Family("The highest level of a clock.", (*_GPU, "clock")),
    "step128_gpu_average_clock_hertz": Family("Clock as the firmware filters it over time.", (*_GPU, "clock")),
    "step128_gpu_performance_level": Family("1 for the level in power_dpm_force_performance_level.", (*_GPU, "level")),
    # PCIe
    "step128_gpu_pcie_speed_gts": Family("GT/s a lane of the slowest link between card and host.", _GPU),
    "step128_gpu_pcie_max_speed_gts": Family("What that path could negotiate; idle links go slower.", _GPU),
    "step128_gpu_pcie_width_lanes": Family("Lanes of the slowest link between card and host.", _GPU),
    "step128_gpu_pcie_max_width_lanes": Family("Lanes that path could negotiate.", _GPU),
    # The firmware's table gpu_metrics
    "step128_gpu_throttled": Family(
        "1 while the firmware holds the clocks down for this reason; cards (gpu_metrics v1.3).",
        (*_GPU, "reason", "cause"),
    ),
    "step128_gpu_throttle_residency": Family(
        "Time throttled for this reason, in cycles of the firmware's timer: it tells whether and which, not how long; "
        "APUs (gpu_metrics v3.0).",
        (*_GPU, "reason", "cause"),
        counter=True,
    ),
    "step128_gpu_dram_read_bytes_per_second": Family(
        "Reads from an APU's memory, CPU included; the firmware's figure has 16 bits and ends at 65.5 GB/s.", _GPU
    ),
    "step128_gpu_dram_write_bytes_per_second": Family("Writes, likewise.", _GPU),
    "step128_gpu_metrics_table_info": Family(
        "Version and size of gpu_metrics; `read` is false where this exporter does not know it.",
        (*_GPU, "version", "bytes", "read"),
    ),
    "step128_gpu_metrics_unknown": Family(
        "Reads of gpu_metrics that were skipped: a version that is not known here.", _GPU, counter=True
    ),
    # The compute driver
    "step128_kfd_memory_bytes": Family(
        "Memory of a node of the compute driver by heap: system, vram_public, vram_private, gds, lds, scratch.",
        ("node", "gpu", "heap"),
    ),
    "step128_kfd_process_vram_bytes": Family("VRAM that compute processes hold, all together.", ("gpu",)),
    "step128_kfd_processes": Family("Processes with the compute driver open, of the whole machine.", ()),
    # The host
    "step128_host_memory_total_bytes": Family("Memory of the host.", ()),
    "step128_host_memory_available_bytes": Family("What can be used without swapping (MemAvailable).", ()),
    "step128_host_swap_total_bytes": Family("Swap.", ()),
    "step128_host_swap_free_bytes": Family("Free swap.", ()),
    "step128_host_cgroup_headroom_bytes": Family("What this container may still use, where it is limited.", ()),
    "step128_host_unified_memory": Family(
        "1 where the model lies in the host's memory: every GPU shares it, or there is none.", ()
    ),
    # The exporter itself
    "step128_exporter_source_error": Family(
        "1 if something of this source could not be used in this scrape.", ("source", "gpu")
    ),
    "step128_exporter_dropped_reads": Family(
        "Reads that gave no figure: denied, failed, absurd, or vanished (it was there before).",
        ("source", "gpu", "why"),
        counter=True,
    ),
    "step128_exporter_collect_seconds": Family("Time the telemetry of this scrape took.", ()),
}


def as_families(samples: Iterable[Sample]) -> Iterator[Metric]:
    """Group the samples; a family that has none is left out."""
    metrics: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for sample in samples:
        metric = metrics.get(sample.name)
        if metric is None:
            family = FAMILIES[sample.name]
            kind = CounterMetricFamily if family.counter else GaugeMetricFamily
            metric = metrics[sample.name] = kind(sample.name, family.help, labels=family.labels)
        metric.add_metric(sample.labels, sample.value)
    yield from metrics.values()

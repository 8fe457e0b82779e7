"""Everything that is known of a kernel without running it: one report per case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from step128_kernels.errors import CountingError
from step128_kernels.launch import KernelCase, Launch
from step128_kernels.offline.compile import Compiled, compile_launch
from step128_kernels.offline.cost import DEVICES, WAVE_LANES, instruction_mix, launch_seconds, loaded_bytes
from step128_kernels.offline.count import LaunchCount, count_launch
from step128_kernels.offline.latency import ranking_seconds, waiting_seconds
from step128_kernels.offline.occupancy import waves_per_simd


@dataclass(frozen=True)
class LaunchReport:
    """One launch of a case."""

    name: str
    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    """Private memory per lane."""
    lds_bytes: int
    """Shared memory per work-group."""
    waves_per_simd: float
    workgroups: int
    waves: int
    instructions: int
    """Wave-instructions of the whole launch, waits and hints included."""
    valu: int
    """Wave-instructions of the vector ALU; a dual-issued pair is two, though it is issued as one."""
    wmma: int
    mix: Mapping[str, int]
    load_bytes: Mapping[str, Mapping[int, int]]
    """Bytes loaded, by pointer argument and width in bits; "?" where the pointer could not be told."""
    modelled_seconds: float
    """Shortest time to issue it."""
    waiting_seconds: float
    """Time that its waves wait for memory."""
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """One case; register, spill and occupancy figures are those of its worst launch, work is the sum of all."""

    case: KernelCase
    launches: tuple[LaunchReport, ...]

    @property
    def vgprs(self) -> int:
        """Most vector registers of any launch."""
        return max(one.vgprs for one in self.launches)

    @property
    def sgprs(self) -> int:
        """Most scalar registers of any launch."""
        return max(one.sgprs for one in self.launches)

    @property
    def workgroups(self) -> int:
        """Work-groups of the largest launch."""
        return max(one.workgroups for one in self.launches)

    @property
    def spills(self) -> int:
        """Spilled registers, vector and scalar, of all launches."""
        return sum(one.vgpr_spills + one.sgpr_spills for one in self.launches)

    @property
    def scratch_bytes(self) -> int:
        """Most private memory per lane of any launch."""
        return max(one.scratch_bytes for one in self.launches)

    @property
    def lds_bytes(self) -> int:
        """Most shared memory of any launch."""
        return max(one.lds_bytes for one in self.launches)

    @property
    def waves_per_simd(self) -> float:
        """Least occupancy of any launch."""
        return min(one.waves_per_simd for one in self.launches)

    @property
    def valu_per_weight(self) -> float:
        """Lanes' vector instructions in the whole call per weight read; of attention, per byte of the KV cache."""
        return sum(one.valu for one in self.launches) * WAVE_LANES / self.case.weights

    @property
    def lane_inst_per_byte(self) -> float:
        """Lanes' instructions of every kind in the whole call per byte of weights and scales, or of the KV cache."""
        return sum(one.instructions for one in self.launches) * WAVE_LANES / self.case.memory_bytes

    @property
    def modelled_seconds(self) -> float:
        """Shortest time to issue the call, by the cost model."""
        return sum(one.modelled_seconds for one in self.launches)

    @property
    def ranking_seconds(self) -> float:
        """One figure to rank configs by: issuing, waiting for memory, and moving what must be moved."""
        waiting = sum(one.waiting_seconds for one in self.launches)
        moving = self.case.memory_bytes / DEVICES[self.case.arch].memory_bytes_per_second
        return ranking_seconds(self.modelled_seconds, waiting, moving)

    @property
    def bound_bytes_per_second(self) -> float:
        """Most weight and scale bytes per second that the instructions allow, by the cost model."""
        return self.case.memory_bytes / self.modelled_seconds

    @property
    def share_of_bandwidth(self) -> float:
        """The bound over the card's memory bandwidth; above 1 the memory is the limit."""
        return self.bound_bytes_per_second / DEVICES[self.case.arch].memory_bytes_per_second

    @property
    def mix(self) -> dict[str, int]:
        """Wave-instructions of the call by kind."""
        total: Counter[str] = Counter()
        for one in self.launches:
            total.update(one.mix)
        return dict(total.most_common())

    @property
    def load_bits(self) -> dict[str, int]:
        """Narrowest load of each pointer argument, in bits of one lane."""
        narrowest: dict[str, int] = {}
        for one in self.launches:
            for pointer, widths in one.load_bytes.items():
                narrowest[pointer] = min([*widths, narrowest.get(pointer, 1 << 20)])
        return narrowest

    @property
    def wmma(self) -> int:
        """WMMA wave-instructions of the call."""
        return sum(one.wmma for one in self.launches)


def inspect_case(case: KernelCase) -> Report:
    """Compile and count all launches of a case.

    Raises:
        KernelToolError: a launch does not compile, cannot be counted, or loads less than it must.
    """
    if case.arch not in DEVICES:
        raise CountingError(f"the cost model knows {', '.join(DEVICES)}, not {case.arch}")
    launches = tuple(_inspect_launch(launch, case.arch) for launch in case.launches)
    loaded = sum(size for one in launches for widths in one.load_bytes.values() for size in widths.values())
    if loaded < case.memory_bytes:
        raise CountingError(
            f"{case_title(case)}: {loaded} bytes are loaded as counted, but {case.memory_bytes} must be; "
            "the count or the case is wrong"
        )
    return Report(case, launches)


def _inspect_launch(launch: Launch, arch: str) -> LaunchReport:
    compiled: Compiled = compile_launch(launch, arch)
    count = count_launch(compiled, launch)
    return launch_report(launch, compiled, count, arch)


def launch_report(launch: Launch, compiled: Compiled, count: LaunchCount, arch: str) -> LaunchReport:
    """Put together what is known of one counted launch."""
    notes = count.assembly.metadata
    mix = instruction_mix(count)
    valu = sum(
        times * sum(len(one.parts) for one in block.instructions if one.is_valu)
        for block, times in zip(count.assembly.blocks, count.blocks, strict=True)
    )
    resident = waves_per_simd(notes["vgpr_count"], compiled.lds_bytes, launch.num_warps)
    return LaunchReport(
        name=launch.name,
        vgprs=notes["vgpr_count"],
        sgprs=notes["sgpr_count"],
        vgpr_spills=notes["vgpr_spill_count"],
        sgpr_spills=notes["sgpr_spill_count"],
        scratch_bytes=notes["private_segment_fixed_size"],
        lds_bytes=compiled.lds_bytes,
        waves_per_simd=resident,
        workgroups=count.workgroups,
        waves=count.waves,
        instructions=sum(mix.values()),
        valu=valu,
        wmma=mix["wmma"],
        mix=dict(mix),
        load_bytes=loaded_bytes(count),
        modelled_seconds=launch_seconds(count, launch.num_warps, DEVICES[arch]),
        waiting_seconds=waiting_seconds(launch, count, resident, DEVICES[arch]),
        assumptions=count.assumptions,
    )


def case_title(case: KernelCase) -> str:
    """Name a case in one line."""
    shape = " ".join(f"{key}={value}" for key, value in case.shape.items())
    config = " ".join(f"{key}={value}" for key, value in case.config.items())
    return f"{case.kernel} {case.phase} {case.arch} {shape} [{config}]"


def report_json(report: Report) -> dict[str, Any]:
    """One JSON object for a report; which figures are modelled is said in "modelled"."""
    case = report.case
    attention = {"kv_dtype": case.kernel.removeprefix("attention_")} if case.kernel.startswith("attention_") else {}
    return {
        "kernel": case.kernel,
        **attention,
        "phase": case.phase,
        "arch": case.arch,
        "device": DEVICES[case.arch].name,
        "shape": dict(case.shape),
        "config": dict(case.config),
        "vgprs": report.vgprs,
        "sgprs": report.sgprs,
        "spills": report.spills,
        "scratch_bytes": report.scratch_bytes,
        "lds_bytes": report.lds_bytes,
        "waves_per_simd": report.waves_per_simd,
        "workgroups": sum(one.workgroups for one in report.launches),
        "waves": sum(one.waves for one in report.launches),
        "weights": case.weights,
        "unit": case.unit,
        "memory_bytes": case.memory_bytes,
        "valu_per_weight": report.valu_per_weight,
        "lane_inst_per_byte": report.lane_inst_per_byte,
        "bound_bytes_per_second": report.bound_bytes_per_second,
        "share_of_bandwidth": report.share_of_bandwidth,
        "modelled_seconds": report.modelled_seconds,
        "ranking_seconds": report.ranking_seconds,
        "instruction_mix": report.mix,
        "load_bits": report.load_bits,
        "wmma_per_launch": report.wmma,
        "assumptions": sorted({*case.notes, *(text for one in report.launches for text in one.assumptions)}),
        "launches": [asdict(one) for one in report.launches],
        "modelled": ["bound_bytes_per_second", "share_of_bandwidth", "modelled_seconds"],
        "source": "compiled and counted without a GPU; times are modelled, not measured",
    }

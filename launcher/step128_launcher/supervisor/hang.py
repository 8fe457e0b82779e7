"""A server that lives but does not answer: is it busy or idle, does it still get work done, and the evidence of it.

Busy means working, or spinning in a collective that another rank never joins, as RCCL does; idle means a deadlock, or
waiting for something that does not come. With GPUs, their load decides (gpu_busy_percent of the amdgpu driver, percent,
in /sys/bus/pci/devices/ADDRESS); without, or where the driver does not tell, the CPU time of the server's processes.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from step128_launcher.supervisor.procfs import cpu_seconds, evidence

# An idle vLLM uses a few percent of a core, a spinning one a core or more; a GPU is at 0 or near 100.
_BUSY_CORES, _BUSY_PERCENT = 0.5, 50.0
_SAMPLE_SECONDS = 1.0


class Activity(StrEnum):
    """What a hung server does; also a metric's label."""

    BUSY = "busy"
    IDLE = "idle"

    @property
    def meaning(self) -> str:
        """For people."""
        return {
            Activity.BUSY: "busy (working or spinning in a collective)",
            Activity.IDLE: "idle (deadlocked or waiting)",
        }[self]


@dataclass(frozen=True)
class Sight:
    """What was seen over some time: the share of the GPUs' time, percent (None: not told), and cores kept busy."""

    gpu_percent: float | None
    cpu_cores: float

    @property
    def activity(self) -> Activity:
        """Busy or idle."""
        if self.gpu_percent is not None:
            return Activity.BUSY if self.gpu_percent >= _BUSY_PERCENT else Activity.IDLE
        return Activity.BUSY if self.cpu_cores >= _BUSY_CORES else Activity.IDLE

    def __str__(self) -> str:
        gpus = "GPU load unknown" if self.gpu_percent is None else f"GPUs {self.gpu_percent:.0f} % busy"
        return f"{self.activity.meaning}: {gpus}, {self.cpu_cores:.1f} CPU cores"


class ActivityWatch:
    """Samples GPUs and CPU time from its making on; `pids` returns the server's processes, times are in seconds."""

    def __init__(self, pids: Callable[[], Sequence[int]], gpu_addresses: Sequence[str], root: Path, now: float) -> None:
        self._pids, self._proc = pids, root / "proc"
        self._gpus = [root / "sys/bus/pci/devices" / address / "gpu_busy_percent" for address in gpu_addresses]
        self._began, self._cpu_before = now, cpu_seconds(pids(), self._proc)
        self._cpu_now, self._sampled = self._cpu_before, now
        self._percents: list[float] = []

    def sample(self, now: float) -> None:
        """Look, at most once a second."""
        if now - self._sampled < _SAMPLE_SECONDS:
            return
        self._sampled, self._cpu_now = now, cpu_seconds(self._pids(), self._proc)
        # The busiest counts: ranks wait for each other, so one that works or spins is the one that tells.
        self._percents += [max(percents)] if (percents := self._read_gpus()) else []

    def sight(self) -> Sight:
        """Return what was seen since the start of this watch."""
        seconds = max(self._sampled - self._began, _SAMPLE_SECONDS)
        percent = sum(self._percents) / len(self._percents) if self._percents else None
        return Sight(percent, max(0.0, self._cpu_now - self._cpu_before) / seconds)

    def write_evidence(self, path: Path) -> None:
        """Write what is known about the hang; a kernel stack is readable by root only.

        Raises:
            OSError: the file cannot be written.

        """
        path.write_text(f"{self.sight()}\n\n{evidence(self._pids(), self._proc)}", encoding="utf-8")
        path.chmod(0o600)

    def _read_gpus(self) -> list[float]:
        percents = []
        for path in self._gpus:
            with contextlib.suppress(OSError, ValueError):
                percents.append(float(path.read_text()))
        return percents


def tokens_done(metrics: str) -> float:
    """Return the tokens a server has read and written since its start, from its /metrics."""
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    total = 0.0
    for line in metrics.splitlines():
        if line.startswith(names):
            with contextlib.suppress(ValueError):
                total += float(line.rpartition(" ")[2])
    return total

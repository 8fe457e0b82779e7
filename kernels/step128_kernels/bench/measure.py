"""The order of a benchmark: all results are checked before any is timed, and nothing is compared while one is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from step128_kernels.testing import Closeness


@dataclass(frozen=True)
class Task:
    """One kernel of ours at one shape with ``m`` activation rows; of attention, query tokens of the batch."""

    kernel: str
    shape: Mapping[str, int]
    m: int


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of ``calls`` of them, and the bounds of the middle 60 %."""

    median: float
    low: float
    high: float
    calls: int


@dataclass(frozen=True)
class Load:
    """What a call reads of the weights, or of the KV cache."""

    weights: int
    bytes: int
    """Indices and scales."""
    unit: str = "weight"
    """What ``weights`` counts; of attention "KV byte"."""


@dataclass(frozen=True)
class Subject:
    """Ours or one of vLLM's, at a task. What could not be done leaves its field empty and a problem behind."""

    name: str
    load: Load
    phase: str = ""
    config: Mapping[str, int | str] = field(default_factory=dict)
    closeness: Closeness | None = None
    timing: Timing | None = None
    problem: str | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """Weight and scale bytes, or KV bytes, a second."""
        return None if self.timing is None else self.load.bytes / self.timing.median

    @property
    def seconds_per_weight(self) -> float | None:
        """Of a call, over the weights that it reads; what kernels of different formats are compared by."""
        return None if self.timing is None else self.timing.median / self.load.weights


@dataclass(frozen=True)
class Result:
    """One task: our kernel and vLLM's that do the same work, which may be none."""

    task: Task
    ours: Subject
    rivals: tuple[Subject, ...] = ()

    @property
    def fastest_rival(self) -> Subject | None:
        """The fastest of vLLM's that is right."""
        timed = [one for one in self.rivals if one.problem is None and one.seconds_per_weight is not None]
        return min(timed, key=lambda one: one.seconds_per_weight or 0.0, default=None)


@dataclass(frozen=True)
class Outcome:
    """A whole run."""

    results: tuple[Result, ...]
    copy_bytes: int
    """Read and written by the copy."""
    copy: Timing | None
    problem: str | None = None
    """Why the copy was not timed."""

    @property
    def correct(self) -> bool:
        """Whether every kernel of ours is right and was timed. Those of vLLM's that are not are left out."""
        return self.problem is None and all(one.ours.problem is None for one in self.results)

    @property
    def copy_bytes_per_second(self) -> float | None:
        """The ceiling: bytes read plus bytes written, a second."""
        return None if self.copy is None else self.copy_bytes / self.copy.median

    def speedup(self, result: Result) -> float | None:
        """Time per weight of vLLM's fastest kernel over ours; None while anything of ours is wrong."""
        rival = result.fastest_rival
        ours = result.ours.seconds_per_weight
        if not self.correct or rival is None or rival.seconds_per_weight is None or ours is None:
            return None
        return rival.seconds_per_weight / ours


class Machine(Protocol):
    """What runs kernels: :class:`step128_kernels.bench.gpu.GpuMachine`, but for tests. A kernel's errors end in it."""

    def check(self, task: Task) -> Result:
        """Compare ours and vLLM's with their references."""

    def time(self, result: Result) -> Result:
        """Fill in the timings of what is right."""

    def copy(self) -> tuple[int, Timing | None, str | None]:
        """Bytes read and written by a device-to-device copy, its timing, and what went wrong with it."""


def measure(tasks: Sequence[Task], machine: Machine, advance: Callable[[str], None]) -> Outcome:
    """Check everything, then, if all is right, time everything.

    Args:
        tasks: in the order of the results.
        machine: what runs them.
        advance: told "check" or "time" for every task that is done.
    """
    results = []
    for task in tasks:
        results.append(machine.check(task))
        advance("check")
    if any(result.ours.problem is not None for result in results):
        return Outcome(tuple(results), 0, None)
    copy_bytes, copy, problem = machine.copy()
    timed = []
    for result in results:
        timed.append(machine.time(result))
        advance("time")
    return Outcome(tuple(timed), copy_bytes, copy, problem)

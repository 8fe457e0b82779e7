"""A benchmark's outcome as one JSON document, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from step128_kernels.bench.measure import Outcome, Result, Subject

SCHEMA = 1
PORTABLE = (
    "This is not an AMD GPU: the portable path of our kernels was measured, not the AMD assembly. These times say "
    "nothing about an AMD GPU."
)
FORMATS = (
    "vLLM's kernels read groups of 32 weights (4.5 bits per weight), ours of 16 (5.0); speed-ups are per weight, those "
    "of attention per byte of the KV cache, of which both read the same"
)


@dataclass(frozen=True)
class Setting:
    """Where and when a run took place."""

    device: str
    arch: str
    """Empty for a GPU that is not AMD's."""
    driver: str | None
    versions: Mapping[str, str]
    date: str
    method: str
    vllm_missing: str | None
    """Why vLLM's kernels do not take part; None if they do."""

    @property
    def portable(self) -> bool:
        """Whether the AMD assembly cannot run here."""
        return not self.arch


def document(outcome: Outcome, setting: Setting, exit_code: int) -> dict[str, Any]:
    """The JSON document; absent numbers are null, and nothing is compared while anything of ours is wrong."""
    copy = outcome.copy
    return {
        "schema": SCHEMA,
        **asdict(setting),
        "portable": setting.portable,
        "formats": FORMATS,
        "correct": outcome.correct,
        "exit_code": exit_code,
        "copy": None
        if copy is None
        else {"bytes": outcome.copy_bytes, **asdict(copy), "bytes_per_second": outcome.copy_bytes_per_second},
        "problem": outcome.problem,
        "results": [_result(outcome, one) for one in outcome.results],
    }


def _result(outcome: Outcome, result: Result) -> dict[str, Any]:
    rival = result.fastest_rival
    speedup = outcome.speedup(result)
    return {
        "kernel": result.task.kernel,
        "shape": dict(result.task.shape),
        "m": result.task.m,
        "unit": result.ours.load.unit,
        "ours": _subject(outcome, result.ours),
        "vllm": [_subject(outcome, one) for one in result.rivals],
        "speedup_per_weight": speedup,
        "speedup_over": None if speedup is None or rival is None else rival.name,
    }


def _subject(outcome: Outcome, subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "phase": subject.phase or None,
        "config": dict(subject.config) or None,
        "weights": subject.load.weights,
        "bytes": subject.load.bytes,
        "problem": subject.problem,
        "typical_error": None if subject.closeness is None else _finite(subject.closeness.typical),
        "typical_error_allowed": None if subject.closeness is None else subject.closeness.typical_allowed,
        "largest_error_of_allowed": None if subject.closeness is None else _finite(subject.closeness.largest),
        "seconds": None if subject.timing is None else asdict(subject.timing),
        "bytes_per_second": subject.bytes_per_second,
        "share_of_copy": share_of_copy(outcome, subject),
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if number < float("inf") else None


def share_of_copy(outcome: Outcome, subject: Subject) -> float | None:
    """Bytes a second over those of the copy."""
    achieved, ceiling = subject.bytes_per_second, outcome.copy_bytes_per_second
    return None if achieved is None or ceiling is None else achieved / ceiling


def sentences(outcome: Outcome, setting: Setting) -> list[str]:
    """What a person must know beside the numbers."""
    said = [f"Device: {setting.device}; driver: {setting.driver or 'unknown'}; {_versions(setting.versions)}"]
    if setting.portable:
        said.append(PORTABLE)
    ceiling = outcome.copy_bytes_per_second
    if ceiling is not None:
        said.append(f"Copy, the ceiling: {ceiling / 1e9:.0f} GB/s read and written.")
    said.append(f"{FORMATS}." if setting.vllm_missing is None else f"Ours and the copy only: {setting.vllm_missing}.")
    said += [_problem(one.task.kernel, one, one.ours) for one in outcome.results if one.ours.problem]
    said += [_problem(rival.name, one, rival) for one in outcome.results for rival in one.rivals if rival.problem]
    if outcome.problem is not None:
        said.append(outcome.problem)
    if not outcome.correct:
        said.append("Not all is right, so nothing is compared.")
    return said


def _problem(name: str, result: Result, subject: Subject) -> str:
    return f"WRONG: {name} {_shape(result)} M={result.task.m} {dict(subject.config)}: {subject.problem}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def table(outcome: Outcome, setting: Setting) -> Table:
    """One row per task."""
    made = Table(title=f"{setting.device}{' (portable path)' if setting.portable else ''}")
    for heading in ("kernel", "shape"):
        made.add_column(heading, overflow="fold")
    for heading in ("M", "error", "ours µs", "GB/s", "of copy", "vLLM µs", "its kernel", "speed-up per weight"):
        made.add_column(heading, justify="right")
    for result in outcome.results:
        made.add_row(*_row(outcome, result))
    return made


def _row(outcome: Outcome, result: Result) -> Sequence[str]:
    ours, rival = result.ours, result.fastest_rival
    speedup, share = outcome.speedup(result), share_of_copy(outcome, ours)
    return (
        f"{ours.name} {ours.phase}",
        _shape(result),
        str(result.task.m),
        "WRONG" if ours.problem or ours.closeness is None else f"{ours.closeness.typical:.1e}",
        _microseconds(ours),
        "-" if ours.bytes_per_second is None else f"{ours.bytes_per_second / 1e9:.0f}",
        "-" if share is None else f"{share:.0%}",
        "-" if rival is None else _microseconds(rival),
        "-" if rival is None else rival.name.removeprefix("vllm_"),
        "-" if speedup is None else f"{speedup:.2f}x",
    )


def _microseconds(subject: Subject) -> str:
    """Median and the bounds of the middle 60 %."""
    if subject.timing is None:
        return "-"
    median, low, high = (1e6 * one for one in (subject.timing.median, subject.timing.low, subject.timing.high))
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


def _shape(result: Result) -> str:
    return " ".join(f"{name}={size}" for name, size in result.task.shape.items())

"""The benchmark's machine: this GPU, our kernels with the configs they are shipped with, and vLLM's if it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from step128_kernels import cases
from step128_kernels.bench.measure import Load, Result, Subject, Task, Timing
from step128_kernels.nl4_gemm.configs import gemm_table
from step128_kernels.nl4_moe.configs import moe_config
from step128_kernels.runners import GEMM_ROUNDINGS, MOE_ROUNDINGS, gemm_runner, moe_runner
from step128_kernels.testing import Closeness, compare, unwritten_is_nan
from step128_kernels.tuned.load import Config

Run = tuple[Callable[[], Any], Callable[[], Any]]
"""A kernel's call and its reference's; ours give a tensor, vLLM's a tuple of them."""

_COUNTED_ARCH = "gfx1201"  # weights and bytes of a case are the same on every arch


_PARTS = ("_launch", "", "_run")  # of the plugin's module, which may import vLLM; this one may not


@dataclass(frozen=True)
class Vllm:
    """vLLM's kernels, or why there are none."""

    cases: Any = None
    runs: Any = None
    missing: str | None = None


def find_vllm() -> Vllm:
    """Look for vLLM and its kernels."""
    if find_spec("vllm") is None:
        return Vllm(missing="vLLM is not installed here")
    try:
        launch, cases_, runs = (import_module(f"step128_kernels.vllm_plugin.baselines{part}") for part in _PARTS)
        launch.find_kernels()
    except Exception as error:  # another release of vLLM may fail in any way; ours are measured all the same
        return Vllm(missing=f"this vLLM's kernels cannot be loaded ({first_line(error)})")
    return Vllm(cases_, runs)


class GpuMachine:
    """See :class:`step128_kernels.bench.measure.Machine`.

    Args:
        vllm: from :func:`find_vllm`.
        device: "cuda"; "cpu" under Triton's interpreter, where only :meth:`check` works.
        dtype: of the activations.
        time_call: gives the timing of a call.
        time_copy: gives the bytes and the timing of a copy.
    """

    def __init__(
        self,
        vllm: Vllm,
        time_call: Callable[[Callable[[], Any]], Timing],
        time_copy: Callable[[], tuple[int, Timing]],
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._vllm, self._time_call, self._time_copy = vllm, time_call, time_copy
        self._device, self._dtype = device, dtype

    def check(self, task: Task) -> Result:
        """Compare ours and vLLM's with their references."""
        config = self._config(task)
        case = cases.case(task.kernel, task.shape, task.m, config, _COUNTED_ARCH)
        ours = Subject(task.kernel, Load(case.weights, case.memory_bytes), str(config["phase"]), config)
        roundings = GEMM_ROUNDINGS if task.kernel == "nl4_gemm" else MOE_ROUNDINGS
        ours = self._checked(ours, partial(self._ours, task, config), roundings, task)
        return Result(task, ours, tuple(self._checked_rival(name, task) for name in self._rival_names(task)))

    def time(self, result: Result) -> Result:
        """Fill in the timings of what is right."""
        task = result.task
        ours = self._timed(result.ours, partial(self._ours, task, result.ours.config))
        return Result(
            task, ours, tuple(self._timed(one, partial(self._rival, one.name, task)) for one in result.rivals)
        )

    def copy(self) -> tuple[int, Timing | None, str | None]:
        """Time a device-to-device copy."""
        try:
            size, timing = self._time_copy()
        except (RuntimeError, AssertionError) as error:
            return 0, None, f"the copy cannot be timed: {first_line(error)}"
        return size, timing, None

    def _config(self, task: Task) -> Config:
        device = torch.device(self._device)
        if task.kernel == "nl4_gemm":
            return gemm_table(task.shape["N"], task.shape["K"], device).nearest(task.m)
        return moe_config(cases.moe_shape(task.shape, task.m), device)

    def _ours(self, task: Task, config: Config) -> Run:
        device, dtype = self._device, self._dtype
        if task.kernel == "nl4_gemm":
            return gemm_runner(task.m, task.shape["N"], task.shape["K"], config, device=device, dtype=dtype)
        return moe_runner(cases.moe_shape(task.shape, task.m), config, device=device, dtype=dtype)

    def _rival_names(self, task: Task) -> tuple[str, ...]:
        return () if self._vllm.cases is None else tuple(self._vllm.runs.opponents_here(task.kernel, task.m))

    def _rival(self, name: str, task: Task) -> Run:
        run = self._vllm.runs.baseline_runner(name, task.shape, task.m, device=self._device, dtype=self._dtype)
        return run.call, run.reference

    def _checked_rival(self, name: str, task: Task) -> Subject:
        load = Load(*self._vllm.cases.baseline_load(name, task.shape, task.m))
        return self._checked(Subject(name, load), partial(self._rival, name, task), self._vllm.runs.ROUNDINGS, task)

    def _checked(self, subject: Subject, make: Callable[[], Run], roundings: int, task: Task) -> Subject:
        try:
            with unwritten_is_nan():
                call, reference = make()
                actual = call()
            found = self._worst(actual, reference(), roundings, task)
        except Exception as error:  # Triton, CUDA and HIP raise a dozen types; each means that this one is not right
            return replace(subject, problem=f"{type(error).__name__}: {first_line(error)}")
        return replace(subject, closeness=found, problem=found.problem)

    def _worst(self, actual: Any, expected: Any, roundings: int, task: Task) -> Closeness:
        pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else zip(actual, expected, strict=True)
        terms = max(task.shape["N"], task.shape["K"])
        found = [compare(a, e, rounded_to=self._dtype, terms=terms, roundings=roundings) for a, e in pairs]
        return max(found, key=lambda one: (one.problem is not None, one.largest))

    def _timed(self, subject: Subject, make: Callable[[], Run]) -> Subject:
        if subject.problem is not None:
            return subject
        try:
            return replace(subject, timing=self._time_call(make()[0]))
        except Exception as error:  # see _checked
            return replace(subject, problem=f"not timed: {type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a table."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]

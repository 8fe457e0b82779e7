"""The benchmark's machine: this GPU, our kernels with the configs they are shipped with, and vLLM's if it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from step128_kernels.bench.attention import Attention, is_attention
from step128_kernels.bench.families import Family, Place, Run, Vllm
from step128_kernels.bench.measure import Result, Subject, Task, Timing
from step128_kernels.bench.nl4 import Nl4
from step128_kernels.testing import Closeness, compare, unwritten_is_nan

_PARTS = ("baselines_launch", "baselines", "baselines_run", "attention_baselines_run")
"""Modules of the plugin, which may import vLLM; this one may not."""


def find_vllm() -> Vllm:
    """Look for vLLM and its kernels."""
    if find_spec("vllm") is None:
        return Vllm(missing="vLLM is not installed here")
    try:
        launch, cases, runs, attention = (import_module(f"step128_kernels.vllm_plugin.{part}") for part in _PARTS)
        launch.find_kernels()
        attention.find_kernels()
    except Exception as error:  # another release of vLLM may fail in any way; ours are measured all the same
        return Vllm(missing=f"this vLLM's kernels cannot be loaded ({first_line(error)})")
    return Vllm(cases, runs, attention)


def family_of(kernel: str) -> Family:
    """How a kernel is measured."""
    return Attention() if is_attention(kernel) else Nl4()


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
        self._place = Place(device, dtype)

    def check(self, task: Task) -> Result:
        """Compare ours and vLLM's with their references."""
        family, place = family_of(task.kernel), self._place
        config = family.config(task, place)
        ours = Subject(task.kernel, family.load(task, config, place), str(config["phase"]), config)
        ours = self._checked(ours, partial(family.ours, task, config, place), family.roundings(task), task)
        names = () if self._vllm.missing is not None else family.rivals(task, self._vllm, place)
        return Result(task, ours, tuple(self._checked_rival(name, task) for name in names))

    def time(self, result: Result) -> Result:
        """Fill in the timings of what is right."""
        task, family, place = result.task, family_of(result.task.kernel), self._place
        ours = self._timed(result.ours, partial(family.ours, task, result.ours.config, place))
        rivals = (self._timed(one, partial(family.rival, one.name, task, self._vllm, place)) for one in result.rivals)
        return Result(task, ours, tuple(rivals))

    def copy(self) -> tuple[int, Timing | None, str | None]:
        """Time a device-to-device copy."""
        try:
            size, timing = self._time_copy()
        except (RuntimeError, AssertionError) as error:
            return 0, None, f"the copy cannot be timed: {first_line(error)}"
        return size, timing, None

    def _checked_rival(self, name: str, task: Task) -> Subject:
        family, place = family_of(task.kernel), self._place
        subject = Subject(name, family.rival_load(name, task, self._vllm, place))
        make = partial(family.rival, name, task, self._vllm, place)
        return self._checked(subject, make, family.rival_roundings(task, self._vllm), task)

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
        terms = family_of(task.kernel).terms(task)
        found = [compare(a, e, rounded_to=self._place.dtype, terms=terms, roundings=roundings) for a, e in pairs]
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

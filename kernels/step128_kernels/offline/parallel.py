"""Many cases at once, on all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from step128_kernels.errors import CompilationError, KernelToolError
from step128_kernels.launch import KernelCase
from step128_kernels.offline.compile import compile_key, require_triton
from step128_kernels.offline.inspect import LaunchReport, Report, case_title, inspect_case

Outcome = tuple[LaunchReport, ...] | KernelToolError
_cases: Sequence[KernelCase] = ()


def inspect_cases(
    cases: Sequence[KernelCase], jobs: int | None = None, done: Callable[[int], None] = lambda count: None
) -> list[Report | KernelToolError]:
    """Inspect every case; a case that fails gives its error in its place.

    Cases that share compiled code stay in one process, so nothing is compiled twice. ``jobs`` defaults to the cores
    this process may use; ``done`` is told how many more cases are finished.

    Raises:
        ToolEnvironmentError: Triton is missing or interprets.
    """
    require_triton()
    groups = _groups(cases)
    jobs = min(jobs or len(os.sched_getaffinity(0)), max(1, len(groups)))
    outcomes: dict[int, Outcome] = {}
    if jobs == 1:
        _start(cases)
        for group in groups:
            for number in group:
                outcomes |= _run([number])
                done(1)
    else:
        # Forked workers inherit the cases: a JIT function cannot be pickled, and importing Triton again takes seconds.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(cases,)) as pool:
            futures = {pool.submit(_run, group): group for group in groups}
            for future in as_completed(futures):
                group = futures[future]
                try:
                    outcomes |= future.result()
                except BrokenProcessPool as error:
                    raise CompilationError(
                        f"a compiling process died near {case_title(cases[group[0]])}; is there enough memory? "
                        "Try `--jobs 1`."
                    ) from error
                done(len(group))
    found = [outcomes[number] for number in range(len(cases))]
    return [
        outcome if isinstance(outcome, KernelToolError) else Report(case, outcome)
        for case, outcome in zip(cases, found, strict=True)
    ]


def _groups(cases: Sequence[KernelCase]) -> list[list[int]]:
    """Numbers of the cases, those with the same code together."""
    groups: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        try:
            key = " ".join(compile_key(launch, case.arch) for launch in case.launches)
        except KernelToolError:
            key = f"case {number}"  # inspecting it says what is wrong
        groups.setdefault(f"{case.arch} {key}", []).append(number)
    return list(groups.values())


def _start(cases: Sequence[KernelCase]) -> None:
    global _cases
    _cases = cases


def _run(numbers: list[int]) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    for number in numbers:
        try:
            outcomes[number] = inspect_case(_cases[number]).launches
        except KernelToolError as error:
            outcomes[number] = error
    return outcomes

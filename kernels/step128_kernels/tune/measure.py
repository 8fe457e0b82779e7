"""Candidates on a real GPU: each correct first, then timed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from step128_kernels.errors import KernelToolError
from step128_kernels.tune.journal import Outcome
from step128_kernels.tune.search import Candidate, Space

METHOD = "median of timed calls, caches overwritten before each (triton.testing.do_bench); results compared first"

Call = Callable[[], Any]

# Against the reference's root mean square. Rounding weights and sums to bfloat16 costs some 0.3 %, and a few times that
# in the worst of a million results; one wrong group of 16 weights in a row of 4096 moves a result by 6 % or more.
_TYPICAL_ERROR = 0.01
_LARGEST_ERROR = 0.04
_ROUNDING = 2.0**-7  # of each result itself: a few bfloat16 steps, for the large ones among them
_WARM_UP_MILLISECONDS = 25
_TIMED_MILLISECONDS = 100


class GpuLostError(KernelToolError):
    """The GPU does not answer any more in this process."""

    exit_code = 69


class GpuMemoryError(KernelToolError):
    """Weights, inputs and the reference's result do not fit."""

    exit_code = 3


def measure_all(
    space: Space, candidates: Sequence[Candidate], time_call: Callable[[Call], float], check_gpu: Callable[[], None]
) -> Iterator[tuple[Candidate, Outcome]]:
    """Measure candidates one by one, those of one number of rows together, as they share the reference's result.

    Args:
        space: gives the calls.
        candidates: in any order.
        time_call: gives the seconds of a call; `median_seconds`, but for tests.
        check_gpu: raises RuntimeError if the GPU does not answer; `torch.cuda.synchronize`, but for tests.

    Raises:
        GpuMemoryError: if the inputs do not fit.
        GpuLostError: after a candidate that broke the GPU's context, in which every later one would fail too.

    """
    rows, expected = None, None
    for candidate in sorted(candidates, key=lambda one: one.rows):
        target = candidate.target
        try:
            fast, reference = space.runner(target.kernel, target.shape, candidate.rows, candidate.config)
            if candidate.rows != rows:
                rows, expected = candidate.rows, reference()
        except torch.OutOfMemoryError as error:
            raise GpuMemoryError(
                f"{target} at {candidate.rows} rows does not fit into the GPU's free memory, with its reference. "
                "End what else uses the GPU, and run the same command again: it goes on here."
            ) from error
        outcome = _measure(fast, expected, time_call)
        yield candidate, outcome
        if outcome.problem is not None:
            try:
                check_gpu()
            except RuntimeError as error:
                raise GpuLostError(
                    f"The GPU failed on {target} at {candidate.rows} rows with {dict(candidate.config)}: {error}. "
                    "Run the same command again: it goes on after this candidate."
                ) from error


def _measure(fast: Call, expected: Any, time_call: Callable[[Call], float]) -> Outcome:
    try:
        wrong = wrong_result(fast(), expected)
        return Outcome(seconds=time_call(fast)) if wrong is None else Outcome(problem=wrong)
    except Exception as error:  # Triton and HIP raise a dozen types; each means that this candidate is out
        first_line = next(iter(str(error).strip().splitlines()), "")
        return Outcome(problem=f"{type(error).__name__}: {first_line[:200]}")


def wrong_result(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Say what is wrong with a kernel's result, or None."""
    if found.shape != expected.shape:
        return f"wrong result: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    right = expected.double()
    difference = (found.double() - right).abs()
    if not bool(torch.isfinite(difference).all()):
        return "wrong result: not finite"
    typical = right.square().mean().sqrt()
    if bool(difference.square().mean().sqrt() > _TYPICAL_ERROR * typical):
        return "wrong result"
    if bool((difference > _LARGEST_ERROR * typical + _ROUNDING * right.abs()).any()):
        return "wrong result: single values"
    return None


def median_seconds(call: Call) -> float:
    """Return the median time of a call on the GPU."""
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=_WARM_UP_MILLISECONDS, rep=_TIMED_MILLISECONDS, return_mode="median")
    return float(milliseconds) / 1e3

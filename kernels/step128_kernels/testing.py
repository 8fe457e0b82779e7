"""Whether a kernel's result is right: compared with a float32 reference, with tolerances that have reasons.

Errors are measured against the root mean square of the reference's own row (the last dimension), so that they mean the
same whatever the size of the weights, and a token of small values is not hidden behind one of large ones.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_log = logging.getLogger(__name__)

_SUMMATION = 2.0**-24
"""Unit roundoff of float32, in which every kernel sums."""
_DEVIATIONS = 8.0
"""How many typical errors a single value may be off. A normal error reaches 6 once in 5e8 values; products of rounded
factors have somewhat heavier tails."""


@dataclass(frozen=True)
class Closeness:
    """How near a result is to its reference. All numbers are ratios to the root mean square of the reference's rows."""

    typical: float
    """Root mean square of the error."""
    typical_allowed: float
    largest: float
    """The worst value's error over what it may be; right up to 1."""
    problem: str | None
    """What is wrong, or None."""


def tolerance(rounded_to: torch.dtype, terms: int, roundings: int) -> float:
    """Typical error allowed: ``u * sqrt(roundings) + 2**-24 * sqrt(terms)``.

    * u, the unit roundoff of ``rounded_to`` (half its ``eps``), bounds the relative error of rounding one value. A
      rounding before a sum gives every term an error of its own; such errors add like the terms themselves, by squares,
      so the sum's error relative to the sum's typical size is u again, whatever the number of terms. Independent
      roundings one after the other add by squares too. Rounding errors are u / sqrt(3) or less by root mean square, so
      this is about twice what a right kernel shows.
    * Sums are formed in float32: each of ``terms`` additions rounds the partial sum, which is at most as large as the
      result by root mean square; these errors add by squares as well.

    Args:
        rounded_to: type of the activations and the output.
        terms: length of the longest sum.
        roundings: how often values are rounded to that type on the way: 2 for a linear layer (weights in the prefill
            kernel, the output), 6 for the experts (both weights, the hidden values, which count twice since SwiGLU is a
            product of two of them, the experts' separate outputs, the sum).
    """
    return torch.finfo(rounded_to).eps / 2 * math.sqrt(roundings) + _SUMMATION * math.sqrt(terms)


def compare(
    actual: torch.Tensor, expected: torch.Tensor, *, rounded_to: torch.dtype, terms: int, roundings: int = 2
) -> Closeness:
    """Compare a result with its reference.

    A row of which the reference is all zero must be exactly zero. One wrong group of 16 weights in a row of 4096 moves
    its result by 6 % of the typical size or more, which is beyond the 4.4 % allowed a single value of a bfloat16 linear
    layer (8 typical errors, plus the rounding of the value itself).

    Args:
        actual: any float type.
        expected: of the same shape, from float32 arithmetic.
        rounded_to: see :func:`tolerance`.
        terms: see :func:`tolerance`.
        roundings: see :func:`tolerance`.
    """
    allowed = tolerance(rounded_to, terms, roundings)
    if actual.shape != expected.shape:
        return _wrong(allowed, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    right = expected.float()
    unset = int((~torch.isfinite(actual)).sum())
    if unset:
        return _wrong(allowed, f"{unset} of {actual.numel()} values are not finite: not written, or overflowed")
    if not bool(torch.isfinite(right).all()):
        return _wrong(allowed, "the reference itself is not finite")
    error = (actual.float() - right).abs()
    row = right.square().mean(dim=-1, keepdim=True).sqrt()
    # 0 / 0 is a right value in a row of zeros; anything else over 0 becomes infinite.
    share = torch.where(error == 0, 0.0, error / row)
    typical = float(share.square().mean().sqrt())
    rounding = 2 * torch.finfo(rounded_to).eps / 2
    limit = _DEVIATIONS * allowed * row + rounding * right.abs()
    largest = float(torch.where(error == 0, 0.0, error / limit).max())
    problem = None
    if not typical <= allowed:
        problem = f"typical error {typical:.2g} of the reference's size, {allowed:.2g} allowed"
    elif not largest <= 1:
        problem = f"a value is {largest:.2g} times as far off as allowed; typical error {typical:.2g}"
    return Closeness(typical, allowed, largest, problem)


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    rounded_to: torch.dtype,
    terms: int,
    roundings: int = 2,
    name: str = "result",
) -> Closeness:
    """:func:`compare`, the numbers logged.

    Raises:
        AssertionError: the result is wrong; the message says by how much.
    """
    found = compare(actual, expected, rounded_to=rounded_to, terms=terms, roundings=roundings)
    _log.info(
        "%s: typical error %.3g of %.3g allowed, worst value at %.0f %% of its tolerance",
        *(name, found.typical, found.typical_allowed, 100 * found.largest),
    )
    if found.problem is not None:
        raise AssertionError(f"{name}: {found.problem}")
    return found


def poisoned(*sizes: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of NaN for a kernel to write to: what it leaves out, or reads unwritten, cannot pass for right."""
    return torch.full(sizes, math.nan, dtype=dtype, device=device)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Inside, whatever torch allocates without values is NaN (integers: their maximum), buffers between kernels too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is what torch ties that filling to
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _wrong(allowed: float, problem: str) -> Closeness:
    return Closeness(math.inf, allowed, math.inf, problem)

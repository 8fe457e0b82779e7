"""Second moments of a linear layer's inputs: the mean of x^2 by channel, and on request the mean of x x^T."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_PER_BLOCK = 1024  # bounds the float64 copy


class SecondMoments:
    """Sums over the rows seen so far, on the device of the computation; experts each have their own.

    Squares are summed in float64: over millions of tokens float32 would lose what a rare expert adds. The matrices are
    float32, for their size.
    """

    def __init__(self, columns: int, device: torch.device, experts: int = 1, matrices: bool = False) -> None:
        """Start at zero; ``matrices`` asks for x x^T, ``[experts, columns, columns]``."""
        self._squares = torch.zeros(experts, columns, dtype=torch.float64, device=device)
        self._rows = [0] * experts
        self._matrices = torch.zeros(experts, columns, columns, device=device) if matrices else None

    def add(self, rows: Tensor, expert: int = 0) -> None:
        """Count rows ``[N, columns]`` of any float type."""
        self._rows[expert] += rows.shape[0]
        for start in range(0, rows.shape[0], _ROWS_PER_BLOCK):
            block = rows[start : start + _ROWS_PER_BLOCK].to(torch.float64)
            self._squares[expert] += block.square_().sum(0)
        if self._matrices is not None:
            wide = rows.to(torch.float32)
            self._matrices[expert].addmm_(wide.t(), wide)

    @property
    def importance(self) -> Tensor:
        """The mean of x^2, float32 ``[experts, columns]`` on the CPU; zeros for an expert that saw no row."""
        return (self._squares / self._divisors(self._squares)).to(torch.float32).cpu()

    @property
    def matrices(self) -> Tensor | None:
        """The mean of x x^T, float32 ``[experts, columns, columns]`` on the CPU, if asked for; ends the counting."""
        if self._matrices is None:
            return None
        return self._matrices.div_(self._divisors(self._matrices)).cpu()

    def _divisors(self, like: Tensor) -> Tensor:
        rows = torch.tensor(self._rows, dtype=like.dtype, device=like.device).clamp(min=1)
        return rows.view(-1, *[1] * (like.ndim - 1))

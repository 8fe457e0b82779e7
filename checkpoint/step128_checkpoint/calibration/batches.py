"""Which samples go through a layer together, and where their hidden states lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Batches are padded to multiples of it. On a CPU every new shape of a matrix product costs milliseconds and, while it
is remembered, most of a megabyte; a GPU's attention wants masks to be aligned."""


@dataclass(frozen=True)
class Batch:
    """Samples that are padded to the longest of them and to whole multiples of 64; all held out, or none.

    ``first_row`` is where their hidden states begin in the files: samples follow each other there, without padding.
    """

    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    held_out: bool
    first_row: int

    @property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(self.lengths)

    @property
    def width(self) -> int:
        """T: positions of each sample, padding included."""
        return _aligned(max(self.lengths))

    @cached_property
    def real(self) -> Tensor | None:
        """Bool [B * T], false for padding, on the CPU; None if there is no padding."""
        if set(self.lengths) == {self.width}:
            return None
        positions = torch.arange(self.width)
        return (positions[None] < torch.tensor(self.lengths)[:, None]).flatten()

    def pad(self, rows: Tensor) -> Tensor:
        """Rows [tokens, H] as [B, T, H], zeros where there is no token."""
        if self.real is None:
            return rows.view(len(self.lengths), self.width, -1)
        padded = rows.new_zeros(len(self.lengths) * self.width, rows.shape[1])
        padded[self.real.to(rows.device)] = rows
        return padded.view(len(self.lengths), self.width, -1)

    def unpad(self, hidden: Tensor) -> Tensor:
        """Undo :meth:`pad`."""
        rows = hidden.flatten(0, 1)
        return rows if self.real is None else rows[self.real.to(rows.device)]


def plan_batches(
    lengths: Sequence[int], numbers: Sequence[int], held_out: bool, batch_tokens: int, first_row: int = 0
) -> list[Batch]:
    """Put samples of like length together: the longest first, so that a batch too large for memory fails at once.

    A batch has at most ``batch_tokens`` tokens, padding included, or is a single sample.
    """
    ordered = sorted(numbers, key=lambda number: (-lengths[number], number))
    batches: list[Batch] = []
    start = 0
    while start < len(ordered):
        count = max(1, batch_tokens // _aligned(int(lengths[ordered[start]])))
        members = tuple(ordered[start : start + count])
        batch = Batch(members, tuple(int(lengths[number]) for number in members), held_out, first_row)
        batches.append(batch)
        first_row += batch.tokens
        start += count
    return batches


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT

"""Which samples go through a layer together, and where their hidden states lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples that are padded to the longest of them; all held out, or none.

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

    @cached_property
    def real(self) -> Tensor | None:
        """Bool [B * T], false for padding, on the CPU; None if there is no padding."""
        if len(set(self.lengths)) == 1:
            return None
        positions = torch.arange(max(self.lengths))
        return (positions[None] < torch.tensor(self.lengths)[:, None]).flatten()

    def pad(self, rows: Tensor) -> Tensor:
        """Rows [tokens, H] as [B, T, H], zeros where there is no token."""
        if self.real is None:
            return rows.view(len(self.lengths), self.lengths[0], -1)
        padded = rows.new_zeros(len(self.lengths) * max(self.lengths), rows.shape[1])
        padded[self.real.to(rows.device)] = rows
        return padded.view(len(self.lengths), max(self.lengths), -1)

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
        count = max(1, batch_tokens // int(lengths[ordered[start]]))
        members = tuple(ordered[start : start + count])
        batch = Batch(members, tuple(int(lengths[number]) for number in members), held_out, first_row)
        batches.append(batch)
        first_row += batch.tokens
        start += count
    return batches

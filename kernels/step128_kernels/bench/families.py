"""What the benchmark must know of a kind of kernel: its configs, what it reads, and how ours and vLLM's are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from step128_kernels.bench.measure import Load, Task
from step128_kernels.tuned.load import Config

Run = tuple[Callable[[], Any], Callable[[], Any]]
"""A kernel's call and its reference's; a tensor each, or a tuple of them."""


@dataclass(frozen=True)
class Vllm:
    """vLLM's kernels, which only the plugin may import, or why there are none."""

    cases: Any = None
    runs: Any = None
    attention_runs: Any = None
    missing: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a task runs."""

    device: str
    """"cuda"; "cpu" under Triton's interpreter."""
    dtype: torch.dtype
    """Of the activations."""


class Family(Protocol):
    """Kernels that are measured in one way: :class:`step128_kernels.bench.nl4.Nl4` and
    :class:`step128_kernels.bench.attention.Attention`.
    """

    def config(self, task: Task, place: Place) -> Config:
        """The config that ours is shipped with."""

    def load(self, task: Task, config: Config, place: Place) -> Load:
        """What ours reads."""

    def ours(self, task: Task, config: Config, place: Place) -> Run:
        """Our call."""

    def terms(self, task: Task) -> int:
        """Length of the longest sum, for :func:`step128_kernels.testing.compare`."""

    def roundings(self, task: Task) -> int:
        """Of ours; see there."""

    def rivals(self, task: Task, vllm: Vllm, place: Place) -> tuple[str, ...]:
        """Names of vLLM's kernels that do the same."""

    def rival_load(self, name: str, task: Task, vllm: Vllm, place: Place) -> Load:
        """What one of them reads."""

    def rival(self, name: str, task: Task, vllm: Vllm, place: Place) -> Run:
        """Its call."""

    def rival_roundings(self, task: Task, vllm: Vllm) -> int:
        """Of vLLM's."""

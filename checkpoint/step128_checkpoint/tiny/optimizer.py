"""Muon for the matrices, Adam for everything else, both with float32 master weights behind bfloat16 parameters.

Muon (Keller Jordan, 2024) replaces each matrix's momentum by its nearest orthogonal matrix; in a few hundred steps it
gets markedly further than Adam. Matrices of one shape, experts included, are stacked and orthogonalised together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's quintic iteration
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition; matrices [..., N, K], bfloat16 inside."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = (matrices.mT if tall else matrices).bfloat16()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class _Group:
    """Parameters of one shape with one learning rate."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self.parameters, self.rate = parameters, rate
        self.master = torch.stack([p.detach().float() for p in parameters])

    def gradient(self) -> Tensor:
        return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]).float()

    def write_back(self) -> None:
        for parameter, master in zip(self.parameters, self.master.unbind(), strict=True):
            parameter.detach().copy_(master)
            parameter.grad = None


class _Muon(_Group):
    def __init__(self, parameters: list[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, rate)
        self.momentum, self.buffer = momentum, torch.zeros_like(self.master)

    def step(self, factor: float) -> None:
        gradient = self.gradient()
        self.buffer.lerp_(gradient, 1 - self.momentum)
        update = orthogonalise(gradient.lerp_(self.buffer, self.momentum)).float()
        rows, columns = update.shape[-2:]
        self.master.add_(update, alpha=-self.rate * factor * max(1.0, rows / columns) ** 0.5)
        self.write_back()


class _Adam(_Group):
    def __init__(self, parameters: list[nn.Parameter], rate: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(parameters, rate)
        self.betas, self.steps = betas, 0
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)

    def step(self, factor: float) -> None:
        self.steps += 1
        gradient, (b1, b2) = self.gradient(), self.betas
        self.first.lerp_(gradient, 1 - b1)
        self.second.lerp_(gradient.square(), 1 - b2)
        spread = (self.second / (1 - b2**self.steps)).sqrt_().add_(1e-10)
        self.master.addcdiv_(self.first, spread, value=-self.rate * factor / (1 - b1**self.steps))
        self.write_back()


class Optimizer:
    """All parameters of the tiny model in groups of equal shape."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rates: dict[str, float]) -> None:
        """`rates` gives the learning rate of each kind: matrix (Muon), embedding, head, small (Adam)."""
        groups: dict[tuple[str, torch.Size], list[nn.Parameter]] = {}
        for name, parameter in named:
            groups.setdefault((_kind(name, parameter), parameter.shape), []).append(parameter)
        self.groups: list[_Muon | _Adam] = [
            _Muon(group, rates[kind]) if kind == "matrix" else _Adam(group, rates[kind])
            for (kind, _), group in groups.items()
        ]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the accumulated gradients, which are then dropped; `factor` scales every learning rate."""
        for group in self.groups:
            group.step(factor)


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name.endswith("embed_tokens.weight"):
        return "embedding"
    if name.endswith(("lm_head.weight", "shared_head.output.weight")):
        return "head"
    if parameter.ndim == 1 or name.endswith((".moe.gate.weight", ".g_proj.weight")):
        return "small"
    return "matrix"

"""The routed experts of one layer, run as transformers runs them, with every expert's inputs and outputs in sight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from step128_checkpoint.calibration.result import LayerSaliency

OnExpert = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called with an expert's number, its inputs [n, H], the inputs of its down_proj [n, I], its outputs f(x) [n, H] before
the gate, and the gates g(x) [n], renormalised over the chosen experts."""


def run_experts(
    experts: Step3p7Experts, hidden: Tensor, choice: Tensor, gates: Tensor, real: Tensor | None, on_expert: OnExpert
) -> Tensor:
    """Do what ``Step3p7Experts.forward`` does, in its order of arithmetic, for the real tokens only.

    Args:
        experts: transformers' module.
        hidden: ``[T, H]``.
        choice: experts of each token, int64 ``[T, k]``.
        gates: their weights, float32 ``[T, k]``.
        real: bool ``[T]``, false for padding, whose result is zero; None if there is none.
        on_expert: sees every expert that has a token, in ascending order.

    Returns:
        ``[T, H]``: the gated sum.
    """
    final = torch.zeros_like(hidden)
    if real is not None:
        choice = torch.where(real[:, None], choice, experts.num_experts)
    # One sort for all experts. By position among the chosen, then token: the order in which transformers finds them.
    by_position = choice.t().flatten()
    order = torch.argsort(by_position, stable=True)
    tokens, gates = order % hidden.shape[0], gates.t().flatten()[order]
    counts = torch.bincount(by_position, minlength=experts.num_experts + 1).tolist()
    start = 0
    for expert in range(experts.num_experts):
        end = start + counts[expert]
        if end > start:
            index, gate = tokens[start:end], gates[start:end]
            inputs = hidden[F.pad(index, (0, _extra_rows(end - start, hidden)))]
            inner = experts._apply_gate(F.linear(inputs, experts.gate_up_proj[expert]))
            outputs = F.linear(inner, experts.down_proj[expert])[: end - start]
            on_expert(expert, inputs[: end - start], inner[: end - start], outputs, gate)
            final.index_add_(0, index, (outputs * gate[:, None]).to(final.dtype))
        start = end
    return final


def _extra_rows(rows: int, hidden: Tensor) -> int:
    """Rows to add, and to drop afterwards, so that few different numbers of rows occur: an eighth more at most, or 7.

    In 16-bit types a CPU's matrix product is compiled for each number of rows: 2 ms, and 0.7 MB kept (measured).
    """
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32:
        return 0
    step = max(8, 1 << max(0, rows.bit_length() - 4))
    return -rows % step


class SaliencySums:
    """The sums of :class:`LayerSaliency`, on the device of the computation; norms float32, sums float64."""

    def __init__(self, experts: int, device: torch.device) -> None:
        """Start at zero."""
        self._tokens = np.zeros(experts, dtype=np.int64)
        self._sums = torch.zeros(2, experts, dtype=torch.float64, device=device)
        self._largest = torch.zeros(experts, dtype=torch.float32, device=device)

    def add(self, expert: int, outputs: Tensor, gates: Tensor) -> None:
        """Count one expert's outputs ``[n, H]`` before the gate, and its gates ``[n]``."""
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).to(torch.float64)
        self._tokens[expert] += outputs.shape[0]
        self._sums[0, expert] += torch.dot(norms, gates.to(torch.float64))
        self._sums[1, expert] += norms.sum()
        self._largest[expert] = torch.maximum(self._largest[expert], outputs.abs().amax().to(torch.float32))

    @property
    def result(self) -> LayerSaliency:
        """What was counted so far."""
        gated, plain = self._sums.cpu().numpy()
        return LayerSaliency(self._tokens.copy(), gated.copy(), plain.copy(), self._largest.cpu().numpy().copy())

"""Everything that one visit to a layer measures, by hooks on transformers' module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7SparseMoeBlock

from step128_checkpoint.calibration.experts import SaliencySums, run_experts
from step128_checkpoint.calibration.kv_ranges import KvRanges
from step128_checkpoint.calibration.moments import SecondMoments
from step128_checkpoint.calibration.result import LayerSaliency, hessian_key

# Module whose input is observed -> the weights that read this input, below the layer's prefix.
_ATTENTION = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
}
_DENSE = {"mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj": ("mlp.down_proj",)}
_SHARED_EXPERT = {
    "mlp.shared_experts.gate_proj": ("share_expert.gate_proj", "share_expert.up_proj"),
    "mlp.shared_experts.down_proj": ("share_expert.down_proj",),
}
_EXPERT_INPUT, _EXPERT_INNER = ("moe.gate_proj", "moe.up_proj"), ("moe.down_proj",)


class LayerObserver:
    """Watches one layer. Call :meth:`start` before each batch, and give :attr:`kv` to ``run_layer`` as its cache."""

    def __init__(
        self,
        layer: Step3p7DecoderLayer,
        number: int,
        *,
        saliency: bool = True,
        moments: bool = True,
        hessians: bool = False,
    ) -> None:
        """Attach to a layer.

        Args:
            layer: of :func:`load_layer`, not observed before.
            number: the layer's.
            saliency: collect the sums by which experts are ranked.
            moments: collect the inputs' second moments and the ranges of K and V.
            hessians: collect the second-moment matrices too.
        """
        self._prefix = f"model.layers.{number}."
        self._device = layer.input_layernorm.weight.device
        self._hessians = hessians
        self._counting = True
        self._real: Tensor | None = None
        self._moments: dict[tuple[str, ...], SecondMoments] = {}
        self._saliency: SaliencySums | None = None
        self._attached: list[Callable[[], None]] = []
        self.kv = KvRanges(self._device) if moments else None
        sparse = isinstance(layer.mlp, Step3p7SparseMoeBlock)
        if moments:
            for module, weights in (_ATTENTION | (_SHARED_EXPERT if sparse else _DENSE)).items():
                linear = layer.get_submodule(module)
                assert isinstance(linear, torch.nn.Linear)
                self._watch(linear, weights)
        if sparse:
            self._watch_experts(layer.mlp, saliency, moments)

    def close(self) -> None:
        """Detach from the layer: what was seen stays. Else the layer's memory, being in a cycle, would stay too."""
        while self._attached:
            self._attached.pop()()

    def start(self, real: Tensor | None, held_out: bool) -> None:
        """Say what the next batch holds.

        Args:
            real: bool ``[B * T]``, false where a position does not count (padding); None if all count.
            held_out: nothing is counted but K and V beyond the calibration's range.
        """
        self._real, self._counting = real, not held_out
        if self.kv is not None:
            self.kv.real, self.kv.held_out = real, held_out

    @property
    def saliency(self) -> LayerSaliency | None:
        """Of a MoE layer, if asked for."""
        return self._saliency.result if self._saliency is not None else None

    @property
    def importance(self) -> dict[str, Tensor]:
        """Mean of x^2 by weight name: float32 [K], of experts [E, K], on the CPU."""
        found = {}
        for weights, moments in self._moments.items():
            values = moments.importance
            for weight in weights:
                found[f"{self._prefix}{weight}.weight"] = values if weight.startswith("moe.") else values[0]
        return found

    def hessians(self) -> dict[str, Tensor]:
        """Mean of x x^T by :func:`hessian_key`, float32 on the CPU; may be asked for once."""
        found = {}
        for weights, moments in self._moments.items():
            matrices = moments.matrices
            if matrices is not None:
                key = hessian_key(f"{self._prefix}{weights[0]}.weight")
                found[key] = matrices if weights == _EXPERT_INNER else matrices[0]
        return found

    def _watch(self, module: torch.nn.Linear, weights: tuple[str, ...]) -> None:
        moments = SecondMoments(module.in_features, self._device, matrices=self._hessians)
        self._moments[weights] = moments

        def see(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._counting:
                rows = inputs[0].flatten(0, -2)
                moments.add(rows if self._real is None else rows[self._real])

        self._attached.append(module.register_forward_pre_hook(see).remove)

    def _watch_experts(self, block: Step3p7SparseMoeBlock, saliency: bool, moments: bool) -> None:
        experts = block.experts
        count, inner_size, hidden_size = experts.num_experts, experts.intermediate_dim, experts.hidden_dim
        sums = self._saliency = SaliencySums(count, self._device) if saliency else None
        before = after = None
        if moments:
            # Experts see parts of what the shared expert sees, whose matrix stands for theirs too (hessian_key).
            before = self._moments[_EXPERT_INPUT] = SecondMoments(hidden_size, self._device, count)
            after = self._moments[_EXPERT_INNER] = SecondMoments(inner_size, self._device, count, self._hessians)

        def see(expert: int, inputs: Tensor, inner: Tensor, outputs: Tensor, gates: Tensor) -> None:
            if not self._counting:
                return
            if sums is not None:
                sums.add(expert, outputs, gates)
            if before is not None and after is not None:
                before.add(inputs, expert)
                after.add(inner, expert)

        def forward(hidden: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
            return run_experts(experts, hidden, choice, gates, self._real, see)

        experts.forward = forward
        self._attached.append(lambda: delattr(experts, "forward"))  # the class's shows again

"""Unquantized Step-3.7 experts on a CPU.

vLLM 0.32 cannot run them there: its CPU router asserts softmax scoring, and no CPU experts class has the clamped
SwiGLU. This goes in through vLLM's own out-of-tree hook and steps aside for any other model.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from step128_kernels.vllm_plugin.moe import route_tokens, swiglu_limit
from step128_kernels.vllm_plugin.ops import dense_moe_op

_STEP_MODEL_TYPES = ("step3p7", "step3p5", "step3p5_mtp")


class Step3p7CPUExperts(UnquantizedFusedMoEMethod):
    """vLLM's unquantized method, with the torch path for Step-3.7 and vLLM's own for every other model."""

    def __init__(self, moe: Any) -> None:
        model_type = get_current_vllm_config().model_config.hf_config.model_type
        self._is_step = model_type in _STEP_MODEL_TYPES
        if self._is_step:
            # Past the parent's constructor, which looks for a stock CPU kernel and fails when there is none.
            super(UnquantizedFusedMoEMethod, self).__init__(moe)
        else:
            super().__init__(moe)

    @property
    def is_monolithic(self) -> bool:
        """Step-3.7 routes here, not in vLLM's CPU router."""
        return self._is_step or bool(super().is_monolithic)

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *args: Any) -> Any:
        """No padding for the torch path."""
        if self._is_step:
            return hidden_size, intermediate_size_per_partition
        return super().maybe_roundup_sizes(hidden_size, intermediate_size_per_partition, *args)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The torch path reads the weights as they were loaded."""
        if not self._is_step:
            super().process_weights_after_loading(layer)

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Route ``x [tokens, hidden]`` by ``router_logits [tokens, experts]``, then run the experts."""
        if not self._is_step:
            return super().apply_monolithic(layer, x, router_logits, input_ids)  # type: ignore[no-any-return]
        topk_weights, topk_ids = route_tokens(layer, router_logits)
        limit = swiglu_limit(layer)
        y: torch.Tensor = dense_moe_op(
            x, layer.w13_weight, layer.w2_weight, topk_weights, topk_ids, limit, layer.expert_map
        )
        return y


def register() -> None:
    """Put the class in the place of vLLM's; a second call changes nothing."""
    if UnquantizedFusedMoEMethod.__name__ not in op_registry_oot:
        UnquantizedFusedMoEMethod.register_oot(Step3p7CPUExperts)

"""NL4 routed experts inside vLLM's fused-MoE layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from step128_kernels.codebook import GROUP_SIZE
from step128_kernels.nl4_moe.reference import route
from step128_kernels.vllm_plugin.kernel_layout import in_kernel_layout, use_kernel_layout, weight_path
from step128_kernels.vllm_plugin.ops import nl4_moe_op, nl4_moe_tiled_op

# vLLM 0.32 knows one clamp for routed experts and asserts it when it builds the layer.
_SWIGLUSTEP_LIMIT = 7.0


def swiglu_limit(layer: Any) -> float | None:
    """Clamp of this layer's experts, or None."""
    return _SWIGLUSTEP_LIMIT if layer.activation == MoEActivation.SWIGLUSTEP else None


def route_tokens(layer: Any, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts for ``[tokens, experts]`` logits as the layer's own settings say.

    Raises:
        ValueError: the layer's scoring function is not Step-3.7's sigmoid.
    """
    if layer.scoring_func != "sigmoid":
        raise ValueError(f"step128: the router scores with {layer.scoring_func!r}; Step-3.7 uses 'sigmoid'")
    return route(
        router_logits, layer.e_score_correction_bias, layer.top_k, layer.renormalize, layer.routed_scaling_factor
    )


class NL4MoEMethod(FusedMoEMethodBase):
    """Experts as ``w13_weight_packed/_scale`` (gate rows, then up rows) and ``w2_weight_packed/_scale``.

    After loading, on a GPU, ``w13_weight_tiles/_scales`` and ``w2_weight_tiles/_scales`` instead.
    """

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create this rank's experts: packed uint8 ``[E, N, K // 2]`` and scales float16 ``[E, N, K // 16]``.

        Raises:
            ValueError: a rank's share of the intermediate size is not a multiple of 16.
        """
        if intermediate_size_per_partition % GROUP_SIZE:
            raise ValueError(
                f"step128: an expert has {intermediate_size_per_partition} intermediate channels per rank; NL4 needs "
                f"a multiple of {GROUP_SIZE}. Use a smaller tensor parallel size."
            )
        layer.nl4_intermediate, layer.nl4_hidden = intermediate_size_per_partition, hidden_size
        layer.nl4_dtype = params_dtype
        matrices = {
            "w13": (2 * intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        for name, (rows, columns) in matrices.items():
            packed = torch.empty(num_experts, rows, columns // 2, dtype=torch.uint8)
            scale = torch.empty(num_experts, rows, columns // GROUP_SIZE, dtype=torch.float16)
            self._register(layer, f"{name}_weight_packed", packed, extra_weight_attrs)
            # vLLM's expert loader tells scales by name and wants to know their kind.
            group = {**extra_weight_attrs, "quant_method": FusedMoeWeightScaleSupported.GROUP.value}
            self._register(layer, f"{name}_weight_scale", scale, group)

    @staticmethod
    def _register(layer: torch.nn.Module, name: str, data: torch.Tensor, attributes: dict[str, Any]) -> None:
        parameter = torch.nn.Parameter(data, requires_grad=False)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Reorder the experts for the kernels and compile these, on a GPU."""
        use_kernel_layout(layer, "w13_weight", "w2_weight")
        if weight_path(layer, "w13_weight") == "triton":
            from step128_kernels.compile_ahead import compile_experts  # needs triton, which a CPU does not have
            from step128_kernels.nl4_moe.launches import MoeShape

            experts, device = layer.w13_weight_tiles.shape[0], layer.w13_weight_tiles.device
            sizes = layer.top_k, experts, layer.nl4_hidden, layer.nl4_intermediate
            shape = MoeShape(1, *sizes, has_map=layer.expert_map is not None)
            compile_experts(shape, swiglu_limit(layer), layer.nl4_dtype, device)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """No description for vLLM's own kernels: ours is called directly."""
        return

    @property
    def is_monolithic(self) -> bool:
        """On a CPU the method routes by itself: vLLM's CPU router has no sigmoid with a selection bias."""
        return bool(current_platform.is_cpu())

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Route ``x [tokens, hidden]`` by ``router_logits [tokens, experts]``, then run the experts."""
        topk_weights, topk_ids = route_tokens(layer, router_logits)
        return self.apply(layer, x, topk_weights, topk_ids, None, None)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts; vLLM runs the shared expert itself."""
        routing = (topk_weights, topk_ids)
        y: torch.Tensor
        if in_kernel_layout(layer, "w13_weight"):
            gate_up, down = (
                (layer.w13_weight_tiles, layer.w13_weight_scales),
                (layer.w2_weight_tiles, layer.w2_weight_scales),
            )
            y = nl4_moe_tiled_op(
                x, *gate_up, *down, *routing, layer.nl4_intermediate, swiglu_limit(layer), layer.expert_map
            )
        else:
            gate_up, down = (
                (layer.w13_weight_packed, layer.w13_weight_scale),
                (layer.w2_weight_packed, layer.w2_weight_scale),
            )
            y = nl4_moe_op(x, *gate_up, *down, *routing, swiglu_limit(layer), layer.expert_map)
        return y

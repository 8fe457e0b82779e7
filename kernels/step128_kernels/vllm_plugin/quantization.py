"""The ``nl4`` quantization method: linear layers, language-model heads, embeddings, KV-cache scales."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter

from step128_kernels.codebook import CODEBOOK, FORMAT_VERSION, GROUP_SIZE
from step128_kernels.torch_codebook import dequantize
from step128_kernels.vllm_plugin import QUANT_METHOD
from step128_kernels.vllm_plugin.components import component_of_module
from step128_kernels.vllm_plugin.kernel_layout import in_kernel_layout, use_kernel_layout, weight_path
from step128_kernels.vllm_plugin.kv_scales import NL4KVCacheMethod
from step128_kernels.vllm_plugin.moe import NL4MoEMethod
from step128_kernels.vllm_plugin.ops import nl4_embedding_tiled_op, nl4_linear_op, nl4_linear_tiled_op


@register_weight_loader_v2_supported_method
class NL4LinearMethod(LinearMethodBase):
    """NL4 weight of a linear layer, a language-model head or an embedding: ``weight_packed`` and ``weight_scale``.

    After loading, on a GPU, ``weight_tiles`` and ``weight_scales`` instead.
    """

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create uint8 ``[N, K // 2]`` and float16 ``[N, K // 16]`` for this rank's N x K.

        Raises:
            ValueError: K of this rank is not a multiple of 16, that is, the tensor parallel size cuts a group.
        """
        if input_size_per_partition % GROUP_SIZE:
            raise ValueError(
                f"step128: {getattr(layer, 'prefix', 'a layer')} has {input_size_per_partition} inputs per rank; "
                f"NL4 needs a multiple of {GROUP_SIZE}. Use a smaller tensor parallel size."
            )
        rows = sum(output_partition_sizes)
        layer.nl4_rows, layer.nl4_columns, layer.nl4_dtype = rows, input_size_per_partition, params_dtype
        dimensions = {"input_dim": 1, "output_dim": 0, "weight_loader": extra_weight_attrs.get("weight_loader")}
        packed = torch.empty(rows, input_size_per_partition // 2, dtype=torch.uint8)
        scale = torch.empty(rows, input_size_per_partition // GROUP_SIZE, dtype=torch.float16)
        layer.register_parameter("weight_packed", ModelWeightParameter(data=packed, **dimensions))
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scale, **dimensions))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Reorder the weight for the kernels and compile these, on a GPU."""
        use_kernel_layout(layer, "weight")
        only_looked_up = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
        if weight_path(layer, "weight") == "triton" and not only_looked_up:
            from step128_kernels.compile_ahead import compile_linear  # needs triton, which a CPU does not have

            compile_linear(layer.nl4_rows, layer.nl4_columns, layer.nl4_dtype, layer.weight_tiles.device)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ W.T + bias``: ``[..., K]`` to ``[..., N]``."""
        y: torch.Tensor
        if in_kernel_layout(layer, "weight"):
            y = nl4_linear_tiled_op(x, layer.weight_tiles, layer.weight_scales, layer.nl4_rows)
        else:
            y = nl4_linear_op(x, layer.weight_packed, layer.weight_scale)
        return y if bias is None else y + bias

    def embedding(self, layer: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: integer ``[...]`` to ``[..., K]`` in the layer's dtype."""
        dtype: Any = layer.params_dtype
        if in_kernel_layout(layer, "weight"):
            y: torch.Tensor = nl4_embedding_tiled_op(
                token_ids, layer.weight_tiles, layer.weight_scales, layer.nl4_columns, dtype
            )
            return y
        packed: Any = layer.weight_packed
        scale: Any = layer.weight_scale
        return dequantize(packed[token_ids], scale[token_ids], dtype)


@register_quantization_config(QUANT_METHOD)
class NL4Config(QuantizationConfig):
    """``quantization_config`` of an NL4 checkpoint, as ``step128-checkpoint quantize`` writes it."""

    def __init__(self, policy: str, quantized_components: frozenset[str]) -> None:
        super().__init__()
        self.policy = policy
        self.quantized_components = quantized_components

    @classmethod
    def get_name(cls) -> str:
        """Name in ``quant_method``."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes of the torch path."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No CUDA capability is asked for: the plugin picks its path by device."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NL4Config:
        """Read ``quantization_config``.

        Raises:
            ValueError: the format's version, group size or codebook is not the one this plugin implements.
        """
        wanted = {"format_version": FORMAT_VERSION, "group_size": GROUP_SIZE, "codebook": list(CODEBOOK)}
        for key, value in wanted.items():
            if config.get(key) != value:
                raise ValueError(
                    f"step128: quantization_config.{key} is {config.get(key)!r}, this plugin implements {value!r}. "
                    "Quantize the checkpoint again with this release's step128-checkpoint."
                )
        return cls(str(config["policy"]), frozenset(config["quantized_components"]))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Method of one layer; None leaves the layer to vLLM's unquantized one."""
        if isinstance(layer, Attention):
            return NL4KVCacheMethod(self)
        quantized = component_of_module(prefix) in self.quantized_components
        if isinstance(layer, RoutedExperts):
            return NL4MoEMethod(layer.moe_config) if quantized else None
        if isinstance(layer, LinearBase):
            return NL4LinearMethod() if quantized else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return NL4LinearMethod() if quantized else None
        return None

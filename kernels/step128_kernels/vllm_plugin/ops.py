"""Custom operators around the NL4 layers, opaque to torch.compile.

A plain call would be traced into the graph: the expert loop depends on data and breaks it, and dequantized weights
would be kept as graph constants. None of them writes to an argument or returns one, and on a GPU none that takes tiles
waits for it.
"""

from __future__ import annotations

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from step128_kernels.nl4_gemm import nl4_gemm, nl4_gemm_tiled
from step128_kernels.nl4_layout import rows_of
from step128_kernels.nl4_moe import nl4_moe, nl4_moe_tiled
from step128_kernels.nl4_moe.reference import routed_experts
from step128_kernels.torch_codebook import dequantize


def _dense_moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    swiglu_limit: float | None,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    return routed_experts(x, gate_up.__getitem__, down.__getitem__, topk_weights, topk_ids, swiglu_limit, expert_map)


def _embedding_tiled(
    token_ids: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of a weight in kernel layout: integer ``[...]`` to ``[..., columns]``."""
    return dequantize(*rows_of(tiles, scales, token_ids, columns), dtype)


def _shape_of_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _shape_of_linear_tiled(x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _shape_of_embedding_tiled(
    token_ids: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    return tiles.new_empty(*token_ids.shape, columns, dtype=dtype)


def _shape_of_input(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


direct_register_custom_op("step128_nl4_linear", nl4_gemm, fake_impl=_shape_of_linear)
direct_register_custom_op("step128_nl4_moe", nl4_moe, fake_impl=_shape_of_input)
direct_register_custom_op("step128_nl4_linear_tiled", nl4_gemm_tiled, fake_impl=_shape_of_linear_tiled)
direct_register_custom_op("step128_nl4_moe_tiled", nl4_moe_tiled, fake_impl=_shape_of_input)
direct_register_custom_op("step128_nl4_embedding_tiled", _embedding_tiled, fake_impl=_shape_of_embedding_tiled)
direct_register_custom_op("step128_dense_moe", _dense_moe, fake_impl=_shape_of_input)

nl4_linear_op = torch.ops.vllm.step128_nl4_linear
nl4_moe_op = torch.ops.vllm.step128_nl4_moe
nl4_linear_tiled_op = torch.ops.vllm.step128_nl4_linear_tiled
nl4_moe_tiled_op = torch.ops.vllm.step128_nl4_moe_tiled
nl4_embedding_tiled_op = torch.ops.vllm.step128_nl4_embedding_tiled
dense_moe_op = torch.ops.vllm.step128_dense_moe

"""NL4 routed experts on a GPU: aligns the pairs, then gate and up, down, and the sum over a token's experts."""

from __future__ import annotations

from functools import lru_cache

import torch

from step128_kernels.nl4_arguments import DTYPES, ELEMENTS, check_columns, codebook_table
from step128_kernels.nl4_moe.align import ExpertBlocks, align_by_sorting
from step128_kernels.nl4_moe.configs import moe_config
from step128_kernels.nl4_moe.launches import (
    Config,
    MoeShape,
    align_launch,
    combine_launch,
    down_launch,
    gate_up_launch,
    needs_sorting,
    one_pair_blocks,
    partial_element,
)
from step128_kernels.run_launch import run, uses_assembly


@lru_cache(maxsize=1024)
def _config(shape: MoeShape, device: torch.device) -> Config:
    return moe_config(shape, device)


def make_blocks(
    shape: MoeShape, config: Config, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> ExpertBlocks:
    """Blocks of pairs for one call; int32 ``topk_ids [tokens, top_k]`` and ``expert_map [global experts]`` or None."""
    if one_pair_blocks(shape, config):
        return ExpertBlocks(topk_ids, topk_ids)  # the kernels number the pairs themselves
    block_m = int(config["BLOCK_M"])
    if needs_sorting(shape):
        return align_by_sorting(topk_ids, block_m, shape.experts, expert_map)
    experts = torch.empty(shape.pairs, dtype=torch.int32, device=topk_ids.device)
    pairs = torch.empty(shape.pairs, block_m, dtype=torch.int32, device=topk_ids.device)
    tensors = {"topk_ids_ptr": topk_ids, "experts_ptr": experts, "pairs_ptr": pairs}
    run(align_launch(shape, config), tensors | {"expert_map_ptr": topk_ids if expert_map is None else expert_map})
    return ExpertBlocks(experts, pairs)


def nl4_moe_triton(
    x: torch.Tensor,
    gate_up_tiles: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_tiles: torch.Tensor,
    down_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    intermediate: int,
    swiglu_limit: float | None,
    expert_map: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, weights in kernel layout.

    Args:
        x: bfloat16, float16 or float32 ``[tokens, hidden]``.
        gate_up_tiles: int64 ``[experts, 2 * I / 16, hidden / 32, 16, 2]``, gate rows first.
        gate_up_scales: int32 ``[experts, 2 * I / 16, hidden / 32, 16]``.
        down_tiles: int64 ``[experts, hidden / 16, I / 32, 16, 2]``.
        down_scales: int32 ``[experts, hidden / 16, I / 32, 16]``.
        topk_weights: float ``[tokens, top_k]``.
        topk_ids: int ``[tokens, top_k]``, global expert numbers, -1 in rows of padding.
        intermediate: I, a multiple of 16.
        swiglu_limit: clamp of this layer, or None.
        expert_map: int ``[global experts]``: local number of each, -1 where another rank holds it; None when this
            rank holds them all.
        config: block sizes, instead of those tuned for the device.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``x``; sums are formed in float32. Rows of padding are 0.

    Raises:
        ValueError: a weight's columns are not the activations'.
    """
    tokens, hidden_size = x.shape
    y = torch.empty(tokens, hidden_size, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    element = ELEMENTS[x.dtype]
    amd = uses_assembly(x)
    check_columns(gate_up_tiles, hidden_size)
    check_columns(down_tiles, intermediate)
    experts = gate_up_tiles.shape[0]
    shape = MoeShape(tokens, topk_ids.shape[1], experts, hidden_size, intermediate, expert_map is not None)
    config = _config(shape, x.device) if config is None else config
    topk_ids = topk_ids.to(torch.int32).contiguous()
    expert_map = None if expert_map is None else expert_map.to(torch.int32)
    blocks = make_blocks(shape, config, topk_ids, expert_map)
    hidden = torch.empty(shape.pairs, intermediate, dtype=x.dtype, device=x.device)
    partial_dtype = DTYPES[partial_element(config, element)]
    partial = torch.empty(shape.pairs, hidden_size, dtype=partial_dtype, device=x.device)
    common = {
        "codebook_ptr": codebook_table(x.device),
        "block_experts_ptr": blocks.experts,
        "block_pairs_ptr": blocks.pairs,
        "hidden_ptr": hidden,
        "partial_ptr": partial,
        "topk_ids_ptr": topk_ids,
        "expert_map_ptr": topk_ids if expert_map is None else expert_map,
        "topk_weights_ptr": topk_weights.float().contiguous(),
        "x_ptr": x.contiguous(),
        "y_ptr": y,
    }
    gate_up = {"tiles_ptr": gate_up_tiles, "scales_ptr": gate_up_scales}
    down = {"tiles_ptr": down_tiles, "scales_ptr": down_scales}
    run(gate_up_launch(shape, config, swiglu_limit, element, amd), common | gate_up)
    run(down_launch(shape, config, element, amd), common | down)
    run(combine_launch(shape, config, element), common)
    return y

"""Routed experts of Step-3.7 in clear torch: router, SwiGLU with its clamp, weighted sum. Dense and NL4 weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear, silu

from step128_kernels.torch_codebook import dequantize

ExpertWeight = Callable[[int], torch.Tensor]


def route(
    router_logits: torch.Tensor,
    selection_bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid router of Step-3.7: the bias decides who is chosen, never how much each counts.

    Args:
        router_logits: ``[tokens, experts]``.
        selection_bias: float32 ``[experts]`` (``router_bias`` in the checkpoint) or None.
        top_k: experts per token.
        renormalize: divide the chosen scores by their sum.
        scaling_factor: multiplies the weights (``moe_router_scaling_factor``).

    Returns:
        ``(weights float32 [tokens, top_k], ids int32 [tokens, top_k])``.
    """
    score = router_logits.float().sigmoid()
    selection = score if selection_bias is None else score + selection_bias.float()
    ids = selection.topk(top_k, dim=-1, sorted=False).indices
    weights = score.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scaling_factor, ids.to(torch.int32)


def clamped_swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """``silu(gate) * up`` on ``[..., 2 * I]``; with a limit, ``min(silu(gate), limit) * clamp(up, -limit, limit)``."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = silu(gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


def routed_experts(
    x: torch.Tensor,
    gate_up_weight: ExpertWeight,
    down_weight: ExpertWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    swiglu_limit: float | None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, one expert after the other.

    Args:
        x: float ``[tokens, hidden]``.
        gate_up_weight: gives ``[2 * I, hidden]`` for a local expert number, gate rows first.
        down_weight: gives ``[hidden, I]`` for a local expert number.
        topk_weights: float ``[tokens, top_k]``.
        topk_ids: int ``[tokens, top_k]``, global expert numbers; -1 counts for nothing (a row of padding).
        swiglu_limit: clamp of this layer, or None.
        expert_map: int ``[experts]``: local number of each global expert, -1 where another rank holds it. None when
            this rank holds them all.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``x``; sums are formed in float32.
    """
    ids = topk_ids if expert_map is None else torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        hidden = clamped_swiglu(linear(x[token], gate_up_weight(expert)), swiglu_limit)
        contribution = linear(hidden, down_weight(expert)).float()
        output.index_add_(0, token, contribution * topk_weights[token, slot].float().unsqueeze(-1))
    return output.to(x.dtype)


def nl4_moe_reference(
    x: torch.Tensor,
    gate_up_packed: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_packed: torch.Tensor,
    down_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    swiglu_limit: float | None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`routed_experts` with NL4 weights.

    Args:
        x: float ``[tokens, hidden]``.
        gate_up_packed: uint8 ``[experts, 2 * I, hidden // 2]``, gate rows first.
        gate_up_scale: float16 ``[experts, 2 * I, hidden // 16]``.
        down_packed: uint8 ``[experts, hidden, I // 2]``.
        down_scale: float16 ``[experts, hidden, I // 16]``.
        topk_weights: as in :func:`routed_experts`.
        topk_ids: as in :func:`routed_experts`.
        swiglu_limit: as in :func:`routed_experts`.
        expert_map: as in :func:`routed_experts`.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``x``.
    """
    return routed_experts(
        x,
        lambda expert: dequantize(gate_up_packed[expert], gate_up_scale[expert], x.dtype),
        lambda expert: dequantize(down_packed[expert], down_scale[expert], x.dtype),
        topk_weights,
        topk_ids,
        swiglu_limit,
        expert_map,
    )

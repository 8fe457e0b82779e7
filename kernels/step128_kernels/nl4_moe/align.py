"""Which rows each program of an expert kernel works on: pairs of (token, chosen expert) in blocks of one expert each.

A pair's number is ``token * top_k + slot``. A block holds up to BLOCK_M pairs of the same expert; blocks and their
number are fixed by the shapes, so that nothing waits for the host and a graph can be captured: blocks beyond the used
ones carry expert -1 and their programs leave at once. Pairs whose expert lives on another rank are in no block, nor are
those with expert -1: vLLM's router gives that to the rows that pad a batch to a captured size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LARGEST_ALIGNED_PAIRS = 128
"""Pairs that :func:`nl4_moe_align_kernel` takes: its work grows with their square."""


class ExpertBlocks(NamedTuple):
    """Blocks of pairs.

    Attributes:
        experts: int32 ``[blocks]``, this rank's expert number, or -1 for a block not used.
        pairs: int32 ``[blocks, BLOCK_M]``, pair numbers, -1 where a block is not full.
    """

    experts: torch.Tensor
    pairs: torch.Tensor


def most_blocks(pairs: int, block_m: int, experts: int) -> int:
    """Blocks that ``pairs`` over ``experts`` local experts can ever need: each expert wastes less than one block."""
    return pairs // block_m + min(pairs, experts) if block_m > 1 else pairs


def align_by_sorting(
    topk_ids: torch.Tensor, block_m: int, experts: int, expert_map: torch.Tensor | None
) -> ExpertBlocks:
    """Make blocks for any number of pairs with torch, on the device of ``topk_ids`` and without a word to the host.

    Args:
        topk_ids: int ``[tokens, top_k]``, global expert numbers, -1 for a row of padding.
        block_m: pairs a block.
        experts: local experts.
        expert_map: int ``[global experts]``, local number or -1; None when all are local.

    Returns:
        :func:`most_blocks` blocks, experts ascending, pairs ascending inside an expert.
    """
    flat = topk_ids.flatten().long()
    local = flat if expert_map is None else torch.where(flat < 0, -1, expert_map[flat.clamp(min=0)].long())
    local = torch.where(local < 0, experts, local)  # the last bin collects the pairs of other ranks
    count = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    count.scatter_add_(0, local, torch.ones_like(local))
    blocks_before = torch.cumsum((count + block_m - 1) // block_m, 0)
    first_block = blocks_before - (count + block_m - 1) // block_m
    first_pair = torch.cumsum(count, 0) - count
    order = torch.argsort(local, stable=True)
    expert = local[order]
    rank = torch.arange(order.numel(), device=flat.device) - first_pair[expert]
    blocks = most_blocks(flat.numel(), block_m, experts)
    place = first_block[expert] * block_m + rank
    place = torch.where(expert < experts, place, blocks * block_m)
    pairs = torch.full((blocks * block_m + 1,), -1, dtype=torch.int32, device=flat.device)
    pairs.scatter_(0, place, order.to(torch.int32))
    owner = torch.searchsorted(blocks_before[:experts], torch.arange(blocks, device=flat.device), right=True)
    owner = torch.where(owner < experts, owner, -1).to(torch.int32)
    return ExpertBlocks(owner, pairs[:-1].view(blocks, block_m))


@triton.jit
def local_expert(expert, expert_map_ptr, HAS_MAP: tl.constexpr):
    """This rank's number of a chosen expert; -1 for another rank's, and for a row of padding."""
    if HAS_MAP:
        expert = tl.where(expert >= 0, tl.load(expert_map_ptr + tl.maximum(expert, 0)).to(tl.int32), -1)
    return expert


@triton.jit(do_not_specialize=["pairs"])
def nl4_moe_align_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    experts_ptr,
    pairs_ptr,
    pairs,
    PADDED_PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    """Blocks for a few pairs in one launch of one program; block i starts with pair i, so ``pairs`` blocks are written.

    A pair's rank is the number of earlier pairs with its expert. Pairs whose rank is a multiple of BLOCK_M start a
    block; the others look for the start of theirs.
    """
    pair = tl.arange(0, PADDED_PAIRS)
    expert = tl.load(topk_ids_ptr + pair, mask=pair < pairs, other=0).to(tl.int32)
    expert = tl.where(pair < pairs, local_expert(expert, expert_map_ptr, HAS_MAP), -1)
    rank = tl.zeros((PADDED_PAIRS,), tl.int32)
    count = tl.zeros((PADDED_PAIRS,), tl.int32)
    for start in tl.static_range(0, PADDED_PAIRS, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_expert = tl.load(topk_ids_ptr + other, mask=other < pairs, other=0).to(tl.int32)
        other_expert = local_expert(other_expert, expert_map_ptr, HAS_MAP)
        same = (expert[:, None] == other_expert[None, :]) & (other < pairs)[None, :]
        rank += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
        count += tl.sum(same.to(tl.int32), axis=1)
    base = rank - rank % BLOCK_M
    first = tl.zeros((PADDED_PAIRS,), tl.int32)
    for start in tl.static_range(0, PADDED_PAIRS, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_expert = tl.load(topk_ids_ptr + other, mask=other < pairs, other=0).to(tl.int32)
        other_expert = local_expert(other_expert, expert_map_ptr, HAS_MAP)
        same = (expert[:, None] == other_expert[None, :]) & (other < pairs)[None, :]
        other_rank = tl.sum((same & (pair[:, None] < other[None, :])).to(tl.int32), axis=0)
        starts = same & (other_rank[None, :] == base[:, None])
        first += tl.sum(tl.where(starts, other[None, :], 0), axis=1)
    local = (pair < pairs) & (expert >= 0)
    starter = local & (rank == base)
    tl.store(experts_ptr + pair, tl.where(starter, expert, -1), mask=pair < pairs)
    tl.store(pairs_ptr + first * BLOCK_M + rank - base, pair, mask=local)
    for slot in tl.static_range(1, BLOCK_M):
        tl.store(pairs_ptr + pair * BLOCK_M + slot, tl.full((PADDED_PAIRS,), -1, tl.int32),
                 mask=starter & (count - base <= slot))  # fmt: skip

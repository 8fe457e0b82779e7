"""vLLM's kernels on this machine's GPU: calls to time, each with a float32 reference of its own format.

What is launched, and with what, is as in :mod:`~step128_kernels.vllm_plugin.baselines`. Of the experts a call is the
two Triton launches alone: alignment was done before, and there is no activation between them and no sum after them, all
in vLLM's favour. Weights are random bits, experts chosen evenly, as for our own kernels
(:mod:`step128_kernels.runners`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from step128_kernels.device import gpu_identity
from step128_kernels.nl4_moe.align import align_by_sorting
from step128_kernels.runners import activations, even_routing
from step128_kernels.vllm_plugin.baselines import OPPONENTS, opponents
from step128_kernels.vllm_plugin.baselines_launch import (
    GROUP_SIZE,
    ExpertBlocks,
    empty_blocks,
    has_hip_kernel,
    launch_part,
    linear_call,
    linear_shapes,
    moe_kernel,
    moe_launcher,
    moe_options,
    padded_words,
    part_shapes,
)
from step128_kernels.vllm_plugin.baselines_source import Platform

ROUNDINGS = 2
"""Weights and outputs (:func:`step128_kernels.testing.compare`)."""

_SEED = 32
_PARTS = ("w13", "w2")
_REFERENCE_ELEMENTS = 1 << 26


def opponents_here(kernel: str, m: int) -> tuple[str, ...]:
    """Kernels of vLLM that do the work of one of ours for ``m`` rows on this machine, its HIP kernel included."""
    return OPPONENTS[kernel] if has_hip_kernel() else opponents(kernel, m)


class Baseline(NamedTuple):
    """One call of vLLM's; both give the tensors that its kernels write, the reference's in float32."""

    call: Callable[[], tuple[torch.Tensor, ...]]
    reference: Callable[[], tuple[torch.Tensor, ...]]


def baseline_runner(
    name: str, shape: Mapping[str, int], m: int, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Baseline:
    """A call of one of the kernels in :data:`step128_kernels.vllm_plugin.baselines.OPPONENTS`.

    Args:
        name: such as "vllm_moe_wna16".
        shape: as in :data:`step128_kernels.cases.SHAPES`.
        m: activation rows.
        device: "cuda" for any GPU; "cpu" under Triton's interpreter, for tiny sizes.
        dtype: bfloat16 or float16, of activations and scales.

    Raises:
        ValueError: the weight cannot be cut into groups of 32.
    """
    columns = (shape["K"], shape["N"]) if name == "vllm_moe_wna16" else (shape["K"],)
    if any(size % GROUP_SIZE for size in columns):
        raise ValueError(f"vLLM's kernels need K in groups of {GROUP_SIZE}; it is {' and '.join(map(str, columns))}")
    place = torch.device(device)
    platform = Platform(gpu_identity(place)[1])
    if name == "vllm_moe_wna16":
        return _moe(dict(shape), m, place, dtype, platform)
    return _linear(name, shape["N"], shape["K"], m, place, dtype, platform)


def _moe(shape: dict[str, int], m: int, device: torch.device, dtype: torch.dtype, platform: Platform) -> Baseline:
    options = moe_options(shape, m, platform)
    launcher = moe_launcher(platform, moe_kernel())
    topk_weights, ids = even_routing(m, shape["top_k"], shape["E"], device)
    blocks = _filled_blocks(shape, m, options["BLOCK_SIZE_M"], ids)
    stacks = _expert_weights(tuple(shape.items()), device, dtype)
    tensors = {}
    for part, (weight, scale) in zip(_PARTS, stacks, strict=True):
        inputs, rows, columns = part_shapes(shape, m, part)
        tensors[part] = {
            "input": activations(inputs, columns, device, dtype),
            "weight": weight,
            "scale": scale,
            "topk_weights": topk_weights,
            "output": torch.empty(m, shape["top_k"], rows, dtype=dtype, device=device),
        }

    def call() -> tuple[torch.Tensor, ...]:
        for part in _PARTS:
            launch_part(launcher, part, tensors[part], blocks, shape["top_k"], options)
        return tuple(tensors[part]["output"] for part in _PARTS)

    def reference() -> tuple[torch.Tensor, ...]:
        gate_up = _expert_products(tensors["w13"], ids, shape["top_k"])
        return gate_up, _expert_products(tensors["w2"], ids, 1) * topk_weights.unsqueeze(-1)

    return Baseline(call, reference)


def _filled_blocks(shape: Mapping[str, int], m: int, block_m: int, ids: torch.Tensor) -> ExpertBlocks:
    """What vLLM's alignment (C++) gives, from ours: the same blocks in the same order."""
    ours = align_by_sorting(ids, block_m, shape["E"], None)
    blocks = empty_blocks(shape, m, block_m, ids.device)
    pairs = ours.pairs.flatten()[: blocks.sorted_pairs.numel()]
    blocks.sorted_pairs.fill_(ids.numel())
    blocks.sorted_pairs[: pairs.numel()] = torch.where(pairs < 0, ids.numel(), pairs)
    owners = ours.experts[: blocks.experts.numel()]
    blocks.experts.zero_()
    blocks.experts[: owners.numel()] = owners.clamp(min=0)
    blocks.padded.copy_((ours.experts >= 0).sum() * block_m)
    return blocks


@lru_cache(maxsize=1)
def _expert_weights(
    shape: tuple[tuple[str, int], ...], device: torch.device, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    stacks = []
    for part in _PARTS:
        _, rows, columns = part_shapes(dict(shape), 1, part)
        experts = dict(shape)["E"]
        scale = (experts, rows, columns // GROUP_SIZE)
        stacks.append(_made_up((experts, rows, columns // 2), scale, columns, device, dtype))
    return tuple(stacks)


def _made_up(
    weight: tuple[int, ...], scale: tuple[int, ...], columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes, and scales such that results have about the size of the activations (indices are -8 to 7)."""
    generator = torch.Generator(device).manual_seed(_SEED)
    values = torch.empty(weight, dtype=torch.uint8, device=device).random_(generator=generator)
    factors = torch.empty(scale, dtype=dtype, device=device).uniform_(0.5, 2.0, generator=generator)
    factors *= 0.25 * columns**-0.5
    return values, factors


def _expert_products(tensors: Mapping[str, torch.Tensor], ids: torch.Tensor, inputs_per_row: int) -> torch.Tensor:
    """float32 ``[tokens, top_k, rows]``: each pair's input times its expert's weight."""
    x, flat = tensors["input"].float(), ids.flatten()
    products = torch.empty(flat.numel(), tensors["weight"].shape[1], device=x.device)
    for expert in torch.unique(flat).tolist():
        pair = (flat == expert).nonzero().squeeze(-1)
        packed, scale = tensors["weight"][expert].int(), tensors["scale"][expert].float()
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2) - 8
        weight = codes.view(*scale.shape, GROUP_SIZE) * scale.unsqueeze(-1)
        products[pair] = x[pair // inputs_per_row] @ weight.flatten(-2).T
    return products.view(*ids.shape, -1)


def _linear(
    name: str, n: int, k: int, m: int, device: torch.device, dtype: torch.dtype, platform: Platform
) -> Baseline:
    weight, scale = _linear_weight(name, n, k, device, dtype, platform)
    x = activations(m, k, device, dtype)
    call = partial(linear_call(name, platform), x, weight, scale)
    return Baseline(lambda: (call(),), lambda: (_linear_product(name, x.float(), weight, scale),))


@lru_cache(maxsize=1)
def _linear_weight(
    name: str, n: int, k: int, device: torch.device, dtype: torch.dtype, platform: Platform
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, words), scale = linear_shapes(name, n, k)
    values, factors = _made_up((rows, 4 * padded_words(name, words, platform)), scale, k, device, dtype)
    return values.view(torch.int32)[:, :words], factors


def _linear_product(name: str, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 ``[m, n]``, a few groups of K (or rows of the weight) at a time."""
    j = torch.arange(8, dtype=torch.int32, device=x.device)
    if name == "vllm_w4a16":  # words along N, one nibble after the other
        step = max(1, _REFERENCE_ELEMENTS // (GROUP_SIZE * 8 * weight.shape[1]))
        total = torch.zeros(x.shape[0], 8 * weight.shape[1], device=x.device)
        for group in range(0, scale.shape[0], step):
            some = slice(group * GROUP_SIZE, (group + step) * GROUP_SIZE)
            codes = (weight[some].unsqueeze(-1) >> 4 * j & 15).flatten(-2) - 8
            factors = scale[group : group + step].float().repeat_interleave(GROUP_SIZE, dim=0)
            total += x[:, some] @ (codes * factors)
        return total
    shifts = j // 2 * 4 + j % 2 * 16  # words along K, even weights in the low half
    step = max(1, _REFERENCE_ELEMENTS // (8 * weight.shape[1]))
    parts = []
    for row in range(0, weight.shape[0], step):
        codes = (weight[row : row + step].unsqueeze(-1) >> shifts & 15).flatten(-2) - 8
        factors = scale[row : row + step].float().repeat_interleave(GROUP_SIZE, dim=1)
        parts.append(x @ (codes * factors).T)
    return torch.cat(parts, dim=-1)

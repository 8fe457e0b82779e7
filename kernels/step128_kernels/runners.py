"""Calls of our kernels on made-up weights of real size, each with a float32 reference, to compare and to time.

Weights are random bits in kernel layout from the start: a stack of 240 experts is never held as float. All inputs
depend on the shape and the number of rows alone, so every config of a kernel works on the same ones. Experts are chosen
as evenly as can be, as in :mod:`step128_kernels.cases`: the bytes that a case counts are those that a call reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from step128_kernels.nl4_arguments import ELEMENTS, codebook_table
from step128_kernels.nl4_gemm.launches import gemm_launch
from step128_kernels.nl4_layout import ROWS_PER_TILE, WEIGHTS_PER_TILE, from_kernel_layout, tile_shape
from step128_kernels.nl4_moe.launches import MoeShape
from step128_kernels.nl4_moe.reference import routed_experts
from step128_kernels.nl4_moe.triton_moe import nl4_moe_triton
from step128_kernels.run_launch import run, uses_assembly
from step128_kernels.torch_codebook import dequantize

Call = Callable[[], torch.Tensor]

SWIGLU_LIMIT = 7.0
"""Of the model's last two layers with experts."""
GEMM_ROUNDINGS, MOE_ROUNDINGS = 2, 6
"""For :func:`step128_kernels.testing.compare`."""

_SEED = 128
_CODE_SIZE = 64.0  # typical codebook value over the divisor of 128 is about a half
_REFERENCE_ELEMENTS = 1 << 26  # dequantized at a time: 256 MiB of float32


class Weight(NamedTuple):
    """NL4 weights in kernel layout (:mod:`step128_kernels.nl4_layout`), with or without a leading stack of experts."""

    tiles: torch.Tensor
    scales: torch.Tensor
    rows: int
    columns: int


def made_up_weight(rows: int, columns: int, device: torch.device, experts: int | None = None) -> Weight:
    """Random indices and scales such that results have about the size of the activations.

    Args:
        rows: N.
        columns: K, a multiple of 16.
        device: where.
        experts: length of the stack; None for a single weight.
    """
    generator = torch.Generator(device).manual_seed(_SEED + rows + columns)
    lead = () if experts is None else (experts,)
    row_tiles, column_tiles = tile_shape(rows, columns)
    places = (*lead, row_tiles, column_tiles, ROWS_PER_TILE, 2)
    indices = torch.empty(*places, 8, dtype=torch.uint8, device=device).random_(generator=generator)
    scale = torch.empty(places, dtype=torch.float16, device=device).uniform_(0.5, 2.0, generator=generator)
    scale *= 128 / _CODE_SIZE * columns**-0.5
    if columns % WEIGHTS_PER_TILE:
        scale[..., -1, :, 1] = 0  # the padding along K
    return Weight(indices.view(torch.int64).squeeze(-1), scale.view(torch.int32).squeeze(-1), rows, columns)


def gemm_runner(
    m: int,
    n: int,
    k: int,
    config: Mapping[str, int | str],
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Call, Call]:
    """The linear layer's call with a config, and its reference's.

    Args:
        m: activation rows.
        n: rows of the weight.
        k: columns of the weight.
        config: block sizes.
        device: "cuda" for any GPU; "cpu" under Triton's interpreter, for tiny sizes.
        dtype: of the activations.

    Returns:
        ``(kernel, reference)``, each giving ``[m, n]``, the reference's in float32.
    """
    place = _device(device)
    weight, x = _gemm_weight(n, k, place), activations(m, k, place, dtype)
    launch = gemm_launch(m, n, k, config, ELEMENTS[dtype], uses_assembly(x))
    common = {"x_ptr": x, "tiles_ptr": weight.tiles, "scales_ptr": weight.scales, "codebook_ptr": codebook_table(place)}

    def kernel() -> torch.Tensor:
        y = torch.empty(m, n, dtype=dtype, device=place)
        run(launch, common | {"y_ptr": y})
        return y

    return kernel, lambda: _linear_reference(x.float(), weight)


def moe_runner(
    shape: MoeShape,
    config: Mapping[str, int | str],
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Call, Call]:
    """The routed experts' call with a config, and its reference's.

    Args:
        shape: of the call, with no expert map.
        config: block sizes.
        device: as in :func:`gemm_runner`.
        dtype: of the activations.

    Returns:
        ``(kernel, reference)``, each giving ``[tokens, hidden]``, the reference's in float32.
    """
    place = _device(device)
    gate_up, down = _expert_weights(shape.experts, shape.hidden, shape.intermediate, place)
    x = activations(shape.tokens, shape.hidden, place, dtype)
    weights, ids = even_routing(shape.tokens, shape.top_k, shape.experts, place)

    def kernel() -> torch.Tensor:
        return nl4_moe_triton(
            x,
            gate_up.tiles,
            gate_up.scales,
            down.tiles,
            down.scales,
            weights,
            ids,
            shape.intermediate,
            SWIGLU_LIMIT,
            config=config,
        )

    def reference() -> torch.Tensor:
        return routed_experts(
            x.float(), lambda e: dense(gate_up, e), lambda e: dense(down, e), weights, ids, SWIGLU_LIMIT
        )

    return kernel, reference


def activations(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normal random values ``[rows, columns]``, always the same ones."""
    generator = torch.Generator(device).manual_seed(_SEED)
    return torch.randn(rows, columns, generator=generator, device=device).to(dtype)


def even_routing(tokens: int, top_k: int, experts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(weights float32, ids int32)``, both ``[tokens, top_k]``: every expert chosen equally often, give or take one.

    Raises:
        ValueError: a token would choose an expert twice.
    """
    if top_k > experts:
        raise ValueError(f"{top_k} different experts cannot be chosen of {experts}")
    generator = torch.Generator(device).manual_seed(_SEED)
    order = torch.randperm(experts, generator=generator, device=device)
    ids = order[torch.arange(tokens * top_k, device=device) % experts].view(tokens, top_k)
    weights = torch.rand(tokens, top_k, generator=generator, device=device) + 0.5
    return weights / weights.sum(dim=-1, keepdim=True), ids.to(torch.int32)


def dense(weight: Weight, expert: int | None = None) -> torch.Tensor:
    """float32 ``[rows, columns]`` of a weight, or of one expert's."""
    tiles, scales = (weight.tiles, weight.scales) if expert is None else (weight.tiles[expert], weight.scales[expert])
    return dequantize(*from_kernel_layout(tiles, scales, weight.rows, weight.columns))


def _linear_reference(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x @ W.T`` in float32, a few rows of W at a time."""
    step = max(1, _REFERENCE_ELEMENTS // (weight.columns * ROWS_PER_TILE))
    parts = []
    for start in range(0, weight.tiles.shape[0], step):
        rows = min(step * ROWS_PER_TILE, weight.rows - start * ROWS_PER_TILE)
        some = Weight(weight.tiles[start : start + step], weight.scales[start : start + step], rows, weight.columns)
        parts.append(linear(x, dense(some)))
    return torch.cat(parts, dim=-1)


def _device(name: str) -> torch.device:
    """With its number, so that equal devices are equal keys."""
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


# One of each is kept: a search tries many configs of one shape in a row.
@lru_cache(maxsize=1)
def _gemm_weight(n: int, k: int, device: torch.device) -> Weight:
    return made_up_weight(n, k, device)


@lru_cache(maxsize=1)
def _expert_weights(experts: int, hidden: int, intermediate: int, device: torch.device) -> tuple[Weight, Weight]:
    return (
        made_up_weight(2 * intermediate, hidden, device, experts),
        made_up_weight(hidden, intermediate, device, experts),
    )

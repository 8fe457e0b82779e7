"""The NL4 scale search in torch, for machines with a GPU: the bytes of :func:`step128_kernels.codebook.quantize`.

Each operation is a kernel of its own, rounded to float32 as numpy rounds it, and columns are summed in order. So bytes
are the same wherever a device computes as IEEE 754 says; checked on the CPU, not measured on a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from step128_kernels.codebook import (
    ABSMAX_START,
    CODEBOOK,
    GROUP_SIZE,
    NEAREST,
    SCALE_DIVISOR,
    SEARCH_FITS,
    SEARCH_STARTS,
    Float16Array,
    Float32Array,
    ScaleSearch,
    Uint8Array,
    check_quantizable,
)

_GROUPS_PER_CPU_BLOCK = 1 << 14  # its temporaries fit a core's cache
_GROUPS_PER_GPU_BLOCK = 1 << 20  # each kernel does one operation on it, long enough to hide the next one's launch
_FLOAT16_MAX = torch.finfo(torch.float16).max


def quantize(
    weight: torch.Tensor, importance: torch.Tensor | None = None, scale_search: ScaleSearch = "mse"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to NL4 on the device that it is on.

    Args:
        weight: any floating dtype, ``[rows, K]``, finite.
        importance: float32 ``[K]`` on the same device; None means uniform.
        scale_search: ``mse`` or ``absmax``.

    Returns:
        ``(packed uint8 [rows, K // 2], scale float16 [rows, K // 16])`` on the same device.

    Raises:
        ValueError: as :func:`step128_kernels.codebook.quantize`, and if the shapes are not those above.
    """
    if weight.dim() != 2:
        raise ValueError(f"the weight has shape {list(weight.shape)}, a matrix is needed")
    rows, columns = weight.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"the importance has shape {list(importance.shape)}, the weight needs [{columns}]")
    check_quantizable(columns, _extremes(weight), None if importance is None else _extremes(importance), scale_search)
    groups = weight.reshape(-1, GROUP_SIZE)
    channels = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    relative = _relative(channels.view(-1, GROUP_SIZE))
    packed = torch.empty((groups.shape[0], GROUP_SIZE // 2), dtype=torch.uint8, device=weight.device)
    scale = torch.empty(groups.shape[0], dtype=torch.float16, device=weight.device)
    step = _GROUPS_PER_CPU_BLOCK if weight.device.type == "cpu" else _GROUPS_PER_GPU_BLOCK
    for start in range(0, groups.shape[0], step):
        block = groups[start : start + step].float().t().contiguous()
        largest = block.abs().amax(dim=0)
        if scale_search == "absmax":
            best = (largest * float(ABSMAX_START)).half()
        else:
            numbers = torch.arange(start, start + block.shape[1], device=weight.device) % relative.shape[0]
            best = _search(block, largest, relative[numbers].t().contiguous())
        scale[start : start + step] = best
        indices = _look_up(_tables(weight.device)[1], block * _inverse(best))
        packed[start : start + step] = (indices[0::2] | (indices[1::2] << 4)).t()
    return packed.view(rows, columns // 2), scale.view(rows, columns // GROUP_SIZE)


def quantize_array(
    weight: Float32Array, importance: Float32Array | None, scale_search: ScaleSearch, device: str
) -> tuple[Uint8Array, Float16Array]:
    """:func:`quantize` of numpy arrays on ``device``, a name such as ``cuda``; the result is copied back."""
    channels = None if importance is None else torch.tensor(importance, device=device)
    packed, scale = quantize(torch.tensor(weight, device=device), channels, scale_search)
    return packed.cpu().numpy(), scale.cpu().numpy()


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    if not values.numel():
        return 0.0, 0.0
    least, largest = torch.aminmax(values)
    return float(least), float(largest)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For every bin of NEAREST: the codebook value (float32) and its index (uint8)."""
    nearest = torch.from_numpy(NEAREST)
    return torch.tensor(CODEBOOK, dtype=torch.float32)[nearest.long()].to(device), nearest.to(device)


def _relative(importance: torch.Tensor) -> torch.Tensor:
    """:func:`step128_kernels.codebook.relative_importance` in torch."""
    largest = importance.amax(dim=1, keepdim=True)
    return torch.where(largest > 0, importance / largest, 1.0).clamp_min(1e-4)


def _inverse(stored: torch.Tensor) -> torch.Tensor:
    wide = stored.float()
    return torch.where(wide != 0, SCALE_DIVISOR / wide, 0.0)


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The table's entries for values in codebook units; the cast truncates, which is floor: bins are never negative."""
    bins = (codes.clamp(-128.0, 127.75) * 2 + 256).int()
    return table.index_select(0, bins.view(-1)).view(bins.shape)


def _sum_in_order(columns: torch.Tensor) -> torch.Tensor:
    total = columns[0].clone()
    for column in columns[1:]:
        total += column
    return total


def _search(columns: torch.Tensor, largest: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The reference's search: ``columns`` and ``weights`` float32 ``[16, groups]``; returns float16 ``[groups]``."""
    weighted = columns * weights
    codebook = _tables(columns.device)[0]
    best_scale = torch.zeros_like(largest, dtype=torch.float16)
    best_gain = torch.zeros_like(largest)
    for start in SEARCH_STARTS.tolist():
        scale = largest * start
        for _ in range(SEARCH_FITS):
            stored = scale.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
            codes = _look_up(codebook, columns * _inverse(stored))
            cross = _sum_in_order(weighted * codes)
            square = _sum_in_order(codes * weights * codes)
            unit = stored.float() / SCALE_DIVISOR
            gain = unit * (2 * cross - unit * square)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, stored, best_scale)
            scale = torch.where(square > 0, cross / square, 0.0) * SCALE_DIVISOR
    return best_scale

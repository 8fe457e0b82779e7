"""Arguments that the launches of the NL4 kernels have in common."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from step128_kernels.codebook import CODEBOOK, SCALE_DIVISOR
from step128_kernels.launch import Pointer
from step128_kernels.nl4_layout import ROWS_PER_TILE, tile_shape

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = {element: dtype for dtype, element in ELEMENTS.items()}

_TILE_BYTES = ROWS_PER_TILE * 16
_TILE_SCALE_BYTES = ROWS_PER_TILE * 4


def weight_bytes(n: int, k: int, experts: int = 1) -> int:
    """Bytes of a weight in kernel layout, padding included: indices and scales."""
    row_tiles, column_tiles = tile_shape(n, k)
    return experts * row_tiles * column_tiles * (_TILE_BYTES + _TILE_SCALE_BYTES)


def weight_pointers(n: int, k: int, experts: int = 1) -> dict[str, Pointer]:
    """The three pointers of a weight (or of a stack of them) of ``n`` x ``k``."""
    row_tiles, column_tiles = tile_shape(n, k)
    tiles = experts * row_tiles * column_tiles
    return {
        "tiles_ptr": Pointer("i64", tiles * _TILE_BYTES),
        "scales_ptr": Pointer("i32", tiles * _TILE_SCALE_BYTES),
        "codebook_ptr": Pointer("fp32", 4 * len(CODEBOOK)),
    }


def check_columns(tiles: torch.Tensor, columns: int) -> None:
    """Hold a weight in kernel layout against the activations it is to be multiplied with.

    Raises:
        ValueError: the weight has another number of column tiles.
    """
    wanted = tile_shape(1, columns)[1]
    if tiles.shape[-3] != wanted:
        raise ValueError(f"the weight has {tiles.shape[-3]} column tiles, activations of {columns} need {wanted}")


def check_element(element: str, amd: bool) -> None:
    """Refuse what the assembly cannot compute.

    Raises:
        ValueError: float32 activations with AMD's 16-bit dot products.
    """
    if amd and element not in ("bf16", "fp16"):
        raise ValueError(f"AMD's assembly computes with 16-bit activations, not with {element}; use the portable path")


def even(size: int, block: int) -> bool:
    """Whether blocks fill a dimension exactly."""
    return size % block == 0


def num_options(config: Mapping[str, int | str], prefix: str = "") -> dict[str, int]:
    """``num_warps``, ``num_stages`` and ``waves_per_eu`` of a config."""
    return {
        "num_warps": int(config[f"{prefix}num_warps"]),
        "num_stages": int(config.get(f"{prefix}num_stages", 1)),
        "waves_per_eu": int(config.get(f"{prefix}waves_per_eu", 0)),
    }


@lru_cache(maxsize=8)
def codebook_table(device: torch.device) -> torch.Tensor:
    """float32 ``[16]``, the codes over 128, on a device, for the portable look-up.

    Made when weights are loaded, never while a graph is captured.
    """
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device) / SCALE_DIVISOR

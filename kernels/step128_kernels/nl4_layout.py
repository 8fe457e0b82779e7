"""The order in which the GPU kernels read NL4 weights: made once after loading, one buffer for decode and prefill.

A checkpoint stores ``packed [N, K // 2]`` and ``scale [N, K // 16]``, row by row. A kernel gives each lane one row, so
rows are cut into tiles of 16 rows by 32 weights that lie together, tile after tile along K:

    tiles   int64 [..., N / 16, K / 32, 16, 2]   one int64 is a group of 16 weights; a lane reads two, 128 bits
    scales  int32 [..., N / 16, K / 32, 16]      the float16 scales of these two groups, the first in the low half

Thirty-two lanes thus read 512 bytes in a row, and the next step along K is the next 512. Inside an int64, each half of
32 bits holds eight weights: byte j (0..3) has weight j in its low nibble and weight j + 4 in its high one. Masking the
low nibbles gives the byte-permute selectors of four neighbours, and so does masking after a shift by four.

N is padded to 16 rows and K to 32 weights, with index 8 (the entry nearest to 0) and scale 0.
"""

from __future__ import annotations

from itertools import product

import torch

from step128_kernels.codebook import GROUP_SIZE

ROWS_PER_TILE = 16
WEIGHTS_PER_TILE = 32  # along K, in each row of a tile
_GROUPS_PER_TILE = WEIGHTS_PER_TILE // GROUP_SIZE
_ZERO_BYTE = 0x88  # index 8 twice
# Packed bytes reordered at a time. What is needed beside the result is about eight times that: 16 MiB.
_BYTES_PER_BLOCK = 2 << 20


def tile_shape(rows: int, columns: int) -> tuple[int, int]:
    """Tiles along N and along K for a weight of ``rows`` x ``columns``."""
    return -(-rows // ROWS_PER_TILE), -(-columns // WEIGHTS_PER_TILE)


def to_kernel_layout(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorder one weight, or a stack of them, for the kernels.

    Weights fill most of a GPU when they are reordered, so besides the result only a block of rows is held at a time.

    Args:
        packed: uint8 ``[..., N, K // 2]``, as in the checkpoint.
        scale: float16 ``[..., N, K // 16]``, on the same device.

    Returns:
        ``(tiles, scales)`` as the module says, on the device of the arguments.

    Raises:
        ValueError: the two shapes do not belong together.
    """
    *lead, rows, bytes_per_row = packed.shape
    columns = bytes_per_row * 2
    if scale.shape != (*lead, rows, columns // GROUP_SIZE) or columns % GROUP_SIZE:
        raise ValueError(f"packed {tuple(packed.shape)} and scale {tuple(scale.shape)} do not belong together")
    row_tiles, column_tiles = tile_shape(rows, columns)
    shape = (*lead, row_tiles, column_tiles, ROWS_PER_TILE)
    tiles = torch.empty(*shape, _GROUPS_PER_TILE, dtype=torch.int64, device=packed.device)
    scales = torch.empty(shape, dtype=torch.int32, device=packed.device)
    step = max(1, _BYTES_PER_BLOCK // max(1, bytes_per_row * ROWS_PER_TILE))
    for index in product(*map(range, lead)):
        for first in range(0, row_tiles, step):
            some_rows = slice(first * ROWS_PER_TILE, (first + step) * ROWS_PER_TILE)
            some_tiles = slice(first, first + step)
            block = _block_of_tiles(packed[index][some_rows], scale[index][some_rows])
            tiles[index][some_tiles].copy_(block[0])
            scales[index][some_tiles].copy_(block[1])
    return tiles, scales


def _block_of_tiles(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`to_kernel_layout` of some rows of one weight; the results are views in the rows' order."""
    row_tiles, column_tiles = tile_shape(packed.shape[0], packed.shape[1] * 2)
    more_rows = row_tiles * ROWS_PER_TILE - packed.shape[0]
    more_groups = column_tiles * _GROUPS_PER_TILE - scale.shape[1]
    packed = torch.nn.functional.pad(packed, (0, more_groups * GROUP_SIZE // 2, 0, more_rows), value=_ZERO_BYTE)
    scale = torch.nn.functional.pad(scale, (0, more_groups, 0, more_rows))
    words = _permute_nibbles(packed).view(torch.int64)
    tiles = words.view(row_tiles, ROWS_PER_TILE, column_tiles, _GROUPS_PER_TILE)
    scales = scale.contiguous().view(torch.int32).view(row_tiles, ROWS_PER_TILE, column_tiles)
    return tiles.transpose(1, 2), scales.transpose(1, 2)


def from_kernel_layout(
    tiles: torch.Tensor, scales: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo :func:`to_kernel_layout`, bit by bit.

    Args:
        tiles: int64 ``[..., N / 16, K / 32, 16, 2]``.
        scales: int32 ``[..., N / 16, K / 32, 16]``.
        rows: N before padding.
        columns: K before padding.

    Returns:
        ``(packed uint8 [..., N, K // 2], scale float16 [..., N, K // 16])``.
    """
    words = _view_as(tiles.transpose(-2, -3).flatten(-4, -3).flatten(-2, -1), torch.uint8)
    scale = _view_as(scales.transpose(-1, -2).flatten(-3, -2), torch.float16)
    packed = _restore_nibbles(words)
    return (
        packed[..., :rows, : columns // 2].contiguous(),
        scale[..., :rows, : columns // GROUP_SIZE].contiguous(),
    )


def rows_of(
    tiles: torch.Tensor, scales: torch.Tensor, row_ids: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of one weight, back in the checkpoint's order (an embedding looks rows up).

    Args:
        tiles: int64 ``[N / 16, K / 32, 16, 2]``.
        scales: int32 ``[N / 16, K / 32, 16]``.
        row_ids: integer ``[...]``, values below N.
        columns: K before padding.

    Returns:
        ``(packed uint8 [..., K // 2], scale float16 [..., K // 16])``.
    """
    tile, row = row_ids // ROWS_PER_TILE, row_ids % ROWS_PER_TILE
    words = _view_as(tiles[tile, :, row].flatten(-2), torch.uint8)
    scale = _view_as(scales[tile, :, row], torch.float16)
    return _restore_nibbles(words)[..., : columns // 2], scale[..., : columns // GROUP_SIZE]


def _view_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy, row by row in memory, seen as another dtype.

    ``contiguous()`` does not do: of a last dimension of size 1 it keeps the stride, whatever it is, and then a view as
    another dtype is refused.
    """
    return tensor.clone(memory_format=torch.contiguous_format).view(dtype)


def _permute_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Checkpoint bytes (weights 2j, 2j + 1) to kernel bytes (weights j, j + 4), within every four bytes."""
    *lead, size = packed.shape
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).view(*lead, size // 4, 2, 4)
    return torch.bitwise_or(halves[..., 0, :], halves[..., 1, :] << 4).flatten(-2)


def _restore_nibbles(words: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_permute_nibbles`."""
    *lead, size = words.shape
    quads = words.view(*lead, size // 4, 4)
    pairs = torch.stack((quads & 15, quads >> 4), dim=-2).view(*lead, size, 2)
    return torch.bitwise_or(pairs[..., 0], pairs[..., 1] << 4)

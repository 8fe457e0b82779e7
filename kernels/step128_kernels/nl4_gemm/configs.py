"""Block sizes of the NL4 linear layer: the tuned ones, the default without any, and those worth trying."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from step128_kernels.device import gpu_identity
from step128_kernels.tuned.load import Config, TunedTable, load_config

KERNEL = "nl4_gemm"
MOST_DECODE_ROWS = 16
"""Beyond these the decode kernel is not tried: it looks every weight up again for eight rows. Below them WMMA is not:
so a table changes from one to the other once, at 16 or 32 rows.
"""


def decode_config(block_m: int, repeat: int, split_k: int, lanes: int, waves_per_eu: int = 0) -> Config:
    """One warp for every 32 lanes, so that each lane owns ``repeat`` weight rows of one part of K.

    With ``waves_per_eu`` the compiler keeps registers low enough for that many waves on a SIMD.
    """
    return {
        "phase": "decode",
        "BLOCK_M": block_m,
        "REPEAT": repeat,
        "SPLIT_K": split_k,
        "LANES": lanes,
        "num_warps": split_k * lanes // 32,
        "waves_per_eu": waves_per_eu,
    }


def prefill_config(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    """Sizes of one program's block of the result and of its steps along K."""
    return {
        "phase": "prefill",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


DEFAULT = {
    **{rows: decode_config(rows, 2, 8, 32) for rows in (1, 2, 4, 8)},
    16: prefill_config(16, 64, 64, 4, 1),
    32: prefill_config(32, 64, 64, 4, 1),
    64: prefill_config(64, 64, 64, 4, 1),
}
"""By activation rows, for a GPU that nothing is tuned for."""

KEYS = {"decode": frozenset(decode_config(1, 1, 1, 32)), "prefill": frozenset(prefill_config(16, 16, 64, 1, 1))}
"""What a config of each phase must hold, and nothing else."""


def gemm_table(n: int, k: int, device: torch.device) -> TunedTable:
    """Configs for a weight of ``n`` x ``k`` on a device."""
    name, arch = gpu_identity(device)
    return load_config(KERNEL, {"N": n, "K": k}, name, arch, default=DEFAULT, keys=KEYS)


# BLOCK_M, BLOCK_N, num_warps worth trying; BLOCK_K is 64, so that a lane of WMMA's layout reads 128 bits of weights
_PREFILL_SIZES = ((16, 32, 2), (16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))


def gemm_candidates(phase: str, n: int, k: int, m: int) -> Iterator[Config]:
    """Configs worth trying for ``m`` rows; in decode only those that cut K into equal parts, if there are any."""
    if phase == "prefill":
        for (block_m, block_n, num_warps), num_stages in product(_PREFILL_SIZES, (1, 2)):
            if 16 <= m >= block_m:
                yield prefill_config(block_m, block_n, 64, num_warps, num_stages)
    elif m <= MOST_DECODE_ROWS:
        block_m = min(m, 8)
        for lanes, repeat in product((16, 32), (1, 2, 4)):
            for split_k in even_splits(k, lanes):
                if repeat * lanes <= n:
                    for waves_per_eu in (0, 8) if block_m * repeat > 8 else (0,):
                        yield decode_config(block_m, repeat, split_k, lanes, waves_per_eu)


def even_splits(k: int, lanes: int) -> list[int]:
    """Parts of K, on different warps or half-warps, that are equal; where none are, as few as make a whole warp."""
    fewest = 32 // lanes
    return [parts for parts in (1, 2, 4, 8, 16) if k % (32 * parts) == 0 and parts >= fewest] or [fewest]

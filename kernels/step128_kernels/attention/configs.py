"""Launch parameters of attention: the tuned ones, the defaults without any, and those worth trying.

Files are by layer, KV-cache dtype and context bucket; within a file, configs are by query tokens of the batch: 1 to 32
are decodes and verifications, more are chunks of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import log2

import torch

from step128_kernels.attention.limits import MOST_DECODE_TOKENS
from step128_kernels.attention.shape import AttentionShape
from step128_kernels.device import gpu_identity
from step128_kernels.tuned.load import Config, load_config

KERNELS = {"fp8": "attention_fp8", "bf16": "attention_bf16"}
"""Kernel name of tuned files, by KV-cache dtype; a float16 cache takes bfloat16's files."""
CONTEXTS = (1024, 8192, 65536, 204800)
"""Context buckets of full attention; a sliding window is a bucket of its own."""
PAGE = 16
"""Tokens of a page, which files are tuned for: vLLM's default, and our profiles'."""
DECODE_ROWS = (1, 4, 32)
PREFILL_ROWS = (2048,)
VERIFIED_TOKENS = 4
"""Query tokens of a sequence in a batch of verifications, at MTP depth 3."""


def decode_config(
    splits: int, least_tiles: int, block_n: int = 32, num_warps: int = 1, waves_per_eu: int = 0
) -> Config:
    """Keys of a tile, parts that the keys are cut into, tiles that a part has at least."""
    return {
        "phase": "decode",
        "BLOCK_N": block_n,
        "SPLITS": splits,
        "LEAST_TILES": least_tiles,
        "num_warps": num_warps,
        "waves_per_eu": waves_per_eu,
    }


def prefill_config(block_m: int, block_n: int, num_warps: int, waves_per_eu: int = 0) -> Config:
    """Query rows and keys of a tile; on RDNA 16 rows a wave."""
    return {
        "phase": "prefill",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": 1,
        "waves_per_eu": waves_per_eu,
    }


DEFAULT = {1: decode_config(64, 2, waves_per_eu=4), 512: prefill_config(128, 32, 8)}
PORTABLE = {1: decode_config(64, 2, num_warps=4), 512: prefill_config(64, 32, 4)}
"""For GPUs that are not RDNA3 or RDNA4."""
KEYS = {"decode": frozenset(decode_config(1, 1)), "prefill": frozenset(prefill_config(64, 32, 4))}
"""What a config of each phase must hold, and nothing else."""


def dimensions(shape: AttentionShape, context_tokens: int) -> dict[str, int]:
    """Dimensions of the tuned file for a layer: heads, head size, window (0: none), and the context bucket."""
    bucket = shape.window or min(CONTEXTS, key=lambda one: (abs(log2(one / max(1, context_tokens))), one))
    return {"Hq": shape.heads, "Hkv": shape.kv_heads, "D": shape.head_dim, "W": shape.window, "C": bucket}


def shape_of(dims: Mapping[str, int], kernel: str, page: int = PAGE) -> AttentionShape:
    """The layer of a tuned file."""
    kv_dtype = next(dtype for dtype, name in KERNELS.items() if name == kernel)
    return AttentionShape(dims["Hq"], dims["Hkv"], dims["D"], dims["W"], page, kv_dtype, "bf16")


@lru_cache(maxsize=4096)
def choose(
    shape: AttentionShape, sequences: int, query_tokens: int, context_tokens: int, device: torch.device
) -> Config:
    """The config of a call.

    Args:
        shape: the layer.
        sequences: of the batch.
        query_tokens: most of a sequence; over MOST_DECODE_TOKENS a prefill's config is given, else a decode's.
        context_tokens: most of a sequence.
        device: where.
    """
    name, arch = gpu_identity(device)
    phase = "prefill" if query_tokens > MOST_DECODE_TOKENS else "decode"
    default = DEFAULT if arch else PORTABLE
    kernel = KERNELS.get(shape.kv_dtype, KERNELS["bf16"])
    table = load_config(kernel, dimensions(shape, context_tokens), name, arch, default=default, keys=KEYS)
    rows = sequences * query_tokens
    served = _of_phase(table.configs, phase) or _of_phase(default, phase)
    return served[min(served, key=lambda tuned: (abs(log2(tuned / rows)), tuned))]


def _of_phase(configs: Mapping[int, Config], phase: str) -> dict[int, Config]:
    return {rows: config for rows, config in configs.items() if config["phase"] == phase}


def batch_of(rows: int) -> tuple[int, int]:
    """Sequences and query tokens of each, for which the configs of so many rows are tuned."""
    return (rows // VERIFIED_TOKENS, VERIFIED_TOKENS) if MOST_DECODE_TOKENS < rows <= DECODE_ROWS[-1] else (1, rows)


def attention_candidates(phase: str, dims: Mapping[str, int], rows: int, arch: str) -> Iterator[Config]:
    """Configs worth trying for one number of query tokens; none where that is not tuned.

    ``waves_per_eu`` is what keeps registers from spilling on gfx1151, whose WMMA operands take twice as many; on
    gfx1201 it changes nothing.
    """
    waves = (0,) if arch == "gfx1201" else (2, 4)
    if phase == "decode" and rows in DECODE_ROWS:
        for splits, waves_per_eu in product((4, 8, 16) if dims["W"] else (16, 32, 64, 128, 256), waves):
            yield decode_config(splits, 1 if dims["W"] else 2, waves_per_eu=waves_per_eu)
    elif phase == "prefill" and rows in PREFILL_ROWS:
        for (warps, block_n), waves_per_eu in product(((8, 64), (8, 32), (4, 32)), (0, 4)):
            yield prefill_config(16 * warps, block_n, warps, waves_per_eu)

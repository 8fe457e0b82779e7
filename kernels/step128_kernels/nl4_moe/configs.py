"""Block sizes of the NL4 experts: the tuned ones, the default without any, and those worth trying."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from step128_kernels.device import gpu_identity
from step128_kernels.nl4_gemm.configs import decode_config, prefill_config
from step128_kernels.nl4_moe.launches import MoeShape
from step128_kernels.tuning import Config, load_config

KERNEL = "nl4_moe"


def joint_config(gate_up: Config, down: Config) -> Config:
    """One config of both kernels; they share the phase and BLOCK_M, since they share the blocks of pairs."""
    shared = {key: gate_up[key] for key in ("phase", "BLOCK_M")}
    parts = (("gate_up_", gate_up), ("down_", down))
    return shared | {prefix + key: value for prefix, part in parts for key, value in part.items() if key not in shared}


DEFAULT = {
    **{m: joint_config(decode_config(m, 1, 8, 32), decode_config(m, 2, 2, 32)) for m in (1, 2, 4, 8)},
    128: joint_config(prefill_config(16, 32, 64, 2, 1), prefill_config(16, 64, 32, 4, 1)),
    1024: joint_config(prefill_config(32, 64, 32, 4, 1), prefill_config(32, 64, 32, 4, 1)),
    4096: joint_config(prefill_config(64, 64, 32, 4, 1), prefill_config(64, 64, 32, 4, 1)),
}
"""By tokens, for a GPU that nothing is tuned for."""

# BLOCK_M, and for gate and up, then for down: (BLOCK_N, BLOCK_K, num_warps) worth trying
_PREFILL_SIZES = (
    (16, ((32, 64, 2), (64, 32, 4)), ((64, 32, 2), (64, 32, 4))),
    (32, ((32, 64, 2), (64, 32, 4)), ((64, 32, 4), (128, 32, 4))),
    (64, ((64, 32, 4), (64, 32, 8)), ((64, 32, 4), (128, 32, 4))),
    (128, ((64, 32, 8),), ((64, 32, 4), (128, 32, 8))),
)


def moe_config(shape: MoeShape, device: torch.device) -> Config:
    """Config for a call on a device."""
    name, arch = gpu_identity(device)
    sizes = {"E": shape.experts, "N": shape.intermediate, "K": shape.hidden, "top_k": shape.top_k}
    return load_config(KERNEL, sizes, name, arch, default=DEFAULT).nearest(shape.tokens)


def moe_candidates(phase: str, shape: MoeShape) -> Iterator[Config]:
    """Configs worth trying for ``shape.tokens`` tokens."""
    if phase == "decode":
        if shape.tokens > 32:
            return
        block_m = min(shape.tokens, 8)
        for gate_up in _decode(block_m, (1, 2), shape.hidden, shape.intermediate, 2):
            for down in _decode(block_m, (1, 2, 4), shape.intermediate, shape.hidden):
                yield joint_config(gate_up, down)
        return
    rows = shape.pairs // shape.experts  # of an expert, when all are chosen equally often
    for block_m, gate_up_sizes, down_sizes in _PREFILL_SIZES:
        if block_m == 16 or block_m <= 4 * rows:
            for gate_up_size, down_size, num_stages in product(gate_up_sizes, down_sizes, (1, 2)):
                yield joint_config(
                    prefill_config(block_m, *gate_up_size, num_stages), prefill_config(block_m, *down_size, num_stages)
                )


def _decode(block_m: int, repeats: tuple[int, ...], k: int, n: int, parts: int = 1) -> Iterator[Config]:
    """One kernel's part: those that cut K into equal parts, if there are any; ``parts`` rows a lane for each repeat."""
    for split_k in [s for s in (1, 2, 4, 8, 16) if k % (32 * s) == 0] or [1]:
        for repeat in repeats:
            if repeat * 32 <= n:
                yield decode_config(block_m, repeat, split_k, 32, 8 if block_m * repeat * parts > 16 else 0)

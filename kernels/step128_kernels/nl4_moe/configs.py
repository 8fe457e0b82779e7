"""Block sizes of the NL4 experts: the tuned ones, the default without any, and those worth trying."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from step128_kernels.device import gpu_identity
from step128_kernels.nl4_gemm.configs import decode_config, even_splits, prefill_config
from step128_kernels.nl4_moe.launches import MoeShape
from step128_kernels.tuned.load import Config, load_config

KERNEL = "nl4_moe"


def joint_config(gate_up: Config, down: Config) -> Config:
    """One config of both kernels; they share the phase and BLOCK_M, since they share the blocks of pairs."""
    shared = {key: gate_up[key] for key in ("phase", "BLOCK_M")}
    parts = (("gate_up_", gate_up), ("down_", down))
    return shared | {prefix + key: value for prefix, part in parts for key, value in part.items() if key not in shared}


DEFAULT = {
    **{m: joint_config(decode_config(m, 1, 8, 32), decode_config(m, 2, 1, 32)) for m in (1, 2, 4, 8)},
    16: joint_config(decode_config(8, 1, 8, 32), decode_config(8, 2, 1, 32)),
    32: joint_config(prefill_config(16, 32, 64, 2, 1), prefill_config(16, 64, 64, 4, 1)),
    1024: joint_config(prefill_config(32, 32, 64, 2, 1), prefill_config(32, 64, 64, 4, 1)),
    4096: joint_config(prefill_config(64, 32, 64, 4, 1), prefill_config(64, 64, 64, 4, 1)),
}
"""By tokens, for a GPU that nothing is tuned for."""

KEYS = {str(config["phase"]): frozenset(config) for config in DEFAULT.values()}
"""What a config of each phase must hold, and nothing else."""

# BLOCK_M, and for gate and up, then for down: (BLOCK_N, num_warps) worth trying; BLOCK_K is 64 as for linear layers
_PREFILL_SIZES = (
    (16, ((32, 2), (64, 4)), ((32, 2), (64, 4))),
    (32, ((32, 2), (64, 4)), ((64, 4),)),
    (64, ((32, 4), (64, 4)), ((64, 4), (128, 4))),
    (128, ((32, 4), (64, 8)), ((64, 4), (128, 8))),
)
_MOST_DECODE_TOKENS = 32


def moe_config(shape: MoeShape, device: torch.device) -> Config:
    """Config for a call on a device."""
    name, arch = gpu_identity(device)
    sizes = {"E": shape.experts, "N": shape.intermediate, "K": shape.hidden, "top_k": shape.top_k}
    return load_config(KERNEL, sizes, name, arch, default=DEFAULT, keys=KEYS).nearest(shape.tokens)


def moe_candidates(phase: str, shape: MoeShape) -> Iterator[Config]:
    """Configs worth trying for ``shape.tokens`` tokens."""
    if phase == "prefill":
        rows = shape.pairs // shape.experts  # of an expert, when all are chosen equally often
        for block_m, gate_up_sizes, down_sizes in _PREFILL_SIZES:
            if shape.tokens >= 16 and (block_m == 16 or block_m <= 2 * rows):
                for gate_up_size, down_size, stages in product(gate_up_sizes, down_sizes, (1, 2)):
                    yield joint_config(
                        _prefill(block_m, *gate_up_size, stages),
                        _prefill(block_m, *down_size, stages),
                    )
    elif shape.tokens <= _MOST_DECODE_TOKENS:
        # The rows of one sequence's verification share their experts' weights; of a larger batch hardly any do.
        for block_m in sorted({min(shape.tokens, 4), min(shape.tokens, 8)}):
            gate_ups = _decode(block_m, (1, 2), (4, 8, 16), shape.hidden, 2)
            downs = list(_decode(block_m, (1, 2, 4), (1, 2, 4), shape.intermediate))
            for gate_up, down in product(gate_ups, downs):
                yield joint_config(gate_up, down)


def _prefill(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return prefill_config(block_m, block_n, 64, num_warps, num_stages)


def _decode(
    block_m: int, repeats: tuple[int, ...], splits: tuple[int, ...], k: int, parts: int = 1
) -> Iterator[Config]:
    """One kernel's part, with equal parts of K; ``parts`` rows a lane for each repeat."""
    for split_k, repeat in product(sorted(set(even_splits(k, 32)) & set(splits)) or [1], repeats):
        yield decode_config(block_m, repeat, split_k, 32, 8 if block_m * repeat * parts > 16 else 0)

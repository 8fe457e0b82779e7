"""Every NL4 kernel x config x shape that we ship, as cases to compile, to count, to tune and to measure.

The shapes are those of Step-3.7-Flash-240REAP under tensor parallelism 1, 2, 4 and 8, and its experts under expert
parallelism too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import exp, lgamma, log, log1p

import torch

from step128_kernels.launch import KernelCase, Launch
from step128_kernels.nl4_arguments import weight_bytes
from step128_kernels.nl4_gemm.configs import DEFAULT as GEMM_DEFAULT
from step128_kernels.nl4_gemm.configs import KEYS as GEMM_KEYS
from step128_kernels.nl4_gemm.configs import gemm_candidates
from step128_kernels.nl4_gemm.launches import gemm_launch
from step128_kernels.nl4_moe.configs import DEFAULT as MOE_DEFAULT
from step128_kernels.nl4_moe.configs import KEYS as MOE_KEYS
from step128_kernels.nl4_moe.configs import moe_candidates
from step128_kernels.nl4_moe.launches import MoeShape, block_count, moe_launches, needs_sorting
from step128_kernels.tuned.load import Config, load_config
from step128_kernels.tuned.names import DEVICE_OF_ARCH

Shape = Mapping[str, int]

ARCHS = ("gfx1201", "gfx1151")
ELEMENT = "bf16"
"""The model's dtype, which cases are made for."""

SORTING_NOTE = "torch's own kernels sort the pairs first (nl4_moe/align.py); they are not counted"
_HIDDEN, _HEAD_DIM, _KV_HEADS, _EXPERTS, _TOP_K = 4096, 128, 8, 240, 8
_TENSOR_PARALLEL = (1, 2, 4, 8)
_SWIGLU_LIMIT = 7.0  # of the last two layers with experts; the clamp costs a little, so cases have it


def _linear_shapes() -> Iterator[tuple[int, int]]:
    """``(N, K)`` of every quantized linear layer."""
    for ranks in _TENSOR_PARALLEL:
        for heads in (64, 96):  # full attention, sliding window
            yield (heads + 2 * _KV_HEADS) * _HEAD_DIM // ranks, _HIDDEN
            yield _HIDDEN, heads * _HEAD_DIM // ranks
        for intermediate in (11264, 1280):  # dense layers, shared expert
            yield 2 * intermediate // ranks, _HIDDEN
            yield _HIDDEN, intermediate // ranks
        yield 128896 // ranks, _HIDDEN  # language-model head


SHAPES: dict[str, tuple[Shape, ...]] = {
    "nl4_gemm": tuple({"N": n, "K": k} for n, k in dict.fromkeys(_linear_shapes())),
    "nl4_moe": tuple(
        {"E": experts, "N": intermediate, "K": _HIDDEN, "top_k": _TOP_K}
        for experts, intermediate in (
            *((_EXPERTS, 1280 // ranks) for ranks in _TENSOR_PARALLEL),
            *((_EXPERTS // ranks, 1280) for ranks in _TENSOR_PARALLEL[1:]),
        )
    ),
}


def moe_shape(shape: Shape, m: int) -> MoeShape:
    """A shape's call with ``m`` tokens; fewer experts than the model's are those of one rank of several."""
    return MoeShape(m, shape["top_k"], shape["E"], shape["K"], shape["N"], has_map=shape["E"] < _EXPERTS)


def _local_pairs(moe: MoeShape) -> int:
    """Pairs whose expert is on this rank, at least one; the rest is spread over the other ranks."""
    return max(1, moe.pairs * moe.experts // _EXPERTS)


def candidates(kernel: str, phase: str, shape: Shape, m: int, arch: str) -> Iterable[Config]:
    """Configs worth trying; the same for both archs, whose register files and wave sizes are the same."""
    if kernel == "nl4_gemm":
        return gemm_candidates(phase, shape["N"], shape["K"], m)
    return moe_candidates(phase, moe_shape(shape, m))


def case(kernel: str, shape: Shape, m: int, config: Config, arch: str) -> KernelCase:
    """All launches of one call; experts are chosen at random (:func:`rows_of_experts`), each counted as read once."""
    notes: tuple[str, ...] = ()
    if kernel == "nl4_gemm":
        n, k = shape["N"], shape["K"]
        launches: tuple[Launch, ...] = (gemm_launch(m, n, k, config, ELEMENT, amd=True),)
        weights, memory_bytes = n * k, weight_bytes(n, k)
    else:
        moe = moe_shape(shape, m)
        active = len(rows_of_experts(moe))
        launches = _moe_launches(moe, config)
        weights = active * 3 * moe.intermediate * moe.hidden
        memory_bytes = weight_bytes(2 * moe.intermediate, moe.hidden, active)
        memory_bytes += weight_bytes(moe.hidden, moe.intermediate, active)
        if needs_sorting(moe):
            notes = (SORTING_NOTE,)
    return KernelCase(
        kernel=kernel,
        phase=str(config["phase"]),
        arch=arch,
        shape={"M": m, **shape},
        config={key: value for key, value in config.items() if isinstance(value, int)},
        launches=launches,
        weights=weights,
        memory_bytes=memory_bytes,
        notes=notes,
    )


def _moe_launches(moe: MoeShape, config: Config) -> tuple[Launch, ...]:
    owners = {"block_experts_ptr": _block_experts(moe, config)}
    return tuple(
        replace(launch, loads=owners) if owners.keys() <= launch.pointers.keys() else launch
        for launch in moe_launches(moe, config, _SWIGLU_LIMIT, ELEMENT, amd=True)
    )


def rows_of_experts(moe: MoeShape) -> tuple[int, ...]:
    """Rows of each expert that is chosen at all, when tokens choose at random: the expected numbers, rounded.

    Of n pairs spread over E experts at random, E * B(c; n, 1 / E) experts have c rows (binomial). Rounding starts at
    the fullest experts; those with one row take up what is left, so that every pair has its expert.
    """
    pairs = _local_pairs(moe)
    rows: list[int] = []
    left = pairs
    for count in range(pairs, 1, -1):
        ways = lgamma(pairs + 1) - lgamma(count + 1) - lgamma(pairs - count + 1)
        expected = moe.experts * exp(ways - count * log(moe.experts) + (pairs - count) * log1p(-1 / moe.experts))
        number = min(round(expected), left // count, moe.experts - len(rows))
        rows += [count] * number
        left -= count * number
    room = moe.experts - len(rows)
    rows += [1] * min(left, room)
    for place in range(left - min(left, room)):  # all experts are chosen: the rest goes to those with fewest rows
        rows[-1 - place % len(rows)] += 1
    return tuple(rows)


def _block_experts(moe: MoeShape, config: Config) -> tuple[int, ...]:
    """Expert of each block under :func:`rows_of_experts`; -1 for blocks not used."""
    block_m = int(config["BLOCK_M"])
    owners = [expert for expert, rows in enumerate(rows_of_experts(moe)) for _ in range(-(-rows // block_m))]
    return tuple(owners + [-1] * (block_count(moe, config) - len(owners)))


def shipped_configs(kernel: str, shape: Shape, arch: str) -> Mapping[int, Config]:
    """Configs by rows that this release uses for a shape on an arch's GPU."""
    default, keys = (GEMM_DEFAULT, GEMM_KEYS) if kernel == "nl4_gemm" else (MOE_DEFAULT, MOE_KEYS)
    return load_config(kernel, shape, DEVICE_OF_ARCH[arch], arch, default=default, keys=keys).configs


def all_cases(arch: str | None = None, kernel: str | None = None) -> Iterator[KernelCase]:
    """Every shipped case, or those of one arch or kernel."""
    for name, shapes in SHAPES.items():
        for target in ARCHS:
            if kernel not in (None, name) or arch not in (None, target):
                continue
            for shape in shapes:
                for rows, config in shipped_configs(name, shape, target).items():
                    yield case(name, shape, rows, config, target)


def runner(kernel: str, shape: Shape, m: int, config: Config) -> tuple[Callable[[], torch.Tensor], ...]:
    """The kernel's call and the reference's on this machine's GPU, on the same made-up inputs."""
    from step128_kernels.runners import gemm_runner, moe_runner

    if kernel == "nl4_gemm":
        return gemm_runner(m, shape["N"], shape["K"], config)
    return moe_runner(moe_shape(shape, m), config)

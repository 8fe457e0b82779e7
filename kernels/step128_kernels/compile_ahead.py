"""Compile, while a model is loaded, every variant of the kernels that serving it can ask for.

Triton compiles a variant at the first call that needs it. That takes seconds, and a server would spend them on the
first prompt of a size that nobody sent before, while everybody waits. So for each shape of weight the calls with all
row counts that matter are gone through at once, with ``JITFunction.warmup`` in place of the call: it compiles, and
neither launches nor allocates. The launches and their keyword arguments come from the code of the real call, and the
tensors are meta tensors, in which Triton sees what it sees in real ones: the type, an address divisible by 16, and
whether the storage is below 2 GiB. So the real call looks up the very key that was filled here.

Not compiled ahead are calls whose activations take 2 GiB or more: vLLM's chunks of a prompt are far smaller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from step128_kernels.attention.launches import update_launch
from step128_kernels.attention.limits import MOST_DECODE_TOKENS
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.attention.triton_attention import call_launches
from step128_kernels.launch import Launch, Pointer
from step128_kernels.nl4_arguments import DTYPES, ELEMENTS
from step128_kernels.nl4_gemm.configs import gemm_table
from step128_kernels.nl4_gemm.launches import gemm_launch
from step128_kernels.nl4_moe.align import LARGEST_ALIGNED_PAIRS
from step128_kernels.nl4_moe.configs import moe_config
from step128_kernels.nl4_moe.launches import Config, MoeShape, moe_launches
from step128_kernels.run_launch import run, uses_assembly

MOST_ROWS = 16384
"""Row counts looked at; what a tuned table has beyond them is compiled when it is first needed."""

# A child of vLLM's logger, which is the one that a server prints.
_log = logging.getLogger("vllm.step128.compile_ahead")
_DTYPES = DTYPES | {"i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}
_known: set[int] = set()  # compiled kernels by identity; Triton keeps them for good


@cache
def compile_linear(n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """Compile all variants of a linear layer with an ``n`` x ``k`` weight; the second time in a process does nothing.

    Args:
        n: rows of the weight, before padding.
        k: columns of the weight.
        dtype: of the activations.
        device: the GPU.

    Returns:
        Variants that the process did not have before. What fails is logged as a warning: should a call need it, the
        call raises the same.
    """

    def launches() -> Iterator[Launch]:
        config_of = gemm_table(n, k, device).nearest
        element, amd = _kind(dtype, device)
        for rows in _row_counts(config_of):
            yield gemm_launch(rows, n, k, config_of(rows), element, amd)

    return _compile(f"nl4_gemm N={n} K={k} {dtype}", launches())


@cache
def compile_experts(shape: MoeShape, limit: float | None, dtype: torch.dtype, device: torch.device) -> int:
    """Compile all variants of a layer of routed experts.

    Args:
        shape: of the layer; its ``tokens`` do not matter.
        limit: the layer's clamp, or None.
        dtype: as in :func:`compile_linear`.
        device: as in :func:`compile_linear`.

    Returns:
        As :func:`compile_linear`.
    """

    def config_of(rows: int) -> Config:
        return moe_config(replace(shape, tokens=rows), device)

    def launches() -> Iterator[Launch]:
        element, amd = _kind(dtype, device)
        for rows in _row_counts(config_of):
            yield from moe_launches(replace(shape, tokens=rows), config_of(rows), limit, element, amd)

    sizes = f"E={shape.experts} N={shape.intermediate} K={shape.hidden} top_k={shape.top_k}"
    return _compile(f"nl4_moe {sizes} limit={limit} {dtype}", launches())


@cache
def compile_attention(
    shape: AttentionShape,
    most_sequences: int,
    query_tokens: tuple[int, ...],
    most_context_tokens: int,
    device: torch.device,
) -> int:
    """Compile all variants of attention with one kind of layer, a prefill's among them.

    Args:
        shape: of the layer.
        most_sequences: of a batch.
        query_tokens: of a sequence, in decodes and verifications.
        most_context_tokens: of a sequence.
        device: as in :func:`compile_linear`.

    Returns:
        As :func:`compile_linear`.
    """

    def launches() -> Iterator[Launch]:
        for sequences in {*(1 << power for power in range(most_sequences.bit_length())), most_sequences}:
            for tokens in (*query_tokens, MOST_DECODE_TOKENS + 1):
                for context in (1 << power for power in range((most_context_tokens - 1).bit_length() + 1)):
                    yield from call_launches(AttentionCall(shape, sequences, tokens, max(context, tokens)), device)
        yield update_launch(1, shape)

    return _compile(f"attention {shape}", launches())


def _kind(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """The activations' element type as launches spell it, and whether AMD's assembly is for them."""
    return ELEMENTS[dtype], uses_assembly(torch.empty(0, dtype=dtype, device=device))


def _row_counts(config_of: Callable[[int], Config]) -> list[int]:
    """Row counts that need all variants between them: the first with each config, and all that may be aligned."""
    counts = list(range(1, LARGEST_ALIGNED_PAIRS + 1))
    config = config_of(counts[-1])
    for rows in range(counts[-1] + 1, MOST_ROWS + 1):
        if config_of(rows) != config:
            config = config_of(rows)
            counts.append(rows)
    return counts


def _compile(what: str, launches: Iterator[Launch]) -> int:
    start, before = time.monotonic(), len(_known)
    failed: set[object] = set()
    try:
        for launch in launches:
            options = launch.num_warps, launch.num_stages, launch.waves_per_eu
            variant = launch.name, *launch.constants.items(), *options
            if variant not in failed:  # else every row count would wait for the same failure
                try:
                    _compile_one(launch)
                except Exception as error:  # Triton and LLVM raise a dozen types; serving goes on after each
                    failed.add(variant)
                    _warn(f"{launch.name} of {what}", error)
    except Exception as error:  # of the tuned table; the first call will raise it
        _warn(what, error)
    found = len(_known) - before
    if found:
        seconds = time.monotonic() - start
        _log.info("step128: %d kernel variants for %s compiled ahead in %.1f s", found, what, seconds)
    return found


def _warn(what: str, error: Exception) -> None:
    _log.warning(
        "step128: %s could not be compiled ahead (%s: %s). Serving goes on; a request that needs it will try again.",
        what,
        type(error).__name__,
        error,
    )


class _CompileOnly:
    """Takes a ``triton.JITFunction``'s place in a launch."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return partial(self._warm_up, grid)

    def _warm_up(self, grid: tuple[int, int, int], **arguments: Any) -> None:
        kernel = self._function.warmup(grid=grid, **arguments)
        if kernel is not None:  # a hook of Triton's may have refused
            _known.add(id(kernel))


def _compile_one(launch: Launch) -> None:
    tensors = {name: _without_memory(pointer) for name, pointer in launch.pointers.items()}
    run(replace(launch, function=_CompileOnly(launch.function)), tensors)


def _without_memory(pointer: Pointer) -> torch.Tensor:
    """A tensor of a pointer's type and size, at address 0 of no device."""
    dtype = _DTYPES[pointer.dtype]
    return torch.empty(pointer.size_bytes // dtype.itemsize, dtype=dtype, device="meta")

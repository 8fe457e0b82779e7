"""Every attention layer x KV-cache dtype x context that we ship configs for, as cases to compile, count and tune.

The layers are those of Step-3.7-Flash under tensor parallelism 1, 2, 4 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from step128_kernels.attention.configs import (
    CONTEXTS,
    DEFAULT,
    KERNELS,
    KEYS,
    attention_candidates,
    batch_of,
    shape_of,
)
from step128_kernels.attention.launches import decode_launches, prefill_launches, target_of
from step128_kernels.attention.limits import MOST_DECODE_TOKENS
from step128_kernels.attention.shape import AttentionCall
from step128_kernels.launch import KernelCase, Launch
from step128_kernels.tuned.load import Config, load_config
from step128_kernels.tuned.names import DEVICE_OF_ARCH

Shape = Mapping[str, int]

ARCHS = ("gfx1201", "gfx1151")
_HEAD_DIM, _KV_HEADS, _FULL_HEADS, _SLIDING_HEADS, _WINDOW = 128, 8, 64, 96, 512
_TENSOR_PARALLEL = (1, 2, 4, 8)
_DEEP = 8192
"""Context that sliding layers are counted at: deep enough that the window starts within a page."""
_PREFILL_CONTEXT = 4096
"""Most of the context that a chunk of a prompt is counted with: more of it repeats the same loop."""
DATA_NOTE = "all sequences of the batch are taken to be as long as the longest"


def _layers() -> Iterator[Shape]:
    for ranks in _TENSOR_PARALLEL:
        for heads, window, contexts in ((_FULL_HEADS, 0, CONTEXTS), (_SLIDING_HEADS, _WINDOW, (_WINDOW,))):
            for context in contexts:
                dims = {"Hq": heads // ranks, "Hkv": _KV_HEADS // ranks, "D": _HEAD_DIM}
                yield dims | {"W": window, "C": context}


SHAPES: dict[str, tuple[Shape, ...]] = {kernel: tuple(_layers()) for kernel in KERNELS.values()}


def candidates(kernel: str, phase: str, shape: Shape, m: int, arch: str) -> Iterable[Config]:
    """Configs worth trying."""
    return attention_candidates(phase, shape, m, arch)


def case(kernel: str, shape: Shape, m: int, config: Config, arch: str) -> KernelCase:
    """All launches of one call with ``m`` query tokens in the batch (:func:`.configs.batch_of`)."""
    return call_case(_call(kernel, shape, m), config, arch)


def _call(kernel: str, shape: Shape, m: int) -> AttentionCall:
    sequences, query_tokens = batch_of(m)
    context = _DEEP if shape["W"] else shape["C"]
    if query_tokens > MOST_DECODE_TOKENS:
        context = max(query_tokens, min(context, _PREFILL_CONTEXT))
    return AttentionCall(shape_of(shape, kernel), sequences, query_tokens, context)


def call_case(call: AttentionCall, config: Config, arch: str) -> KernelCase:
    """All launches of any call with a config, with the lengths that their loops depend on."""
    shape = call.shape
    make = prefill_launches if config["phase"] == "prefill" else decode_launches
    return KernelCase(
        kernel=KERNELS.get(shape.kv_dtype, KERNELS["bf16"]),
        phase=str(config["phase"]),
        arch=arch,
        shape={
            "q_len": call.query_tokens,
            "batch": call.sequences,
            "context": call.context_tokens,
            "Hq": shape.heads,
            "Hkv": shape.kv_heads,
            "D": shape.head_dim,
            "W": shape.window,
        },
        config={key: value for key, value in config.items() if isinstance(value, int)},
        launches=tuple(_with_lengths(launch, call) for launch in make(call, config, target_of(arch))),
        weights=call.kv_bytes,
        memory_bytes=call.kv_bytes,
        notes=(DATA_NOTE,),
        unit="KV byte",
    )


def _with_lengths(launch: Launch, call: AttentionCall) -> Launch:
    starts = tuple(call.query_tokens * i for i in range(call.sequences + 1))
    loads: dict[str, int | tuple[int, ...]] = {"lengths_ptr": call.context_tokens, "starts_ptr": starts, "table_ptr": 0}
    return replace(launch, loads={name: found for name, found in loads.items() if name in launch.pointers})


def shipped_configs(kernel: str, shape: Shape, arch: str) -> Mapping[int, Config]:
    """Configs by query tokens of the batch that this release uses for a layer on an arch's GPU."""
    return load_config(kernel, shape, DEVICE_OF_ARCH[arch], arch, default=DEFAULT, keys=KEYS).configs


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
    from step128_kernels.attention.runner import attention_runner

    return attention_runner(_call(kernel, shape, m), config)

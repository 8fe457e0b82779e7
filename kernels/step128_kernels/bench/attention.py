"""Paged attention as the benchmark measures it: layers x contexts x query tokens x batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from step128_kernels.attention.cases import SHAPES
from step128_kernels.attention.configs import CONTEXTS, KERNELS, PAGE, choose, shape_of
from step128_kernels.attention.runner import ROUNDINGS, attention_runner
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.bench.families import Place, Run, Vllm
from step128_kernels.bench.measure import Load, Task
from step128_kernels.nl4_arguments import ELEMENTS
from step128_kernels.tune.options import UsageError
from step128_kernels.tuned.load import Config

UNIT = "KV byte"
"""What attention's loads and speed-ups are counted by; both sides read the same bytes."""
_LAYER = ("Hq", "Hkv", "D", "W")
_SLIDING_CONTEXT = 8192
"""What sliding layers are measured at unless a context is given: they read no more of a longer one."""

LAYERS: Mapping[str, Sequence[Mapping[str, int]]] = {
    kernel: tuple({tuple(shape[name] for name in _LAYER): {n: shape[n] for n in _LAYER} for shape in shapes}.values())
    for kernel, shapes in SHAPES.items()
}
"""The model's layers, by kernel; context, query tokens and batch make tasks of them."""


@dataclass(frozen=True)
class Batches:
    """What layers are measured with; no contexts: those that are tuned for."""

    contexts: Sequence[int] = ()
    query_tokens: Sequence[int] = (1, 4)
    sequences: Sequence[int] = (1, 8)


def is_attention(kernel: str) -> bool:
    """Whether a kernel is one of attention's."""
    return kernel in LAYERS


def attention_tasks(kernel: str, layer: Mapping[str, int], batches: Batches) -> Iterator[Task]:
    """All tasks of a layer; ``m`` is the batch's query tokens.

    Raises:
        UsageError: more query tokens than context.
    """
    contexts = batches.contexts or (CONTEXTS if layer["W"] == 0 else (_SLIDING_CONTEXT,))
    for context in contexts:
        for sequences in batches.sequences:
            for query_tokens in batches.query_tokens:
                if query_tokens > context:
                    raise UsageError(f"--q-len {query_tokens} is more than --context {context}, which includes it.")
                sizes = {"context": context, "batch": sequences, "q_len": query_tokens}
                yield Task(kernel, {name: layer[name] for name in _LAYER} | sizes, sequences * query_tokens)


def call_of(task: Task, dtype: torch.dtype, page: int = PAGE) -> AttentionCall:
    """What a task asks for.

    Args:
        task: one of :func:`attention_tasks`.
        dtype: bfloat16 or float16, of queries, and of a cache that is not FP8.
        page: tokens of a page.
    """
    sizes, element = task.shape, ELEMENTS[dtype]
    kv_dtype = "fp8" if task.kernel == KERNELS["fp8"] else element
    tuned = shape_of(sizes, task.kernel, page)
    shape = AttentionShape(tuned.heads, tuned.kv_heads, tuned.head_dim, tuned.window, page, kv_dtype, element)
    return AttentionCall(shape, sizes["batch"], sizes["q_len"], sizes["context"])


class Attention:
    """See :class:`step128_kernels.bench.families.Family`."""

    def config(self, task: Task, place: Place) -> Config:
        """By context bucket and query tokens."""
        call = call_of(task, place.dtype)
        device = torch.device(place.device)
        return choose(call.shape, call.sequences, call.query_tokens, call.context_tokens, device)

    def load(self, task: Task, config: Config, place: Place) -> Load:
        """K and V of the keys that are seen."""
        call = call_of(task, place.dtype)
        size = call.kv_bytes
        return Load(size, size, UNIT)

    def ours(self, task: Task, config: Config, place: Place) -> Run:
        """On a made-up cache."""
        return attention_runner(call_of(task, place.dtype), config, place.device)

    def terms(self, task: Task) -> int:
        """Keys of a sequence."""
        return task.shape["context"]

    def roundings(self, task: Task) -> int:
        """Queries or keys, probabilities, output."""
        return ROUNDINGS

    def rivals(self, task: Task, vllm: Vllm, place: Place) -> tuple[str, ...]:
        """TRITON_ATTN's kernel, and ROCM_SEGMENTED_ATTN's where it serves the call."""
        return tuple(vllm.attention_runs.opponents_here(call_of(task, place.dtype), place.device))

    def rival_load(self, name: str, task: Task, vllm: Vllm, place: Place) -> Load:
        """The same bytes as ours."""
        return self.load(task, {}, place)

    def rival(self, name: str, task: Task, vllm: Vllm, place: Place) -> Run:
        """On the same keys and values, in vLLM's order."""
        call = call_of(task, place.dtype)
        run: Run = vllm.attention_runs.attention_baseline_runner(name, call, place.device)
        return run

    def rival_roundings(self, task: Task, vllm: Vllm) -> int:
        """As ours."""
        return ROUNDINGS

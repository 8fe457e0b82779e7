"""What a benchmark measures: kernels x shapes x rows, and of attention layers x contexts x query tokens x batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from step128_kernels.bench.attention import LAYERS, Batches, attention_tasks, is_attention
from step128_kernels.bench.measure import Task
from step128_kernels.cases import SHAPES
from step128_kernels.command_options import check_kernels
from step128_kernels.tune.options import UsageError, check_shape

_USUAL = Batches()


def select_tasks(
    kernels: Sequence[str] | None,
    shapes: Sequence[Mapping[str, int]] | None,
    rows: Sequence[int],
    batches: Batches = _USUAL,
) -> list[Task]:
    """What to measure, a shape's tasks side by side so that its weights are made once.

    Args:
        kernels: those wanted; None for all.
        shapes: those wanted, of one kernel; None for all that are shipped.
        rows: activation rows wanted, of kernels other than attention's.
        batches: those of attention's.

    Raises:
        NoSuchKernelError: a kernel is not known.
        UsageError: a shape lacks a dimension, belongs to no single kernel, or is that of no layer.
    """
    shipped = {**SHAPES, **LAYERS}
    chosen = list(dict.fromkeys(kernels or shipped))
    check_kernels(chosen, shipped)
    if shapes:
        chosen = [name for name in chosen if all(shape.keys() == shipped[name][0].keys() for shape in shapes)]
    if not chosen:
        known = "; ".join(f"{name}: {','.join(f'{key}=…' for key in all_[0])}" for name, all_ in shipped.items())
        raise UsageError(f"--shape fits no kernel; their dimensions are {known}")
    for name in chosen:
        for shape in shapes or ():
            check_shape(name, shape)
    return [
        task
        for name in chosen
        for shape in shapes or shipped[name]
        for task in (
            attention_tasks(name, shape, batches) if is_attention(name) else (Task(name, shape, m) for m in rows)
        )
    ]

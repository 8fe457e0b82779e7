"""Runs a Gluon kernel's own source in Triton's interpreter, with its layouts erased.

A layout says which lane and register holds an element, never which value it has: so the same statements on whole
arrays give what the kernel computes. What is left out is exactly what layouts decide: whether an operand is where WMMA
expects it, which Triton's compiler checks, and the order of waves around barriers.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle


def _whole(value: Any) -> int:
    return int(value.value if isinstance(value, tl.constexpr) else value)


def _shape(shape: Any) -> list[int]:
    return [_whole(size) for size in shape]


def _tensor(data: np.ndarray, dtype: Any) -> tl.tensor:
    return tl.tensor(TensorHandle(np.ascontiguousarray(data), dtype), tl.block_type(dtype, list(data.shape)))


def _wmma(a: Any, b: Any, total: Any) -> Any:
    return tl.dot(a, b, total, input_precision="ieee")


def _slice(x: Any, shape: Any, offsets: Any) -> Any:
    where = tuple(slice(start, start + size) for start, size in zip(_shape(offsets), _shape(shape), strict=True))
    return _tensor(x.handle.data[where], x.dtype)


class _Shared:
    """LDS: poisoned until something is stored."""

    def __init__(self, dtype: Any, shape: Any, where: Any = None, data: np.ndarray | None = None) -> None:
        self.dtype = dtype
        kind = np.uint16 if dtype == tl.bfloat16 else np.float16
        self._data = np.full(_shape(shape), 0x7FFF, np.uint16).view(kind) if data is None else data

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    def store(self, x: Any) -> None:
        assert x.dtype == self.dtype and x.handle.data.shape == self._data.shape
        self._data[...] = x.handle.data.view(self._data.dtype)

    def load(self, layout: Any) -> Any:
        return _tensor(self._data.copy(), self.dtype)

    def slice(self, start: Any, length: Any, dim: int) -> _Shared:
        where = [slice(None)] * self._data.ndim
        where[dim] = slice(_whole(start), _whole(start) + _whole(length))
        return _Shared(self.dtype, None, data=self._data[tuple(where)])


def _nothing(*arguments: Any, **keywords: Any) -> None:
    return None


class _Namespace:
    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)


class _Language(_Namespace):
    """Stands for ``triton.experimental.gluon.language``; what it does not name is Triton's own of that name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)


_LANGUAGE = _Language(
    arange=lambda start, end, layout=None: tl.arange(_whole(start), _whole(end)),
    zeros=lambda shape, dtype, layout=None: tl.zeros(_shape(shape), dtype),
    full=lambda shape, value, dtype, layout=None: tl.full(_shape(shape), value, dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    SliceLayout=_nothing,
    DotOperandLayout=_nothing,
    BlockedLayout=_nothing,
    SwizzledSharedLayout=_nothing,
    allocate_shared_memory=lambda dtype, shape, layout: _Shared(dtype, shape),
    barrier=_nothing,
    amd=_Namespace(
        AMDWMMALayout=_nothing,
        rdna3=_Namespace(wmma=_wmma),
        rdna4=_Namespace(wmma=_wmma),
        hint=_Namespace(sched_barrier=_nothing),
        slice=_slice,
    ),
)


def interpreted(kernel: GluonJITFunction[Any], _made: dict[Any, Any] | None = None) -> InterpretedFunction[Any]:
    """The kernel, and every Gluon function that it calls, for Triton's interpreter.

    Launch it as any kernel: ``interpreted(kernel)[grid](...)``, with tensors on the CPU. Types must answer to
    ``.layout``: see the fixture ``erased_layouts``.
    """
    made: dict[Any, Any] = {} if _made is None else _made
    if kernel not in made:
        function: FunctionType = kernel.fn
        linked = {**function.__globals__, "tl": tl, "gl": _LANGUAGE}
        copy = FunctionType(function.__code__, linked, function.__name__, function.__defaults__)
        copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
        copy.__annotations__ = {
            name: tl.constexpr for name, mark in function.__annotations__.items() if "constexpr" in str(mark)
        }
        made[kernel] = InterpretedFunction(copy)
        for name, value in function.__globals__.items():
            if isinstance(value, GluonJITFunction):
                linked[name] = interpreted(value, made)
            elif isinstance(value, tl.constexpr):
                linked[name] = value.value
    return made[kernel]


__all__ = ["interpreted", "interpreter"]

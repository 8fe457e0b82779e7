"""These tests run Triton's interpreter, which must be chosen before Triton is imported: see ../test_interpreter.py."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules that the tests here share
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


class _Results:
    """What an inline assembly operation gives, in the interpreter's terms."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


def _operands(array: np.ndarray, pack: int) -> list[np.ndarray]:
    """The registers of one tensor for blocks of ``pack`` elements: 16-bit values two a word, others one each."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.itemsize == 2:
        assert pack == 2, "16-bit operands come two a word"
        return [flat.view(np.uint32)]
    assert flat.itemsize == 4
    return [np.ascontiguousarray(flat[i::pack]).view(np.uint32) for i in range(pack)]


def _result(registers: list[np.ndarray], kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor from the registers of its blocks, elements in the order in which :func:`_operands` took them."""
    return np.stack(registers, axis=1).reshape(-1).view(kind).reshape(shape)


@pytest.fixture
def amd_assembly(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let the interpreter execute AMD's inline assembly; returns how often each instruction was executed.

    Registers are those of Triton's lowering: for every result, then for every argument, one for each of ``pack``
    elements, or one for two of them that have 16 bits.
    """
    import triton.language as tl
    from isa import AsmBlock
    from triton.runtime import interpreter

    executed: dict[str, int] = {}
    kinds = {tl.float32: np.float32, tl.int32: np.int32, tl.float16: np.float16, tl.int16: np.int16, tl.int64: np.int64}

    def create_inline_asm(
        builder: Any, text: str, constraints: str, values: list[Any], types: Any, pure: bool, pack: int
    ) -> _Results:
        block = AsmBlock(text, constraints)
        for instruction in block.program:
            executed[instruction.name] = executed.get(instruction.name, 0) + 1
        shape = np.broadcast_shapes(*(value.data.shape for value in values))
        arguments = [np.broadcast_to(value.data, shape) for value in values]
        registers = list(block.run(*(word for array in arguments for word in _operands(array, pack))))
        results = []
        for dtype in (kind.scalar for kind in types):
            count = 1 if dtype.primitive_bitwidth == 16 else pack
            mine, registers = registers[:count], registers[count:]
            results.append(interpreter.TensorHandle(_result(mine, kinds[dtype], shape), dtype))
        assert not registers
        return _Results(results)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return executed


@pytest.fixture
def bfloat16_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies the bits of bfloat16 as integers; here they are widened first."""
    import triton.language as tl
    from triton.runtime import interpreter

    def create_dot(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        left, right = (
            (x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            if x.dtype.scalar == tl.bfloat16
            else x.data.astype(np.float32)
            for x in (a, b)
        )
        return interpreter.TensorHandle(np.matmul(left, right) + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def erased_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of the interpreter answer to ``.layout``, as Gluon's do: with nothing (see gluon_interpreter.py)."""
    import triton.language as tl

    monkeypatch.setattr(tl.core.block_type, "layout", None, raising=False)


@pytest.fixture
def quantized() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes an NL4 weight of a shape: packed and scale as a checkpoint holds them."""
    from step128_kernels import codebook

    def make(*shape: int, seed: int = 0, size: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
        weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(size)
        packed, scale = codebook.quantize(weight, scale_search="absmax")
        return torch.from_numpy(packed), torch.from_numpy(scale)

    return make

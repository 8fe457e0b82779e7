"""These tests run Triton's interpreter, which must be chosen before Triton is imported: see ../test_interpreter.py."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


class _Results:
    """What an inline assembly operation gives, in the interpreter's terms."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


@pytest.fixture
def amd_assembly(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let the interpreter execute AMD's inline assembly; returns how often each instruction was executed."""
    import triton.language as tl
    from isa import AsmBlock
    from triton.runtime import interpreter

    executed: dict[str, int] = {}

    def create_inline_asm(
        builder: Any, text: str, constraints: str, values: list[Any], types: Any, pure: bool, pack: int
    ) -> _Results:
        assert pack == 1
        block = AsmBlock(text, constraints)
        for instruction in block.program:
            executed[instruction.name] = executed.get(instruction.name, 0) + 1
        arrays = [np.ascontiguousarray(value.data).view(np.uint32) for value in values]
        # The last operand's type is the result's in every block that we ship: selectors and sums.
        dtype = values[-1].dtype.scalar
        kind = np.float32 if dtype == tl.float32 else np.int32
        return _Results([interpreter.TensorHandle(out.view(kind), dtype) for out in block.run(*arrays)])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return executed


@pytest.fixture
def quantized() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes an NL4 weight of a shape: packed and scale as a checkpoint holds them."""
    from step128_kernels import codebook

    def make(*shape: int, seed: int = 0, size: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
        weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(size)
        packed, scale = codebook.quantize(weight, scale_search="absmax")
        return torch.from_numpy(packed), torch.from_numpy(scale)

    return make

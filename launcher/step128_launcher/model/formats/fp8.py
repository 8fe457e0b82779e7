"""`quant_method: fp8`: float8 values with a scale for each block, each row, or the whole weight.

Source: vllm/model_executor/layers/quantization/fp8.py. With `weight_block_size` [rows, columns] the scales are
`weight_scale_inv`, else `weight_scale`; `input_scale` is there for static activation scales only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from step128_launcher.model.formats.fields import Fields
from step128_launcher.model.formats.forms import SCALE_DTYPES, Form, TensorMaker
from step128_launcher.model.model_weights import Weight
from step128_launcher.model.tensors import ExpectedTensor

FLOAT8 = frozenset({"F8_E4M3"})


@dataclass(frozen=True)
class Fp8:
    """`block` is [rows, columns] of one scale, None for a scale a row or a weight."""

    block: tuple[int, int] | None
    method: str = "fp8"

    @property
    def label(self) -> str:
        """Say what has a scale."""
        return f"{self.block[0]}x{self.block[1]} blocks" if self.block else "a scale a row or weight"

    @property
    def group_size(self) -> int | None:
        """Columns of a block."""
        return self.block[1] if self.block else None

    def forms(self, weight: Weight) -> Iterator[Form]:
        """Yield float8 values with each spelling of their scales."""
        make = TensorMaker(weight)
        values = make.values("weight", (make.rows, make.columns), FLOAT8)
        inputs = make.single("input_scale", SCALE_DTYPES)
        scales = [block_scale(make, "weight_scale_inv", self.block)] if self.block else scales_without_blocks(make)
        for scale in scales:
            yield Form((values, in_float32(scale)), tuple(map(in_float32, inputs)))


def read_fp8(fields: Fields) -> Fp8:
    """Read a quantization_config of this method."""
    block = fields.optional("weight_block_size")
    return Fp8(None if block is None else block_size(fields, "weight_block_size", block))


def in_float32(scale: ExpectedTensor) -> ExpectedTensor:
    """Return the scale of 8-bit values as vLLM holds it (ChannelQuant-, BlockQuant-, PerTensorScaleParameter)."""
    return replace(scale, float32_in_memory=True)


def block_size(fields: Fields, key: str, value: Any) -> tuple[int, int]:
    """Check [rows, columns] of a block."""
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value)):
        raise fields.bad(key, value, "two whole numbers, [rows, columns]")
    return value[0], value[1]


def block_scale(make: TensorMaker, suffix: str, block: tuple[int, int]) -> ExpectedTensor:
    """Return the scales of blocks; the last block of an axis may be smaller."""
    return make.extra(suffix, (-(-make.rows // block[0]), -(-make.columns // block[1])), SCALE_DTYPES)


def scales_without_blocks(make: TensorMaker) -> list[ExpectedTensor]:
    """Return the spellings of `weight_scale`: a value a row, [N, 1] or [N], or one for the weight."""
    row = make.extra("weight_scale", (make.rows, 1), SCALE_DTYPES)
    return [row, make.row_vector("weight_scale", SCALE_DTYPES), *make.single("weight_scale", SCALE_DTYPES)]

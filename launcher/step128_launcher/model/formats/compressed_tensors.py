"""`quant_method: compressed-tensors`: several packings, chosen by `format` and described by `config_groups`.

Source: vllm/model_executor/layers/quantization/compressed_tensors/schemes/ (wNa16, w8a8_fp8, w8a8_int8, w4a4_nvfp4).
Each group of modules has a scheme; a weight may be stored in any of them, or unquantized (the `ignore` list).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from step128_launcher.model.formats.fields import Fields
from step128_launcher.model.formats.forms import INT32, SCALE_DTYPES, Form, TensorMaker
from step128_launcher.model.formats.fp8 import FLOAT8, block_scale, block_size, in_float32, scales_without_blocks
from step128_launcher.model.model_weights import Cut, Weight
from step128_launcher.model.tensors import ExpectedTensor

_PACKED, _FLOAT, _INT, _NVFP4 = "pack-quantized", "float-quantized", "int-quantized", "nvfp4-pack-quantized"
_FORMATS = (_PACKED, _FLOAT, _INT, _NVFP4)
_INDEX_DTYPES = frozenset({"I32", "I64"})
_NVFP4_GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """How the modules of one config group are packed; `group_size` None: a scale a row, a block, or a weight."""

    format: str
    bits: int
    group_size: int | None
    block: tuple[int, int] | None

    def forms(self, weight: Weight) -> Iterator[Form]:
        """Yield this scheme's forms of a weight."""
        make = TensorMaker(weight)
        if self.group_size and make.columns % self.group_size:
            return
        if self.format == _PACKED:
            yield from self._packed(make)
        elif self.format == _NVFP4:
            yield from self._nvfp4(make)
        else:
            dtypes = FLOAT8 if self.format == _FLOAT else frozenset({"I8"})
            values = make.values("weight", (make.rows, make.columns), dtypes)
            inputs = tuple(map(in_float32, make.single("input_scale", SCALE_DTYPES)))
            for scale in self._scales(make):
                yield Form((values, in_float32(scale)), inputs)

    def _packed(self, make: TensorMaker) -> Iterator[Form]:
        per_int32 = 32 // self.bits
        values = make.values("weight_packed", (make.rows, -(-make.columns // per_int32)), INT32)
        shape = make.weight.shape
        sizes = ExpectedTensor(
            f"{make.prefix}weight_shape", (len(shape),), _INDEX_DTYPES, make.weight.component, 0, Cut.WHOLE, "scale"
        )
        groups = make.columns // self.group_size if self.group_size else 1
        zeros = make.extra("weight_zero_point", (-(-make.rows // per_int32), groups), INT32)
        order = make.column_vector("weight_g_idx", INT32)
        for scale in self._scales(make):
            yield Form((values, scale, sizes), (zeros, order))

    def _nvfp4(self, make: TensorMaker) -> Iterator[Form]:
        if make.columns % _NVFP4_GROUP:
            return
        values = make.values("weight_packed", (make.rows, make.columns // 2), frozenset({"U8"}))
        scale = make.extra("weight_scale", (make.rows, make.columns // _NVFP4_GROUP), FLOAT8)
        for whole in make.single("weight_global_scale", SCALE_DTYPES):
            yield Form((values, scale, whole), make.single("input_global_scale", SCALE_DTYPES))

    def _scales(self, make: TensorMaker) -> list[ExpectedTensor]:
        if self.block:
            return [block_scale(make, "weight_scale", self.block)]
        if self.group_size:
            return [make.extra("weight_scale", (make.rows, make.columns // self.group_size), SCALE_DTYPES)]
        return scales_without_blocks(make)


@dataclass(frozen=True)
class CompressedTensors:
    """The schemes of all config groups."""

    schemes: tuple[Scheme, ...]
    method: str = "compressed-tensors"

    @property
    def label(self) -> str:
        """Name the formats."""
        return ", ".join(dict.fromkeys(scheme.format for scheme in self.schemes))

    @property
    def group_size(self) -> int | None:
        """Return the common multiple of all schemes' groups and blocks."""
        sizes = [scheme.block[1] if scheme.block else scheme.group_size for scheme in self.schemes]
        return math.lcm(*(size for size in sizes if size)) if any(sizes) else None

    def forms(self, weight: Weight) -> Iterator[Form]:
        """Yield the forms of every scheme."""
        for scheme in self.schemes:
            yield from scheme.forms(weight)


def read_compressed_tensors(fields: Fields) -> CompressedTensors:
    """Read a quantization_config of this method."""
    groups = fields.inner("config_groups")
    if not groups.section:
        raise fields.bad("config_groups", {}, "at least one group")
    overall = fields.optional("format")
    return CompressedTensors(tuple(_scheme(groups.inner(name), overall) for name in groups.section))


def _scheme(group: Fields, overall: object) -> Scheme:
    weights = group.inner("weights")
    packing = group.choice("format", *_FORMATS, default=overall)
    bits = weights.choice("num_bits", *((4, 8) if packing == _PACKED else (4,) if packing == _NVFP4 else (8,)))
    strategy = weights.choice("strategy", "tensor", "channel", "group", "block", "tensor_group")
    block = weights.optional("block_structure") if strategy == "block" else None
    return Scheme(
        format=packing,
        bits=bits,
        group_size=weights.group_size("group_size") if strategy in ("group", "tensor_group") else None,
        block=block_size(weights, "block_structure", block) if strategy == "block" else None,
    )

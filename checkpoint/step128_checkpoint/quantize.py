"""Quantizes a checkpoint to NL4: chosen weights become ``<name>_packed`` and ``<name>_scale``, the rest is carried.

A piece of work is a block of rows of one matrix (one expert's, for 3-D weights), about a million weights, so memory
does not depend on the checkpoint's size; GPTQ holds a few square matrices of the widest layer besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.conversion import DEFAULT_MAX_SHARD_BYTES, Conversion, copy_step
from step128_checkpoint.dtypes import BYTES_PER_ELEMENT, to_float32
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.kv_scales import KV_SCALE
from step128_checkpoint.kv_scaling import KEEP_KV_SCALES, KvScalePlan
from step128_checkpoint.layout import OutputTensor
from step128_checkpoint.plain import require_plain
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX, Policy
from step128_checkpoint.quantization import engine
from step128_checkpoint.quantization.hessians import KEPT_BYTES, MATRICES_IN_MEMORY, Hessians
from step128_checkpoint.quantization.importance import Importance
from step128_checkpoint.quantization.quality import ErrorSums
from step128_checkpoint.quantization.report import REPORT_NAME, report_json, tensor_qualities
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.shards import Step
from step128_kernels import codebook

Method = Literal["absmax", "mse", "importance", "gptq"]
METHODS: tuple[Method, ...] = ("importance", "gptq", "mse", "absmax")
"""The default first. ``importance``: signed scale search weighted by E[x^2]; ``gptq``: error feedback besides."""

_PIECE_WEIGHTS = 1 << 20
_PIECE_MEMORY_BYTES = 32 << 20  # measured with numpy's search, the hungrier engine: 25 MB for a million weights


@dataclass(frozen=True)
class Weighting:
    """What calibration says about the inputs; ``sha256`` names it in the product. GPTQ needs ``hessians``."""

    importance: Importance | None = None
    hessians: Hessians | None = None
    sha256: str | None = None


def plan_quantization(
    checkpoint: Checkpoint,
    policy: Policy,
    method: Method = "mse",
    weighting: Weighting | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    device: str = "cpu",
    kv_plan: KvScalePlan = KEEP_KV_SCALES,
) -> Conversion:
    """Decide, from headers alone, what becomes of every tensor.

    Args:
        checkpoint: bf16, fp16 or fp32.
        policy: what to quantize.
        method: how; ``importance`` and ``gptq`` need ``weighting``.
        weighting: from a calibration of this checkpoint.
        max_shard_bytes: most bytes of one file.
        device: where scales are searched: ``cpu``, or what torch calls a GPU.
        kv_plan: whether the input's KV scales are carried, replaced, or left out.

    Raises:
        CheckpointError: the input is quantized already, contradicts its config.json (a tensor is missing, unknown or of
            a wrong shape or type), or K is no multiple of 16. Names the tensor.
    """
    require_plain(checkpoint)
    layers = checkpoint.num_hidden_layers
    quantizer = _Quantizer(checkpoint, method, weighting or Weighting(), device)
    steps: list[Step] = []
    found: set[str] = set()
    for tensor in checkpoint.tensors.values():
        component = policy.component_of(tensor.name, layers)
        found |= {component} if component else set()
        if component in policy.components:
            steps.append(quantizer.step(tensor))
        elif kv_plan.source == "input" or not KV_SCALE.fullmatch(tensor.name):
            steps.append(copy_step(checkpoint, tensor))
    present = [component for component in policy.components if component in found]
    entry = {
        "quant_method": codebook.FORMAT_NAME,
        "format_version": codebook.FORMAT_VERSION,
        "group_size": codebook.GROUP_SIZE,
        "bits_per_weight": codebook.BITS_PER_WEIGHT,
        "codebook": list(codebook.CODEBOOK),
        "scale_dtype": "float16",
        "policy": policy.name,
        "quantized_components": present,
        "unquantized_components": [name for name in policy.patterns if name in found and name not in present],
        "method": method,
        "calibration": quantizer.weighting.sha256,
    }
    options = {"command": "quantize", **{key: entry[key] for key in ("policy", "method", "calibration")}}
    options |= {"quantized_components": present, **kv_plan.options()}
    if device != "cpu":
        options["device"] = device

    def report(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
        rows = tensor_qualities(notes, lambda name: policy.component_of(name, layers))
        return {REPORT_NAME: report_json(rows, options, kv_plan.report)}

    return Conversion(
        checkpoint,
        [*steps, *kv_plan.steps()],
        checkpoint.config | {"quantization_config": entry},
        options,
        max_shard_bytes,
        report=report,
    )


@dataclass(frozen=True)
class _Quantizer:
    """Makes the step that quantizes one weight."""

    checkpoint: Checkpoint
    method: Method
    weighting: Weighting
    device: str

    def step(self, tensor: TensorInfo) -> Step:
        rows, columns = tensor.shape[-2:]
        if columns % codebook.GROUP_SIZE:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}: its last dimension, {columns}, "
                f"must be a multiple of {codebook.GROUP_SIZE} to be quantized. Choose a policy that leaves it out."
            )
        blocks = _Blocks(tensor, rows, columns, max(1, min(rows, _PIECE_WEIGHTS // columns)))
        feedback = self.method == "gptq" and self.weighting.hessians is not None and self.weighting.hessians.has(tensor)
        sums: dict[int, ErrorSums] = {}

        def produce(number: int) -> tuple[NDArray[np.generic], ...]:
            matrix, first, count = blocks.of_piece(number)
            data = self.checkpoint.read(tensor.name, blocks.offset_bytes(matrix, first), blocks.size_bytes(count))
            weight = to_float32(data, tensor.dtype, (count, columns))
            importance = self.weighting.importance.of_matrix(tensor, matrix) if self.weighting.importance else None
            try:
                packed, scale = self._quantize(tensor, matrix, weight, importance, feedback)
            except ValueError as error:
                where = f"{tensor.path}: tensor {tensor.name}, {blocks.text(matrix, first, count)}"
                raise CheckpointError(f"{where}: {error}") from error
            sums[number] = engine.error_sums(weight, packed, scale, importance)
            return packed, scale

        def notes() -> dict[str, Any]:
            total = sum((sums[number] for number in range(blocks.pieces)), start=ErrorSums(0.0, 0.0, 0.0, 0.0))
            known = self.weighting.importance is not None and tensor.name in self.weighting.importance.source.tensors
            return {
                "weight": tensor.name,
                "parameters": tensor.elements,
                "weighted": known,
                "feedback": feedback,
                "quality": asdict(total),
            }

        packed_shape = (*tensor.shape[:-1], columns // 2)
        scale_shape = (*tensor.shape[:-1], columns // codebook.GROUP_SIZE)
        outputs = (
            OutputTensor(tensor.name + PACKED_SUFFIX, "U8", packed_shape, tensor.path.name),
            OutputTensor(tensor.name + SCALE_SUFFIX, "F16", scale_shape, tensor.path.name),
        )
        matrix_bytes = columns * columns * 4 if feedback else 0
        # GPTQ lays out half the factor anew for each piece; an expert's piece has a factor of its own besides.
        piece_bytes = _PIECE_MEMORY_BYTES + matrix_bytes // 2 + (matrix_bytes if len(tensor.shape) == 3 else 0)
        step_bytes = MATRICES_IN_MEMORY * matrix_bytes + KEPT_BYTES if feedback else 0
        return Step(outputs, blocks.pieces, produce, piece_bytes, step_bytes, notes)

    def _quantize(
        self,
        tensor: TensorInfo,
        matrix: int,
        weight: NDArray[np.float32],
        importance: NDArray[np.float32] | None,
        feedback: bool,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        if feedback and self.weighting.hessians is not None:
            factor = self.weighting.hessians.factor(tensor, matrix, importance)
            if factor is not None:
                return engine.quantize_with_feedback(weight, factor, importance)
        scale_search: codebook.ScaleSearch = "absmax" if self.method == "absmax" else "mse"
        weights = importance if self.method in ("importance", "gptq") else None
        return engine.quantize(weight, weights, scale_search, self.device)


@dataclass(frozen=True)
class _Blocks:
    """How a weight [..., rows, columns] is cut into pieces: blocks of ``rows_per_piece`` rows of one matrix."""

    tensor: TensorInfo
    rows: int
    columns: int
    rows_per_piece: int

    @property
    def per_matrix(self) -> int:
        return -(-self.rows // self.rows_per_piece)

    @property
    def pieces(self) -> int:
        return math.prod(self.tensor.shape[:-2]) * self.per_matrix

    def of_piece(self, number: int) -> tuple[int, int, int]:
        """Matrix, first row and count of rows."""
        matrix, block = divmod(number, self.per_matrix)
        first = block * self.rows_per_piece
        return matrix, first, min(self.rows_per_piece, self.rows - first)

    def size_bytes(self, rows: int) -> int:
        return rows * self.columns * BYTES_PER_ELEMENT[self.tensor.dtype]

    def offset_bytes(self, matrix: int, row: int) -> int:
        return self.size_bytes(matrix * self.rows + row)

    def text(self, matrix: int, first: int, count: int) -> str:
        position = f"matrix {matrix}, " if len(self.tensor.shape) == 3 else ""
        return f"{position}rows {first} to {first + count - 1}"

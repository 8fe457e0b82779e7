"""Second moments of every linear layer's inputs: by how much an error in each input channel counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from step128_checkpoint.dtypes import BYTES_PER_ELEMENT, FLOAT_DTYPES, Float32Array, to_float32
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.files import reading
from step128_checkpoint.header import TensorInfo, read_header
from step128_checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Importance:
    """Weights of the squared error for each input channel: tensor name -> shape [K], or [E, K] for 3-D weights."""

    path: Path
    source: Checkpoint
    sha256: str

    def of_matrix(self, tensor: TensorInfo, matrix: int) -> Float32Array | None:
        """The float32 [K] of one matrix of a tensor, or None if the file has nothing for this tensor."""
        info = self.source.tensors.get(tensor.name)
        if info is None:
            return None
        columns = tensor.shape[-1]
        row_bytes = columns * BYTES_PER_ELEMENT[info.dtype]
        start_bytes = matrix * row_bytes if len(info.shape) == 2 else 0
        return to_float32(self.source.read(tensor.name, start_bytes, row_bytes), info.dtype, (columns,))


def open_importance(path: Path, checkpoint: Checkpoint) -> Importance:
    """Open an importance file and check its names, shapes and types against the checkpoint; its files stay open.

    Raises:
        CheckpointError: a tensor is unknown to the checkpoint, or its shape is neither [K] nor [E, K].
    """
    tensors = read_header(path)
    for name, info in tensors.items():
        weight = checkpoint.tensors.get(name)
        if weight is None or len(weight.shape) < 2:
            raise CheckpointError(f"{path}: {name} is no weight of {checkpoint.folder}")
        allowed = [weight.shape[-1:]]
        if len(weight.shape) == 3:
            allowed.append((weight.shape[0], weight.shape[-1]))
        if info.shape not in allowed or info.dtype not in FLOAT_DTYPES:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise CheckpointError(
                f"{path}: {name} is {info.dtype} {list(info.shape)}, a float tensor {wanted} is needed"
            )
    with reading(path), path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    source = Checkpoint(path.parent, {}, tensors)
    source.open_files()
    return Importance(path, source, digest)

"""The inputs' second-moment matrices that a calibration with ``--hessians`` left, made ready for GPTQ."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from step128_checkpoint.calibration.result import HESSIANS_FOLDER, Calibration, file_sha256, hessian_key
from step128_checkpoint.dtypes import Float32Array, to_float32
from step128_checkpoint.errors import CheckpointError, InputNotFoundError
from step128_checkpoint.header import TensorInfo, read_header
from step128_checkpoint.reader import Checkpoint

# Pieces in flight touch at most two matrices, the one that ends and the one that begins, unless matrices are small.
KEPT_BYTES = 1 << 28
"""Of factors that are kept while they are small; two are in any case."""

_FEWEST_CACHED = 2
MATRICES_IN_MEMORY = 8
"""Square float32 matrices [K, K] at once: the Hessian, two copies in float64 (the damping is tried anew), its factor,
two kept."""

_SMALLEST_RATIO = 1e-4  # of an expert's second moment to its layer's: a channel that an expert never saw still counts


class Hessians:
    """Cholesky factors of inverse Hessians by weight matrix; safe to call from several threads."""

    def __init__(self, calibration: Calibration) -> None:
        """Open every file of ``hessians/`` that the calibration wrote, and hash it.

        Raises:
            InputNotFoundError: there are none, or one is missing.
            CheckpointError: one is not as the calibration left it.
        """
        folder = calibration.folder / HESSIANS_FOLDER
        recorded: dict[str, str] = calibration.document["files"]
        paths = {calibration.folder / name: sha for name, sha in recorded.items() if name.startswith(HESSIANS_FOLDER)}
        if not paths:
            raise InputNotFoundError(f"{folder}: no Hessians. GPTQ needs them: run `calibrate` again with --hessians.")
        tensors: dict[str, TensorInfo] = {}
        with ThreadPoolExecutor() as pool:
            for path, found in zip(paths, pool.map(file_sha256, paths), strict=True):
                if found != paths[path]:
                    raise CheckpointError(f"{path}: not as `calibrate` left it. Calibrate again.")
                tensors |= read_header(path)
        self._source = Checkpoint(folder, {}, tensors)
        self._source.open_files()
        self._lock = threading.Lock()
        self._factors: OrderedDict[tuple[str, int], tuple[Float32Array, Float32Array] | None] = OrderedDict()

    def has(self, tensor: TensorInfo) -> bool:
        """Whether there is one for this weight."""
        return hessian_key(tensor.name) in self._source.tensors

    def factor(self, tensor: TensorInfo, matrix: int, second_moment: Float32Array | None) -> Float32Array | None:
        """Upper Cholesky factor [K, K] of the inverse Hessian of one matrix of a weight; None if it saw no token.

        The experts of a layer share the Hessian H of the layer's tokens; an expert that saw the second moments d² times
        those of the layer gets D H D, whose inverse's factor is that of H with its columns divided by d.

        Raises:
            CheckpointError: it does not fit the weight, or cannot be factored.
        """
        key = hessian_key(tensor.name)
        info = self._source.tensors[key]
        own = len(info.shape) == 3  # a matrix of its own for each expert
        with self._lock:
            place = key, matrix if own else 0
            if place not in self._factors:
                self._keep(place, self._make(info, tensor, place), columns=tensor.shape[-1])
            found = self._factors[place]
        if found is None:
            return None
        shared, moments = found
        if own or second_moment is None or len(tensor.shape) == 2:
            return shared
        ratio = np.divide(second_moment, moments, out=np.ones_like(moments), where=moments > 0)
        scaled: Float32Array = shared / np.sqrt(np.maximum(ratio, np.float32(_SMALLEST_RATIO)))[None, :]
        return scaled

    def _make(
        self, info: TensorInfo, tensor: TensorInfo, place: tuple[str, int]
    ) -> tuple[Float32Array, Float32Array] | None:
        from step128_checkpoint.quantization.gptq import factor  # numba: a second to import

        (key, matrix), columns = place, tensor.shape[-1]
        if info.dtype != "F32" or info.shape[-2:] != (columns, columns) or (info.shape[:-2] or (1,))[0] <= matrix:
            raise CheckpointError(
                f"{info.path}: {key} is {info.dtype} {list(info.shape)}; {tensor.name} needs F32 [{columns}, {columns}]"
            )
        size_bytes = columns * columns * 4
        hessian = to_float32(self._source.read(key, matrix * size_bytes, size_bytes), "F32", (columns, columns))
        moments = np.ascontiguousarray(np.diagonal(hessian))
        if not moments.any():
            return None
        try:
            return factor(hessian), moments
        except ValueError as error:
            raise CheckpointError(f"{info.path}: {key}: {error}") from error

    def _keep(self, place: tuple[str, int], made: tuple[Float32Array, Float32Array] | None, columns: int) -> None:
        self._factors[place] = made
        while len(self._factors) > max(_FEWEST_CACHED, KEPT_BYTES // (columns * columns * 4)):
            self._factors.popitem(last=False)

"""The NL4 scale search, compiled: the bytes of :func:`step128_kernels.codebook.quantize`, more than ten times as fast.

It needs numba; without it callers take the reference, and get the same bytes later.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from step128_kernels.codebook import (
    GROUP_SIZE,
    Float16Array,
    Float32Array,
    ScaleSearch,
    Uint8Array,
    check_quantizable,
    extremes,
    relative_importance,
)


def available() -> bool:
    """Whether numba, which compiles the search, is installed."""
    return find_spec("numba") is not None


def quantize(
    weight: Float32Array, importance: Float32Array | None = None, scale_search: ScaleSearch = "mse"
) -> tuple[Uint8Array, Float16Array]:
    """Quantize one matrix to NL4 on one core. Other threads run meanwhile: cut a large matrix into rows to use more.

    Args:
        weight: float32 ``[rows, K]``, finite.
        importance: float32 ``[K]``, as for :func:`step128_kernels.codebook.quantize`; None means uniform.
        scale_search: ``mse`` or ``absmax``.

    Returns:
        ``(packed uint8 [rows, K // 2], scale float16 [rows, K // 16])``, bit for bit the reference's.

    Raises:
        ValueError: as the reference, and if the shapes are not those above.
        ImportError: numba is not installed.
    """
    if weight.ndim != 2:
        raise ValueError(f"the weight has shape {list(weight.shape)}, a matrix is needed")
    rows, columns = weight.shape
    check_quantizable(columns, extremes(weight), None if importance is None else extremes(importance), scale_search)
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"the importance has shape {list(importance.shape)}, the weight needs [{columns}]")
    from step128_checkpoint.quantization import search_compiled  # numba's import takes a second

    weight = np.ascontiguousarray(weight, dtype=np.float32)
    packed = np.empty((rows, columns // 2), dtype=np.uint8)
    scale = np.empty((rows, columns // GROUP_SIZE), dtype=np.float16)
    groups = weight.reshape(-1, GROUP_SIZE)
    flat_scale, flat_packed = scale.reshape(-1).view(np.uint16), packed.reshape(-1, GROUP_SIZE // 2)
    if scale_search == "absmax":
        search_compiled.absmax(groups, flat_packed, flat_scale)
    else:
        channels = np.ones(columns, dtype=np.float32) if importance is None else importance.astype(np.float32)
        search_compiled.search(groups, relative_importance(channels.reshape(-1, GROUP_SIZE)), flat_packed, flat_scale)
    return packed, scale

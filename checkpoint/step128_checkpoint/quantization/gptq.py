"""GPTQ error feedback (Frantar et al., https://arxiv.org/abs/2210.17323) in the NL4 format.

Columns are quantized one after the other; the error of each is spread over the columns that are still to come, as the
inverse of the inputs' second-moment matrix H = E[x x^T] says, so that the layer's output changes least. The scale of a
group is searched when its first column is reached, on the weights as corrected so far, weighted by the importance
E[x^2]: with unweighted scales GPTQ is worse than no error feedback with weighted ones (KL 0.131 against 0.097 of 0.198
on a small language model). Columns keep their order, since the format's groups are fixed.

Importing needs numba and scipy.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from step128_checkpoint.quantization import gptq_compiled
from step128_kernels.codebook import (
    GROUP_SIZE,
    Float16Array,
    Float32Array,
    Uint8Array,
    check_quantizable,
    extremes,
    relative_importance,
)

_DAMPINGS_TRIED = 3  # each ten times the one before


def factor(hessian: Float32Array, damping: float = 0.01) -> Float32Array:
    """Upper triangular U with U^T U = inverse of the damped Hessian: what :func:`quantize` needs.

    H = R R^T with R upper triangular is the Cholesky factorization of H with rows and columns in reverse, and U = R^-1;
    so nothing is inverted but a triangle. In float64. A dead channel (zero on the diagonal) gets the mean of the
    diagonal: no error comes from it, since its row is zero.

    Args:
        hessian: float32 ``[K, K]``, symmetric (only one triangle is read) and positive semidefinite: means of x x^T.
        damping: what is added to the diagonal, as a fraction of its mean; ten and a hundred times that if need be.

    Returns:
        float32 ``[K, K]``, zeros below the diagonal.

    Raises:
        ValueError: the shape is not square, a value is not finite, all are zero, or the matrix is not positive definite
            even with the largest damping.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] == 0:
        raise ValueError(f"the Hessian has shape {list(hessian.shape)}, a square matrix is needed")
    if not np.isfinite(extremes(hessian)).all():
        raise ValueError("the Hessian holds NaN or infinity")
    diagonal = np.diagonal(hessian).astype(np.float64)
    mean = float(diagonal.mean())
    if mean <= 0:
        raise ValueError("the Hessian's diagonal is zero or negative: no calibration token reached this layer")
    damped = np.where(diagonal == 0, mean, diagonal)
    for attempt in range(_DAMPINGS_TRIED):
        # Fortran's order makes LAPACK work in place, and a C-contiguous reversal of it is one more transposition.
        reverse = np.array(hessian[::-1, ::-1], dtype=np.float64, order="F")
        np.fill_diagonal(reverse, (damped + mean * damping * 10**attempt)[::-1])
        lower, failed = lapack.dpotrf(reverse, lower=1, clean=1, overwrite_a=1)
        if failed == 0:
            inverse, _ = lapack.dtrtri(lower, lower=1, overwrite_c=1)
            return np.ascontiguousarray(inverse[::-1, ::-1], dtype=np.float32)
    raise ValueError(
        f"the Hessian is not positive definite, not even with {damping * 10 ** (_DAMPINGS_TRIED - 1):g} of its mean "
        "diagonal added; it is no second-moment matrix"
    )


def quantize(
    weight: Float32Array, factor: Float32Array, importance: Float32Array | None
) -> tuple[Uint8Array, Float16Array]:
    """Quantize one matrix to NL4 with error feedback, on one core; other threads run meanwhile.

    Rows do not depend on each other, sums are formed in order and rounded to float32 one by one: a matrix cut into
    pieces of rows gives the bytes of the whole, on any machine.

    Args:
        weight: float32 ``[rows, K]``, finite.
        factor: float32 ``[K, K]``, from :func:`factor`.
        importance: float32 ``[K]``, the diagonal of the Hessian; None means uniform.

    Returns:
        ``(packed uint8 [rows, K // 2], scale float16 [rows, K // 16])``.

    Raises:
        ValueError: as :func:`step128_checkpoint.quantization.search.quantize`, or the factor does not belong to it.
    """
    if weight.ndim != 2:
        raise ValueError(f"the weight has shape {list(weight.shape)}, a matrix is needed")
    rows, columns = weight.shape
    check_quantizable(columns, extremes(weight), None if importance is None else extremes(importance), "mse")
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"the importance has shape {list(importance.shape)}, the weight needs [{columns}]")
    if factor.shape != (columns, columns):
        raise ValueError(f"the factor has shape {list(factor.shape)}, the weight needs [{columns}, {columns}]")
    if not (np.diagonal(factor) > 0).all():
        raise ValueError("the factor's diagonal is not positive: it is not what gptq.factor returns")
    channels = np.ones(columns, dtype=np.float32) if importance is None else importance.astype(np.float32)
    packed = np.empty((rows, columns // 2), dtype=np.uint8)
    scale = np.empty((rows, columns // GROUP_SIZE), dtype=np.float16)
    gptq_compiled.quantize(
        np.ascontiguousarray(weight, dtype=np.float32),
        np.ascontiguousarray(factor, dtype=np.float32),
        relative_importance(channels.reshape(-1, GROUP_SIZE)),
        packed,
        scale.view(np.uint16),
    )
    return packed, scale

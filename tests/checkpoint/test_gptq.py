"""GPTQ: the compiled one against the plain algorithm, pieces against the whole, and what it gains."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from step128_checkpoint.quantization import gptq, quality, search
from step128_kernels import codebook


def inputs(columns: int, seed: int = 0, tokens: int = 2000) -> np.ndarray:
    """Correlated activations, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((tokens, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    values = (shared + rng.standard_normal((tokens, columns))) * np.exp(rng.standard_normal(columns))
    return values.astype(np.float32)


def second_moments(values: np.ndarray) -> np.ndarray:
    return (values.T @ values / len(values)).astype(np.float32)


def weights(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


def plain_gptq(weight: np.ndarray, factor: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The algorithm without blocks, tiles or threads, on the reference's search and look-up.

    A fused multiply-add is exact in float64 but for that one rounding, which float32's then follows: that the two give
    another result than one is rarer than 1 in 10^8.
    """
    weight = weight.copy()
    rows, columns = weight.shape
    codes = np.asarray(codebook.CODEBOOK, np.float32)
    indices = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, columns // 16), np.float16)
    for column in range(columns):
        group = column // 16
        if column % 16 == 0:
            part = slice(column, column + 16)
            scale[:, group] = codebook.quantize(weight[:, part].copy(), importance[part])[1][:, 0]
        wide = scale[:, group].astype(np.float32)
        inverse = np.divide(np.float32(128), wide, out=np.zeros_like(wide), where=wide != 0)
        bins = np.clip(weight[:, column] * inverse, -128, 127.75) * np.float32(2) + np.float32(256)
        indices[:, column] = codebook.NEAREST[bins.astype(np.int16)]
        error = (weight[:, column] - codes[indices[:, column]] * (wide / np.float32(128))) / factor[column, column]
        later = weight[:, column + 1 :].astype(np.float64)
        later -= np.multiply.outer(error.astype(np.float64), factor[column, column + 1 :].astype(np.float64))
        weight[:, column + 1 :] = later.astype(np.float32)
    return codebook.pack_indices(indices), scale


@pytest.mark.parametrize("shape", [(5, 16), (70, 128), (64, 144), (67, 400), (130, 272)])
def test_same_bytes_as_the_plain_algorithm(shape: tuple[int, int]) -> None:
    weight, hessian = weights(*shape), second_moments(inputs(shape[1]))
    factor, importance = gptq.factor(hessian), np.diagonal(hessian).copy()
    for got, wanted in zip(
        gptq.quantize(weight, factor, importance), plain_gptq(weight, factor, importance), strict=True
    ):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.array_equal(got, wanted)


def test_without_correlation_it_is_the_search() -> None:
    weight = weights(40, 96)
    importance = np.random.default_rng(2).exponential(size=96).astype(np.float32)
    factor = gptq.factor(np.diag(importance))
    for got, wanted in zip(
        gptq.quantize(weight, factor, importance), codebook.quantize(weight, importance), strict=True
    ):
        assert np.array_equal(got, wanted)
    for got, wanted in zip(gptq.quantize(weight, factor, None), codebook.quantize(weight), strict=True):
        assert np.array_equal(got, wanted)


def test_pieces_of_rows_give_the_bytes_of_the_whole() -> None:
    weight, hessian = weights(150, 256), second_moments(inputs(256))
    factor, importance = gptq.factor(hessian), np.diagonal(hessian).copy()
    cuts = [0, 1, 18, 101, 150]
    pieces = [weight[a:b] for a, b in pairwise(cuts)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda piece: gptq.quantize(piece, factor, importance), pieces))
    for number, whole in enumerate(gptq.quantize(weight, factor, importance)):
        assert np.array_equal(np.concatenate([result[number] for result in results]), whole)


def test_it_lowers_the_output_error_on_other_inputs() -> None:
    values = inputs(384, tokens=6000)
    hessian, held_out = second_moments(values[:4000]), values[4000:]
    importance = np.diagonal(hessian).copy()
    weight = weights(96, 384)
    wanted = held_out @ weight.T

    def output_error(packed: np.ndarray, scale: np.ndarray) -> float:
        return float(((held_out @ codebook.dequantize(packed, scale).T - wanted) ** 2).sum())

    searched = output_error(*search.quantize(weight, importance))
    # A quarter as many directions as channels are shared: most of the error can be moved out of them.
    corrected = output_error(*gptq.quantize(weight, gptq.factor(hessian), importance))
    assert corrected < 0.4 * searched
    assert searched < output_error(*search.quantize(weight))


def test_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    hessian = second_moments(inputs(64))
    factor = gptq.factor(hessian, damping=0.05)
    damped = hessian.astype(np.float64) + 0.05 * np.diagonal(hessian).mean() * np.eye(64)
    assert factor.dtype == np.float32
    assert np.array_equal(factor, np.triu(factor))
    assert (np.diagonal(factor) > 0).all()
    wide = factor.astype(np.float64)
    np.testing.assert_allclose(wide.T @ wide @ damped, np.eye(64), atol=1e-5)  # float32's rounding of the factor


def test_a_dead_channel_takes_no_error_and_gives_none() -> None:
    values = inputs(64)
    values[:, 20] = 0
    hessian = second_moments(values)
    factor = gptq.factor(hessian)
    assert np.isfinite(factor).all()
    assert np.count_nonzero(factor[20]) == np.count_nonzero(factor[:, 20]) == 1
    weight, importance = weights(8, 64), np.diagonal(hessian).copy()
    restored = codebook.dequantize(*gptq.quantize(weight, factor, importance))
    assert np.abs(restored[:, 20] - weight[:, 20]).max() < 0.02  # it is kept, not erased


def test_fewer_tokens_than_channels_is_no_error() -> None:
    hessian = second_moments(inputs(128, tokens=20))
    factor = gptq.factor(hessian)
    packed, scale = gptq.quantize(weights(16, 128), factor, np.diagonal(hessian).copy())
    assert quality.error_sums(weights(16, 128), packed, scale).sqnr_db > 5  # plain weights stay recognizable


def test_damping_is_raised_for_what_is_nearly_positive_definite() -> None:
    hessian = np.eye(32, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # least eigenvalue -0.05: more than the first damping, less than the second
    assert np.isfinite(gptq.factor(hessian)).all()


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.zeros((4, 3), np.float32), "square"),
        (np.full((4, 4), np.nan, np.float32), "NaN"),
        (np.zeros((4, 4), np.float32), "no calibration token"),
        (np.ones((4, 4), np.float32) * 5 - 4 * np.eye(4, dtype=np.float32), "not positive definite"),
    ],
)
def test_factor_refuses(hessian: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq.factor(hessian)


def test_quantize_refuses() -> None:
    weight, factor, importance = weights(2, 32), np.eye(32, dtype=np.float32), np.ones(32, np.float32)
    for arguments, message in (
        ((weight[0], factor, importance), "matrix is needed"),
        ((weights(2, 24), factor, importance), "multiple of 16"),
        ((weight, factor[:16], importance), "factor has shape"),
        ((weight, np.zeros_like(factor), importance), "diagonal is not positive"),
        ((weight, factor, importance[:16]), "importance has shape"),
        ((weight, factor, -importance), "importance is negative"),
        ((weight * np.float32(np.inf), factor, importance), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq.quantize(*arguments)

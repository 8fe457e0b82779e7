"""The compiled search and the one in torch give the reference's bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from step128_checkpoint.quantization import quality, search, search_compiled, search_torch
from step128_kernels import codebook

README = Path(__file__).parents[2] / "kernels/README.md"
METHODS = ["mse", "importance", "absmax"]


def assert_same_bytes(weight: np.ndarray, importance: np.ndarray | None, scale_search: codebook.ScaleSearch) -> None:
    wanted = codebook.quantize(weight, importance, scale_search)
    compiled = search.quantize(weight, importance, scale_search)
    on_torch = search_torch.quantize_array(weight, importance, scale_search, "cpu")
    for got in (compiled, on_torch):
        for array, reference in zip(got, wanted, strict=True):
            assert (array.dtype, array.shape) == (reference.dtype, reference.shape)
            assert array.tobytes() == reference.tobytes()


def weights(kind: str, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(7)
    values = {
        "gaussian": lambda: 0.02 * rng.standard_normal(shape),
        "heavy tails": lambda: rng.standard_t(2.5, shape) * 0.01,
        "bfloat16, many ties": lambda: rng.integers(-8, 9, shape) / 64,
        "subnormal scales": lambda: rng.standard_normal(shape) * 1e-6,
        "scales that vanish": lambda: rng.standard_normal(shape) * 2e-8,
        "float32's subnormals": lambda: rng.standard_normal(shape) * 1e-40,
        "largest": lambda: rng.uniform(-64990, 64990, shape),
        "sparse": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.05),
        "zero": lambda: np.zeros(shape),
    }[kind]()
    return values.astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind",
    [
        "gaussian",
        "heavy tails",
        "bfloat16, many ties",
        "subnormal scales",
        "scales that vanish",
        "float32's subnormals",
        "largest",
        "sparse",
        "zero",
    ],
)
def test_same_bytes_as_the_reference(kind: str, method: str) -> None:
    weight = weights(kind, (37, 272))  # 629 groups: blocks of lanes begin inside rows, and the last is not full
    importance = None
    if method == "importance":
        importance = (np.random.default_rng(8).exponential(size=272) ** 4).astype(np.float32)
        importance[16:32] = 0  # a group that calibration never saw
        importance[40] = 1e30
    assert_same_bytes(weight, importance, "absmax" if method == "absmax" else "mse")


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (64, 16), (1, 1040), (0, 32)])
def test_same_bytes_for_any_number_of_groups(shape: tuple[int, int]) -> None:
    importance = np.linspace(0.1, 2, shape[1], dtype=np.float32)
    assert_same_bytes(weights("gaussian", shape), importance, "mse")
    assert_same_bytes(weights("gaussian", shape), None, "absmax")


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 32), elements=st.floats(-6e4, 6e4, width=32)),
    hnp.arrays(np.float32, 32, elements=st.floats(0, 2.0**66, width=32)),
)
def test_same_bytes_for_anything(weight: np.ndarray, importance: np.ndarray) -> None:
    assert_same_bytes(weight, importance, "mse")
    assert_same_bytes(weight, None, "absmax")


def test_a_weight_that_is_not_contiguous_or_bfloat16() -> None:
    weight = weights("gaussian", (64, 96))
    for got, wanted in zip(search.quantize(weight.T[:32]), codebook.quantize(weight.T[:32]), strict=True):
        assert np.array_equal(got, wanted)
    half = torch.from_numpy(weight).bfloat16()
    for got, wanted in zip(search_torch.quantize(half), codebook.quantize(half.float().numpy()), strict=True):
        assert np.array_equal(got.numpy(), wanted)


def test_rounding_to_float16_is_numpys_for_every_float16_and_every_tie() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # every finite one that is not < 0
    middles = (halves[:-1] + halves[1:]) / 2  # exact: float32 has the bit
    near = [np.nextafter(middles, side) for side in (np.float32(0), np.float32(np.inf))]
    values = np.concatenate([halves, middles, *near])
    values = np.concatenate([values, -values])
    wanted = values.astype(np.float16)
    rounded = values.copy()
    search_compiled.round_to_float16(rounded, np.empty(len(values), np.int32))
    assert np.array_equal(rounded, wanted.astype(np.float32))
    bits = np.array([search_compiled.float16_bits(value) for value in rounded], dtype=np.uint16)
    assert np.array_equal(bits, np.where(wanted == 0, np.float16(0), wanted).view(np.uint16))


def test_golden_vectors() -> None:
    for text in re.findall(r"```json golden\n(.*?)```", README.read_text(), flags=re.S):
        vector = json.loads(text)
        weight = np.frombuffer(bytes.fromhex(vector["weight"]), dtype="<f4")[None]
        assert_same_bytes(weight, None, "mse")
        if vector["name"] == "all sixteen indices, scale 1":
            assert search.quantize(weight)[0].tobytes().hex() == vector["packed"]


def test_rows_can_be_quantized_in_any_pieces_by_many_threads() -> None:
    weight = weights("gaussian", (40, 128))
    importance = np.linspace(0.5, 2, 128, dtype=np.float32)
    pieces = [weight[:1], weight[1:14], weight[14:]]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda piece: search.quantize(piece, importance), pieces))
    for number, whole in enumerate(search.quantize(weight, importance)):
        assert np.array_equal(np.concatenate([result[number] for result in results]), whole)


@pytest.mark.parametrize(
    ("weight", "importance", "message"),
    [
        (np.zeros((2, 24), np.float32), None, "multiple of 16"),
        (np.zeros((2, 0), np.float32), None, "multiple of 16"),
        (np.full((1, 16), np.nan, np.float32), None, "NaN or infinity"),
        (np.full((1, 16), -np.inf, np.float32), None, "NaN or infinity"),
        (np.full((1, 16), -6.5e4, np.float32), None, "magnitude 65000 needs a scale beyond float16"),
        (np.zeros((1, 16), np.float32), np.full(16, -1, np.float32), "importance is negative"),
        (np.zeros((1, 16), np.float32), np.full(16, np.nan, np.float32), "importance is negative, NaN"),
    ],
)
def test_all_refuse_alike(weight: np.ndarray, importance: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codebook.quantize(weight, importance)
    with pytest.raises(ValueError, match=message):
        search.quantize(weight, importance)
    with pytest.raises(ValueError, match=message):
        search_torch.quantize_array(weight, importance, "mse", "cpu")


@pytest.mark.parametrize(
    ("shape", "importance_shape", "method", "message"),
    [
        ((2, 2, 16), None, "mse", "a matrix is needed"),
        ((2, 32), (16,), "mse", r"importance has shape \[16\], the weight needs \[32\]"),
        ((2, 32), None, "best", "scale_search is 'best'"),
    ],
)
def test_refuses_other_shapes_and_methods(
    shape: tuple[int, ...], importance_shape: tuple[int, ...] | None, method: str, message: str
) -> None:
    weight = np.ones(shape, np.float32)
    importance = None if importance_shape is None else np.ones(importance_shape, np.float32)
    with pytest.raises(ValueError, match=message):
        search.quantize(weight, importance, method)
    with pytest.raises(ValueError, match=message):
        search_torch.quantize_array(weight, importance, method, "cpu")


def test_the_module_itself_needs_neither_numba_nor_torch() -> None:
    code = "import sys; from step128_checkpoint.quantization import search, quality; assert search.available();"
    code += "assert not {'numba', 'torch', 'llvmlite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    assert not search.available()


@pytest.mark.parametrize("weighted", [False, True])
def test_error_sums(weighted: bool) -> None:
    weight = weights("heavy tails", (150, 80))
    importance = np.random.default_rng(9).exponential(size=80).astype(np.float32) if weighted else None
    packed, scale = codebook.quantize(weight, importance)
    exact = weight.astype(np.float64)
    error = (exact - codebook.dequantize(packed, scale)) ** 2
    factor = importance.astype(np.float64) if importance is not None else 1.0
    sums = quality.error_sums(weight, packed, scale, importance)
    wanted = [(exact**2).sum(), error.sum(), (factor * exact**2).sum(), (factor * error).sum()]
    # float32 sums of at most 64 rows, then float64
    assert [sums.signal, sums.error, sums.weighted_signal, sums.weighted_error] == pytest.approx(wanted, rel=1e-6)
    assert sums == quality.error_sums(weight, packed, scale, importance)
    assert sums.sqnr_db == pytest.approx(10 * np.log10(wanted[0] / wanted[1]), abs=1e-5)
    assert sums.weighted_sqnr_db == pytest.approx(10 * np.log10(wanted[2] / wanted[3]), abs=1e-5)


def test_error_sums_add_up() -> None:
    weight = weights("gaussian", (100, 64))
    packed, scale = codebook.quantize(weight)
    parts = [quality.error_sums(weight[part], packed[part], scale[part]) for part in (slice(0, 40), slice(40, 100))]
    total, whole = parts[0] + parts[1], quality.error_sums(weight, packed, scale)
    assert total.error == pytest.approx(whole.error, rel=1e-6)
    assert total.signal == pytest.approx(whole.signal, rel=1e-6)


def test_decibels_without_noise_and_without_signal() -> None:
    assert quality.ErrorSums(1, 0, 1, 0).sqnr_db == np.inf
    assert np.isnan(quality.ErrorSums(0, 0, 0, 0).weighted_sqnr_db)


def test_channel_error_is_the_output_error_of_uncorrelated_inputs() -> None:
    rng = np.random.default_rng(10)
    weight = weights("gaussian", (64, 96))
    spread = rng.exponential(size=96)
    inputs = rng.standard_normal((200_000, 96)) * np.sqrt(spread)
    packed, scale = codebook.quantize(weight)
    output_error = (inputs @ (weight - codebook.dequantize(packed, scale)).T.astype(np.float64)) ** 2
    sums = quality.error_sums(weight, packed, scale, spread.astype(np.float32))
    assert sums.weighted_error == pytest.approx(output_error.mean(axis=0).sum(), rel=0.02)  # of 200,000 random inputs

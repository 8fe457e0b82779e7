"""NL4 is frozen: these vectors are the format. A change that breaks one is a new format, not a fix."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from step128_kernels import codebook as nl4

README = Path(__file__).parents[2] / "kernels/README.md"


def golden_vectors() -> list[dict]:
    """The vectors printed in kernels/README.md, between the json fences that name themselves golden."""
    blocks = re.findall(r"```json golden\n(.*?)```", README.read_text(), flags=re.S)
    return [json.loads(block) for block in blocks]


def test_codebook_is_iq4_nl() -> None:
    assert nl4.CODEBOOK == (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    assert (nl4.GROUP_SIZE, nl4.SCALE_DIVISOR, nl4.FORMAT_VERSION) == (16, 128, 1)


def test_golden_vectors_decode_bit_exactly() -> None:
    vectors = golden_vectors()
    assert len(vectors) >= 3
    for vector in vectors:
        packed = np.frombuffer(bytes.fromhex(vector["packed"]), dtype=np.uint8)
        scale = np.frombuffer(bytes.fromhex(vector["scale"]), dtype="<f2")
        weight = np.frombuffer(bytes.fromhex(vector["weight"]), dtype="<f4")
        assert nl4.dequantize(packed, scale).tobytes() == weight.tobytes(), vector["name"]


def test_low_nibble_is_the_even_position() -> None:
    indices = np.arange(16, dtype=np.uint8)
    assert nl4.pack_indices(indices).tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(0, 5), st.integers(0, 8).map(lambda n: 2 * n)), elements=st.integers(0, 15)
    )
)
def test_pack_unpack_round_trip(indices: np.ndarray) -> None:
    assert np.array_equal(nl4.unpack_indices(nl4.pack_indices(indices)), indices)


@pytest.mark.parametrize("bad", [np.zeros(3, np.uint8), np.full(4, 16, np.uint8)])
def test_pack_refuses(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pack_indices"):
        nl4.pack_indices(bad)


def test_every_index_of_a_representable_group_is_found() -> None:
    scale = np.float16(-0.37)
    weight = np.asarray(nl4.CODEBOOK, np.float32) * (np.float32(scale) / np.float32(128))
    packed, found = nl4.quantize(weight[None])
    assert np.array_equal(nl4.dequantize(packed, found)[0], weight)


def brute_force_error(weight: np.ndarray, importance: np.ndarray) -> float:
    """Smallest weighted error over a dense grid of scales and all nearest indices: what the search approaches."""
    book = np.asarray(nl4.CODEBOOK, np.float64)
    best = np.inf
    for scale in np.linspace(-1.6, 1.6, 6401) * np.abs(weight).max():
        values = np.float64(np.float16(scale)) * book / 128
        nearest = values[np.abs(weight[:, None] - values[None]).argmin(axis=1)]
        best = min(best, float((importance * (weight - nearest) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_search_comes_within_five_percent_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((40, 16)).astype(np.float32)
    importance = rng.exponential(size=(40, 16)).astype(np.float32)
    restored = nl4.dequantize(*nl4.quantize(weight, importance))
    error = (importance * (weight - restored) ** 2).sum(axis=1)
    best = np.array([brute_force_error(w.astype(np.float64), i) for w, i in zip(weight, importance, strict=True)])
    assert error.sum() <= 1.05 * best.sum()  # 20 starts of a least-squares descent against 6401 scales


def signal_to_noise_db(weight: np.ndarray, scale_search: str) -> float:
    restored = nl4.dequantize(*nl4.quantize(weight, scale_search=scale_search))
    return float(10 * np.log10((weight**2).sum() / ((weight - restored) ** 2).sum()))


def test_gaussian_signal_to_noise() -> None:
    weight = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32) * 0.02
    # Published figures for a Gaussian: absmax 21.6 dB, search over both signs 23.98 dB.
    assert signal_to_noise_db(weight, "absmax") == pytest.approx(21.6, abs=0.05)
    assert signal_to_noise_db(weight, "mse") == pytest.approx(23.98, abs=0.05)


def test_importance_moves_the_error_where_it_matters_less() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    importance = (rng.exponential(size=256) ** 3).astype(np.float32)
    plain = nl4.dequantize(*nl4.quantize(weight))
    weighted = nl4.dequantize(*nl4.quantize(weight, importance))
    assert (importance * (weight - weighted) ** 2).sum() < 0.6 * (importance * (weight - plain) ** 2).sum()


def test_constant_importance_is_no_importance() -> None:
    weight = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    for importance in (np.full(64, 4.0, np.float32), np.zeros(64, np.float32)):
        for got, wanted in zip(nl4.quantize(weight, importance), nl4.quantize(weight), strict=True):
            assert np.array_equal(got, wanted)


@pytest.mark.parametrize("size", [1e-38, 1.0, 3e37])
def test_only_relative_importance_counts(size: float) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((2, 3, 64)).astype(np.float32)
    importance = rng.uniform(0.1, 1.0, size=64).astype(np.float32)
    _, scale = nl4.quantize(weight, importance)
    _, other = nl4.quantize(weight, importance * np.float32(size))
    assert (np.abs(other) > 0).all()
    close = np.isclose(scale.astype(np.float32), other.astype(np.float32), rtol=0.02)  # rounding may move a tie
    assert close.mean() > 0.9


def test_importance_of_each_row_lands_on_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((5, 7, 48)).astype(np.float32)
    importance = rng.exponential(size=(5, 1, 48)).astype(np.float32)
    whole = nl4.quantize(weight, importance)
    monkeypatch.setattr(nl4, "_GROUPS_PER_BLOCK", 4)  # blocks that begin and end inside a row
    for got, wanted in zip(nl4.quantize(weight, importance), whole, strict=True):
        assert np.array_equal(got, wanted)
    row = nl4.quantize(weight[3, 2], importance[3, 0])
    assert np.array_equal(row[0], whole[0][3, 2])


def test_a_channel_nobody_saw_is_not_erased() -> None:
    weight = np.full((1, 16), 0.5, np.float32)
    weight[0, 0] = 0.0
    importance = np.zeros(16, np.float32)
    importance[0] = 1.0  # the only channel that calibration saw holds a zero
    restored = nl4.dequantize(*nl4.quantize(weight, importance))
    assert (np.abs(restored[0, 1:] - 0.5) < 0.1).all()


def test_zero_group() -> None:
    packed, scale = nl4.quantize(np.zeros((1, 32), np.float32))
    assert packed.tolist() == [[0x88] * 16]
    assert scale.tobytes() == bytes(4)


@settings(max_examples=60, deadline=None)  # how long it takes is no property of the format
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.just(32)),
        elements=st.floats(-5e4, 5e4, width=32, allow_subnormal=True),
    )
)
def test_any_finite_weight_is_quantized_to_finite_values(weight: np.ndarray) -> None:
    for search in ("mse", "absmax"):
        packed, scale = nl4.quantize(weight, scale_search=search)
        restored = nl4.dequantize(packed, scale)
        assert restored.shape == weight.shape
        assert np.isfinite(restored).all()
        assert (np.abs(restored) <= 1.3 * np.abs(weight).max() + 1e-7).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros((2, 24), np.float32), "multiple of 16"),
        (np.full((1, 16), np.nan, np.float32), "NaN or infinity"),
        (np.full((1, 16), np.inf, np.float32), "NaN or infinity"),
        (np.full((1, 16), 6.5e4, np.float32), "beyond float16"),
    ],
)
def test_quantize_refuses(weight: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nl4.quantize(weight)


def test_quantize_refuses_a_negative_importance() -> None:
    with pytest.raises(ValueError, match="importance"):
        nl4.quantize(np.zeros((1, 16), np.float32), np.full(16, -1, np.float32))

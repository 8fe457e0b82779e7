"""The interval of v_dot2_f32_*'s allowed results holds AMD's pseudo-code and what its silicon was seen to do."""

import math
from fractions import Fraction

import numpy as np
import pytest
from isa import AsmBlock, dot2_bounds

THREE = "=v,v,v,v"


def silicon_dot2(gfx12: bool, factors: list[tuple[float, float]], c: float) -> float:
    """The adders as captured from hardware (sources: isa_floats.dot2_bounds), for normal numbers, in fractions."""
    grid = max(sum(math.frexp(v)[1] - 1 for v in pair) for pair in factors) - 24
    products = [Fraction(x) * Fraction(y) for x, y in factors]
    unit = Fraction(2) ** max(grid, math.frexp(c)[1] - 1 - 26)
    if gfx12:
        pair = sum(math.floor(p / Fraction(2) ** grid) for p in products) * Fraction(2) ** grid
        return float((math.floor(pair / unit) + math.floor(Fraction(c) / unit)) * unit)
    total = 0
    for term in (Fraction(c), *products):
        size = math.floor(abs(term) / unit)
        total += size if (term < 0) == (c < 0) else -size - 1
    return float(total * unit * (-1 if c < 0 else 1))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_dot2_bounds_hold_the_book_and_the_silicon(kind: str) -> None:
    rng = np.random.default_rng(1)
    count = 3000
    spread = (2.0 ** rng.integers(-9, 9, (5, count)) * rng.choice([-1, 1], (5, count))).astype(np.float32)
    values = (spread * rng.uniform(1, 2, (5, count))).astype(np.float32)
    low_bits = np.uint32(0xFFFF) if kind == "bf16" else np.uint32(0x1FFF)
    values[:4] = (values[:4].view(np.uint32) & ~low_bits).view(np.float32)
    words = values[:4].astype(np.float16).view(np.uint16) if kind == "f16" else values[:4].view(np.uint32) >> 16
    words = words.astype(np.uint32)
    a, b, c = words[0] | words[1] << np.uint32(16), words[2] | words[3] << np.uint32(16), values[4].view(np.uint32)
    low, high = dot2_bounds(a, b, c, kind)
    (book,) = AsmBlock(f"v_dot2_f32_{kind} $0, $1, $2, $3", THREE).run(a, b, c)
    cases = [([(v[0], v[2]), (v[1], v[3])], v[4]) for v in values.T.astype(float).tolist()]
    silicon = [np.array([silicon_dot2(gfx12, *case) for case in cases], np.float32) for gfx12 in (True, False)]
    for results in (book.view(np.float32), *silicon):
        assert ((low <= results) & (results <= high)).all()
    assert any((result != book.view(np.float32)).any() for result in silicon)
    (swapped,) = AsmBlock(f"v_dot2_f32_{kind} $0, $1, $2, $3", THREE).run(a, b >> np.uint32(16) | b << np.uint32(16), c)
    outside = (swapped.view(np.float32) < low) | (swapped.view(np.float32) > high)
    assert outside.mean() > 0.9


def test_dot2_bounds_of_the_published_capture() -> None:
    """gfx1151: -1 + 4*8 + 3*8 gave 55.0000038 (ROCm/rocm-systems, issue 12056)."""
    a, b, c = (np.array([word], np.uint32) for word in (0x42004400, 0x48004800, 0xBF800000))  # (4, 3), (8, 8), -1
    low, high = dot2_bounds(a, b, c, "f16")
    assert 55 - 2**-15 < low[0] <= 55 and 55 + 2**-18 <= high[0] < 55 + 2**-15
    assert np.float32(silicon_dot2(False, [(4, 8), (3, 8)], -1)) == np.float32(55.0000038)
    zero = np.zeros(1, np.uint32)
    low, high = dot2_bounds(zero, zero, zero, "f16")
    assert low[0] <= 0 <= high[0] and high[0] - low[0] < 2e-44
    with pytest.raises(ValueError, match="infinities"):
        dot2_bounds(a, b, np.array([0x7F800000], np.uint32), "f16")

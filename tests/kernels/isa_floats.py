"""Floating-point pieces of AMD's vector instructions on bit patterns, in numpy, each rounded exactly once.

MODE is as Triton sets it (.amdhsa_float_round_mode 0, .amdhsa_float_denorm_mode 3): round to nearest even, subnormals
kept. A NaN's sign and payload are not modelled: every NaN result is the positive quiet one. Books: "RDNA4" Instruction
Set Architecture Reference Guide (7-April-2025), "RDNA3.5" Instruction Set Architecture Reference Guide.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class AsmError(ValueError):
    """An assembly block which the hardware or the assembler would refuse, or which this evaluator does not model."""


def as_float(words: npt.NDArray[Any], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Bits -> floats: uint32 read as float32, or the low 16 bits as float16."""
    return words.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def as_bits(values: npt.NDArray[Any]) -> Words:
    """Floats -> bits (float32, or float16 in the low half), with one NaN."""
    one_nan = np.where(np.isnan(values), values.dtype.type(np.nan), values).astype(values.dtype)
    return one_nan.view(f"u{one_nan.dtype.itemsize}").astype(np.uint32)


def round_to(values: npt.NDArray[Any], dtype: Any, clamp: bool = False) -> Words:
    """Nearest even; `clamp` is [0, 1] with -0 to +0 (RDNA4 7.7) and NaN to +0 (DX10_CLAMP, which Triton leaves on)."""
    with np.errstate(all="ignore"):
        rounded = values.astype(dtype)
    if clamp:
        rounded = np.where(rounded > 0, np.minimum(rounded, dtype(1)), dtype(0)).astype(dtype)
    return as_bits(rounded)


def widen(halves: Words, kind: str) -> Floats:
    """float16 ("f16") or bfloat16 ("bf16") in the low 16 bits -> float32, exactly."""
    return as_float(halves, np.float16).astype(np.float32) if kind == "f16" else as_float(halves << np.uint32(16))


def fused(a: npt.NDArray[Any], b: npt.NDArray[Any], c: npt.NDArray[Any]) -> Doubles:
    """a*b+c of float32 or float16 values in float64, rounded to odd, so that rounding it again to either is exact.

    The product is exact in float64 and Knuth's two-sum gives the sum's error. Rounding to odd: Boldo and Melquiond,
    "Emulation of a FMA and correctly rounded sums", IEEE Transactions on Computers 57 (2008).
    """
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    outward = np.where(np.signbit(error) == np.signbit(total), 1, -1)
    return np.where(inexact, bits + outward, bits).view(np.float64)


def toward_zero(word: Words) -> Words:
    """float32 bits -> float16 bits, rounded toward zero (so a finite value never becomes infinity)."""
    value, nearest = np.abs(as_float(word)), round_to(as_float(word), np.float16)
    too_far = np.abs(as_float(nearest, np.float16).astype(np.float32)) > value
    cut: Words = nearest - too_far.astype(np.uint32)
    return cut


def from_fp8(codes: npt.NDArray[Any]) -> Words:
    """Low byte as OCP e4m3 (bias 7, no infinity, NaN is S.1111.111) -> float32 bits: RDNA4 16.8, fp8_to_f32."""
    code = codes.astype(np.int64) & 255
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    value = np.where(code & 127 == 127, np.nan, np.where(code > 127, -value, value))
    return as_bits(value.astype(np.float32))


def to_fp8(word: Words) -> Words:
    """float32 bits -> OCP e4m3 code, nearest even. The grid's step is 2**(exponent - 3), 2**-9 below 2**-6.

    Raises AsmError past 464 (halfway from 448, the largest, to the next step): there MODE.FP16_OVFL, which Triton sets
    in some kernels and not in others, chooses between NaN and 448.
    """
    value = as_float(word).astype(np.float64)
    if (np.abs(value) > 464).any():
        raise AsmError("v_cvt_pk_fp8_f32 of more than 448: NaN or 448 by MODE.FP16_OVFL; clamp the input first")
    finite = np.where(np.isnan(value), 0, np.abs(value))
    exponent = np.frexp(np.maximum(finite, 2.0**-6))[1] - 1
    steps = np.rint(np.ldexp(finite, 3 - exponent)).astype(np.int64)  # 8..16 for normal numbers, 0..8 below
    code: Words = np.where(np.isnan(value), 127, steps + (exponent + 6) * 8).astype(np.uint32)
    return code | np.signbit(value).astype(np.uint32) << np.uint32(7)


def dot2_bounds(a: Words, b: Words, c: Words, kind: str) -> tuple[Floats, Floats]:
    """All that v_dot2_f32_f16 (kind "f16") or v_dot2_f32_bf16 ("bf16") may return: [low, high], both float32.

    a, b: packed pairs; c: float32 bits; all finite (else ValueError). RDNA4 and RDNA3.5 16.10 write two additions in
    float32 and say nothing of fusing, order between roundings or subnormals, and silicon does neither: captures on
    gfx1201 and on gfx11 (ROCm/rocm-systems, issue 12056 and rocjitsu's tests made from it) show the three terms cut
    to one grid, unit = 2**(largest exponent - 24), gfx12 by flooring, gfx11 with opposing terms negated by flipping
    bits; then one rounding. So -1 + 4*8 + 3*8 gave 55.0000038. Each of these, like two float32 additions in any order,
    stays within 4 units of the exact sum before the last rounding. gfx11 also takes subnormal bf16 factors, a subnormal
    c and a subnormal result as zero; that is allowed on every architecture here.
    """
    factors = [(widen(a >> np.uint32(s), kind), widen(b >> np.uint32(s), kind)) for s in (0, 16)]
    addend = as_float(c).astype(np.float64)
    smallest = 2.0 ** (-14 if kind == "f16" else -126)
    terms, flushable = [addend], [np.abs(addend) < 2.0**-126]
    exponent = np.where(addend != 0, np.maximum(np.frexp(addend)[1] - 1, -126), -126).astype(np.int64)
    for left, right in factors:
        x, y = left.astype(np.float64), right.astype(np.float64)
        terms.append(x * y)
        flushable.append((kind == "bf16") & ((np.abs(x) < smallest) | (np.abs(y) < smallest)))
        grid = sum(np.frexp(np.maximum(np.abs(v), smallest))[1] - 1 for v in (x, y))
        exponent = np.maximum(exponent, np.where(terms[-1] != 0, grid, -126))
    if not all(np.isfinite(term).all() for term in terms):
        raise ValueError("dot2_bounds: infinities and NaNs have no interval; compare them by class")
    # 2**-48 of the largest term covers this float64 sum's own rounding.
    slack = np.ldexp(4 + 2.0**-20, exponent - 24) + 2.0**-149
    low = sum(np.where(f, np.minimum(t, 0), t) for t, f in zip(terms, flushable, strict=True)) - slack
    high = sum(np.where(f, np.maximum(t, 0), t) for t, f in zip(terms, flushable, strict=True)) + slack
    low = np.where((low > 0) & (low < 2.0**-126), 0, low)
    high = np.where((high < 0) & (high > -(2.0**-126)), 0, high)
    with np.errstate(over="ignore"):
        down, up = low.astype(np.float32), high.astype(np.float32)
    return (
        np.where(down > low, np.nextafter(down, np.float32(-np.inf)), down),
        np.where(up < high, np.nextafter(up, np.float32(np.inf)), up),
    )

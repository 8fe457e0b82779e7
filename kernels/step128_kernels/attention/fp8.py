"""FP8 e4m3 in attention kernels: two bytes of a 16-bit word to float16, and float32 to a byte.

Every e4m3 value is a float16 value, so the conversion is exact. gfx12 has an instruction for it; gfx11 has none, and
there a byte is moved to where float16 has sign, exponent and mantissa (exponent bias 7 instead of 15) and multiplied by
256. The portable functions do what the assembly does, in plain Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two int16 words in, each with two FP8 bytes; out: per word one pair of float32, low byte first.
RDNA4_TO_PAIRS = tl.constexpr("v_cvt_pk_f32_fp8 $0, $2.l\nv_cvt_pk_f32_fp8 $1, $2.h")
RDNA4_TO_PAIRS_CONSTRAINTS = tl.constexpr("=&v,=&v,v")
# Two float32 to two float16; exact for what comes from FP8.
TO_HALVES = tl.constexpr("v_cvt_pk_rtz_f16_f32 $0, $1, $2")
TO_HALVES_CONSTRAINTS = tl.constexpr("=v,v,v")
# Two int16 words in; out: float16 of both low bytes, float16 of both high bytes. An arithmetic shift by one copies the
# sign to where the mask clears it again; NaN (0x7f, 0xff) becomes 480 or -480.
RDNA3_TO_HALVES = tl.constexpr(
    "v_lshlrev_b32 $0, 8, $2\n"
    "v_pk_ashrrev_i16 $1, 1, $2 op_sel_hi:[0,1]\n"
    "v_pk_ashrrev_i16 $0, 1, $0 op_sel_hi:[0,1]\n"
    "v_and_b32 $1, 0xbf80bf80, $1\n"
    "v_and_b32 $0, 0xbf80bf80, $0\n"
    "v_pk_mul_f16 $1, $1, 0x5c00 op_sel_hi:[1,0]\n"
    "v_pk_mul_f16 $0, $0, 0x5c00 op_sel_hi:[1,0]"
)
RDNA3_TO_HALVES_CONSTRAINTS = tl.constexpr("=&v,=&v,v")

_LARGEST = tl.constexpr(448.0)
_LEAST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMAL_STEPS = tl.constexpr(512.0)  # a subnormal is a multiple of 2**-9
_ROUND_TO_WHOLE = tl.constexpr(1.5 * 2.0**23)
_BIAS_DIFFERENCE = tl.constexpr(127 - 7)


@triton.jit
def bytes_to_halves(word):
    """float16 of the low and of the high byte of int16 words, in plain Triton; NaN becomes 480 or -480."""
    wide = word.to(tl.int32)
    low = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
    high = ((wide & 0x7F00) >> 1) | (wide & 0x8000)
    return (
        low.to(tl.int16).to(tl.float16, bitcast=True) * 256.0,
        high.to(tl.int16).to(tl.float16, bitcast=True) * 256.0,
    )


@triton.jit
def pairs_to_floats(word, ELEMENT: tl.constexpr):
    """float32 of the low and of the high half of int32 words that hold two bfloat16 ("bf16") or float16 ("fp16")."""
    if ELEMENT == "bf16":
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def float_to_byte(value):
    """e4m3 code (int32, 0..255) of float32 values: clamped to +-448, to nearest even; NaN is 0x7f.

    Written out since Triton's interpreter rounds its own conversion wrongly, and no GPU needs it to be fast.
    """
    magnitude = tl.minimum(tl.abs(value), _LARGEST)
    steps = (magnitude * _SUBNORMAL_STEPS + _ROUND_TO_WHOLE) - _ROUND_TO_WHOLE
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    code = tl.where(magnitude < _LEAST_NORMAL, steps.to(tl.int32), rounded - (_BIAS_DIFFERENCE << 3))
    code = tl.where(value != value, 0x7F, code)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return code | tl.where(value != value, 0, sign)

"""NL4 indices to codebook values inside Triton kernels: byte permutes on AMD GPUs, table reads anywhere else.

``v_perm_b32`` picks four bytes out of eight by a selector byte each, so two permutes read a 16-entry table of bytes
(entries 0-7 and 8-15) and a third takes the right one of both by the index's top bit. Every function here has two
bodies, chosen by the constexpr ``AMD``: the assembly, and plain Triton that runs on other GPUs and in the interpreter.
The tests execute the assembly, instruction by instruction, and compare.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from step128_kernels.codebook import CODEBOOK, SCALE_DIVISOR

PERMUTE = tl.constexpr("v_perm_b32 $0, $1, $2, $3")
PERMUTE_CONSTRAINTS = tl.constexpr("=v,v,v,v")
PERMUTE_TABLE_CONSTRAINTS = tl.constexpr("=v,s,s,v")
DOT2_BFLOAT16 = tl.constexpr("v_dot2_f32_bf16 $0, $1, $2, $3")
DOT2_FLOAT16 = tl.constexpr("v_dot2_f32_f16 $0, $1, $2, $3")
DOT2_CONSTRAINTS = tl.constexpr("=v,v,v,v")

CODE_OFFSET = tl.constexpr(128)
"""Added to codes that are handled as unsigned bytes: ``v_cvt_f32_ubyte`` costs one instruction, signed bytes two."""

_DIVISOR = tl.constexpr(float(SCALE_DIVISOR))
_LOW_THREE_BITS = tl.constexpr(0x07070707)
_TOP_BIT_AS_FOUR = tl.constexpr(0x04040404)
_OWN_BYTE = tl.constexpr(0x03020100)
_FIRST_PAIR = tl.constexpr(0x05010400)  # bytes 0 and 1 of two tables, interleaved to two 16-bit values
_SECOND_PAIR = tl.constexpr(0x07030602)  # bytes 2 and 3


def _words(table: bytes) -> tl.constexpr:
    """Four little-endian int32 of a 16-byte table."""
    return tl.constexpr(struct.unpack("<4i", table))


def _bits16(dtype: str) -> list[bytes]:
    """The codes over 128 as little-endian 16-bit floats; both types hold them exactly."""
    if dtype == "fp16":
        return [struct.pack("<e", code / SCALE_DIVISOR) for code in CODEBOOK]
    return [struct.pack("<f", code / SCALE_DIVISOR)[2:] for code in CODEBOOK]


_BYTES = _words(bytes(code + 128 for code in CODEBOOK))
_BF16_LOW = _words(b"".join(bits[:1] for bits in _bits16("bf16")))
_BF16_HIGH = _words(b"".join(bits[1:] for bits in _bits16("bf16")))
_FP16_LOW = _words(b"".join(bits[:1] for bits in _bits16("fp16")))
_FP16_HIGH = _words(b"".join(bits[1:] for bits in _bits16("fp16")))


@triton.jit
def permute(high, low, selector):
    """Bytes of ``high:low`` (8 bytes, ``low`` first) that the selector's bytes 0..7 name; int32 tensors."""
    return tl.inline_asm_elementwise(
        PERMUTE, PERMUTE_CONSTRAINTS, [high, low, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _look_up(table: tl.constexpr, index, upper_half):
    """Entries of a 16-byte table: ``index`` holds four 3-bit selectors, ``upper_half`` picks entries 8-15."""
    low = tl.inline_asm_elementwise(
        PERMUTE, PERMUTE_TABLE_CONSTRAINTS, [table[1], table[0], index], dtype=tl.int32, is_pure=True, pack=1
    )
    high = tl.inline_asm_elementwise(
        PERMUTE, PERMUTE_TABLE_CONSTRAINTS, [table[3], table[2], index], dtype=tl.int32, is_pure=True, pack=1
    )
    return permute(high, low, upper_half)


@triton.jit
def _pairs_of(low_table: tl.constexpr, high_table: tl.constexpr, index, upper_half):
    low = _look_up(low_table, index, upper_half)
    high = _look_up(high_table, index, upper_half)
    return permute(high, low, _FIRST_PAIR), permute(high, low, _SECOND_PAIR)


@triton.jit
def code_pairs(word, FP16: tl.constexpr):
    """Eight codes of an int32 word of a tile, over 128, as four int32 of two 16-bit floats: weights (0, 1) .. (6, 7).

    23 VALU instructions for 8 weights. AMD only: elsewhere see :func:`code`.
    """
    first, second = word & _LOW_THREE_BITS, (word >> 4) & _LOW_THREE_BITS
    first_upper = ((word >> 1) & _TOP_BIT_AS_FOUR) | _OWN_BYTE
    second_upper = ((word >> 5) & _TOP_BIT_AS_FOUR) | _OWN_BYTE
    if FP16:
        p01, p23 = _pairs_of(_FP16_LOW, _FP16_HIGH, first, first_upper)
        p45, p67 = _pairs_of(_FP16_LOW, _FP16_HIGH, second, second_upper)
    else:
        p01, p23 = _pairs_of(_BF16_LOW, _BF16_HIGH, first, first_upper)
        p45, p67 = _pairs_of(_BF16_LOW, _BF16_HIGH, second, second_upper)
    return p01, p23, p45, p67


@triton.jit
def code(word, weight: tl.constexpr, codebook_ptr):
    """The code of weight 0..7 of an int32 word of a tile, over 128, from a table of 16 float32."""
    index = (word >> (8 * (weight % 4) + 4 * (weight // 4))) & 15
    return tl.load(codebook_ptr + index)


@triton.jit
def code_bytes(word, codebook_ptr, AMD: tl.constexpr):
    """Eight codes plus CODE_OFFSET as unsigned bytes of two int32: weights 0..3, weights 4..7.

    13 VALU instructions for 8 weights on AMD GPUs.
    """
    if AMD:
        first, second = word & _LOW_THREE_BITS, (word >> 4) & _LOW_THREE_BITS
        first_upper = ((word >> 1) & _TOP_BIT_AS_FOUR) | _OWN_BYTE
        second_upper = ((word >> 5) & _TOP_BIT_AS_FOUR) | _OWN_BYTE
        low, high = _look_up(_BYTES, first, first_upper), _look_up(_BYTES, second, second_upper)
    else:
        low, high = tl.zeros_like(word), tl.zeros_like(word)
        for byte in tl.static_range(4):
            low |= (code(word, byte, codebook_ptr) * _DIVISOR + CODE_OFFSET).to(tl.int32) << (8 * byte)
            high |= (code(word, byte + 4, codebook_ptr) * _DIVISOR + CODE_OFFSET).to(tl.int32) << (8 * byte)
    return low, high


@triton.jit
def dot2(weights, x, total, FP16: tl.constexpr):
    """``total + w0 * x0 + w1 * x1`` with 16-bit pairs in int32 and a float32 total."""
    if FP16:
        total = tl.inline_asm_elementwise(
            DOT2_FLOAT16, DOT2_CONSTRAINTS, [weights, x, total], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        total = tl.inline_asm_elementwise(
            DOT2_BFLOAT16, DOT2_CONSTRAINTS, [weights, x, total], dtype=tl.float32, is_pure=True, pack=1
        )
    return total


@triton.jit
def scale_of(scales, group: tl.constexpr):
    """float32 scale of group 0 or 1 from an int32 that holds the float16 scales of both."""
    return (scales >> (16 * group)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

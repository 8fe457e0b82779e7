"""What each AMD vector opcode that our inline assembly may use does to 32-bit words: AMD's pseudo-code, in numpy.

Every row of OPCODES names its section, which has the same number in both books: "RDNA4" Instruction Set Architecture
Reference Guide (7-April-2025) for gfx1201, "RDNA3.5" Instruction Set Architecture Reference Guide for gfx1151.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from isa_floats import (
    AsmError,
    Doubles,
    Words,
    as_bits,
    as_float,
    from_fp8,
    fused,
    round_to,
    to_fp8,
    toward_zero,
    widen,
)

VOP2, VOP1, VOP3P, VOP3 = "16.7 VOP2", "16.8 VOP1", "16.10 VOP3P", "16.12 VOP3"
EVERY_ARCHITECTURE = frozenset({"gfx1201", "gfx1151"})
GFX12 = frozenset({"gfx1201"})
LOW4, BYTE, LOW16 = np.uint32(0xF), np.uint32(0xFF), np.uint32(0xFFFF)


@dataclass(frozen=True)
class Modifiers:
    """Modifiers of one instruction; an empty tuple where the text has none (the default depends on the opcode)."""

    op_sel: tuple[int, ...] = ()
    op_sel_hi: tuple[int, ...] = ()
    neg_lo: tuple[int, ...] = ()
    neg_hi: tuple[int, ...] = ()
    byte_sel: int = 0
    clamp: bool = False


Evaluate = Callable[[list[Words], Modifiers], npt.NDArray[Any]]


@dataclass(frozen=True)
class Opcode:
    """One opcode: `evaluate` takes the source words and the modifiers and returns the destination's bits."""

    evaluate: Evaluate
    sources: int
    section: str
    modifiers: str = ""
    constants: str = "word"  # sources that may be constants: word (any, 32 bits), f16 or u16 (halves), last, mix, none
    half_sources: tuple[int, ...] = ()  # sources that may be written $n.l or $n.h
    needs_half: bool = False  # 16-bit operands must name their half, because Triton assembles with real-true16
    destination: str = "word"  # word, half (16 bits; the others keep their value) or pair (64 bits)
    architectures: frozenset[str] = EVERY_ARCHITECTURE


def _halves(words: list[Words], m: Modifiers, high: bool) -> list[Words]:
    """The 16-bit operands of one half of a packed instruction: RDNA4 7.7, OPSEL, OPSEL_HI, NEG and NEG_HI."""
    select = (m.op_sel_hi or (1,) * len(words)) if high else (m.op_sel or (0,) * len(words))
    negate = (m.neg_hi if high else m.neg_lo) or (0,) * len(words)
    return [
        ((word >> np.uint32(16 * s)) & LOW16) ^ np.uint32(n << 15)
        for word, s, n in zip(words, select, negate, strict=True)
    ]


def _packed(lane: Callable[[list[Words], bool], Words], sources: int, modifiers: str, constants: str) -> Opcode:
    """A packed instruction from what one half does (to the 16-bit operands, and clamp)."""

    def evaluate(s: list[Words], m: Modifiers) -> Words:
        return lane(_halves(s, m, False), m.clamp) | lane(_halves(s, m, True), m.clamp) << np.uint32(16)

    return Opcode(evaluate, sources, VOP3P, modifiers, constants)


def _packed_f16(formula: Callable[..., Doubles], sources: int) -> Opcode:
    def lane(halves: list[Words], clamp: bool) -> Words:
        with np.errstate(all="ignore"):
            wide = [as_float(half, np.float16).astype(np.float64) for half in halves]
            return round_to(formula(*wide), np.float16, clamp)

    return _packed(lane, sources, "op_sel op_sel_hi neg_lo neg_hi clamp", "f16")


def _dot2(kind: str) -> Opcode:
    """tmp = S2; tmp += S0.lo*S1.lo; tmp += S0.hi*S1.hi, each in float32. Silicon cuts corners: isa_floats.dot2_bounds.

    CLAMP is not modelled (the book clamps, captures of gfx1201 do not), nor OPSEL (7.7: zero for a 32-bit result).
    """

    def evaluate(s: list[Words], m: Modifiers) -> Words:
        if any(m.neg_lo[2:] + m.neg_hi[2:]):
            raise AsmError("v_dot2_f32: RDNA4 7.7 does not say what NEG does to the 32-bit source")
        total = as_float(s[2])
        with np.errstate(all="ignore"):
            for a, b, _ in (_halves(s, m, False), _halves(s, m, True)):
                total = total + widen(a, kind) * widen(b, kind)
        return as_bits(total)

    return Opcode(evaluate, 3, VOP3P, "neg_lo neg_hi", "last")


def _dot4(s: list[Words], m: Modifiers) -> Words:
    """S0 and S1 are signed where NEG[0] and NEG[1] say so; NEG[2] and NEG_HI must be zero (RDNA4 7.7)."""
    signed = m.neg_lo or (0, 0, 0)
    if any(signed[2:] + m.neg_hi):
        raise AsmError("v_dot4_i32_iu8: only neg_lo[0] and neg_lo[1] (signedness) may be set (RDNA4 7.7)")
    total = s[2].view(np.int32).astype(np.int64)
    for byte in range(4):
        a, b = ((word >> np.uint32(8 * byte)).astype(np.uint8) for word in s[:2])
        left, right = (v.view(np.int8) if is_signed else v for v, is_signed in zip((a, b), signed, strict=False))
        total = total + left.astype(np.int64) * right
    if m.clamp:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return total.astype(np.uint32)


def _perm(high: Words, low: Words, selectors: Words) -> Words:
    """Each byte of S2 picks a byte of {S0, S1} (0..3 in S1), a sign of bytes 1, 3, 5, 7 (8..11), 0x00 (12) or 0xff."""
    data = np.stack([word >> np.uint32(8 * i) & BYTE for word in (low, high) for i in range(4)])
    signs = np.where(data[1::2] >= 128, BYTE, np.uint32(0))
    table = np.concatenate([data, signs, np.zeros_like(data[:1]), np.full_like(data[:1], 255)])
    result = np.zeros_like(low)
    for i in range(4):
        choice = np.minimum(selectors >> np.uint32(8 * i) & BYTE, np.uint32(13)).astype(np.int64)
        result |= np.take_along_axis(table, choice[None], 0)[0] << np.uint32(8 * i)
    return result


def _fma_mix(s: list[Words], m: Modifiers) -> Words:
    """Source i is float32 unless OPSEL_HI[i] (the assembler's default here is 0); then the half that OPSEL[i] names."""
    high, half = m.op_sel or (0, 0, 0), m.op_sel_hi or (0, 0, 0)
    a, b, c = (
        widen(w >> np.uint32(16 * h), "f16") if f else as_float(w) for w, h, f in zip(s, high, half, strict=True)
    )
    return round_to(fused(a, b, c), np.float32, m.clamp)


def _pair_from_fp8(s: list[Words], m: Modifiers) -> npt.NDArray[np.uint64]:
    """The two bytes of the half that OPSEL[0] names -> D0[31:0] and D0[63:32]."""
    half = s[0] >> np.uint32(16 * (m.op_sel or (0,))[0])
    return from_fp8(half).astype(np.uint64) | from_fp8(half >> np.uint32(8)).astype(np.uint64) << np.uint64(32)


def _add(s: list[Words], m: Modifiers) -> Words:
    total = s[0].astype(np.uint64) + s[1]
    return (np.minimum(total, 2**32 - 1) if m.clamp else total).astype(np.uint32)


def _five(word: Words) -> Words:
    return word & np.uint32(31)


def _align(high: Words, low: Words, bits: Words) -> Words:
    return ((high.astype(np.uint64) << np.uint64(32) | low) >> bits.astype(np.uint64)).astype(np.uint32)


def _bits(formula: Callable[..., Words], sources: int, section: str, **extra: Any) -> Opcode:
    """An opcode that looks at whole words only."""
    return Opcode(lambda s, m: formula(*s), sources, section, **extra)


def _arithmetic_shift(a: Words, b: Words) -> Words:
    return (b.view(np.int32) >> _five(a).view(np.int32)).view(np.uint32)


def _signed_shift(h: list[Words], _: bool) -> Words:
    value = (h[1] & LOW16).astype(np.uint16).view(np.int16).astype(np.int32)
    return (value >> (h[0] & LOW4).astype(np.int32)).view(np.uint32) & LOW16


def _ubyte(i: int) -> Opcode:
    return _bits(lambda a: as_bits((a >> np.uint32(8 * i) & BYTE).astype(np.float32)), 1, VOP1)


OPCODES: dict[str, Opcode] = {
    "v_mov_b32": _bits(lambda a: a, 1, VOP1),
    "v_not_b32": _bits(lambda a: ~a, 1, VOP1),
    "v_and_b32": _bits(lambda a, b: a & b, 2, VOP2),
    "v_or_b32": _bits(lambda a, b: a | b, 2, VOP2),
    "v_xor_b32": _bits(lambda a, b: a ^ b, 2, VOP2),
    "v_lshlrev_b32": _bits(lambda a, b: b << _five(a), 2, VOP2),
    "v_lshrrev_b32": _bits(lambda a, b: b >> _five(a), 2, VOP2),
    "v_ashrrev_i32": _bits(_arithmetic_shift, 2, VOP2),
    "v_add_nc_u32": Opcode(_add, 2, VOP2, "clamp"),
    "v_and_or_b32": _bits(lambda a, b, c: a & b | c, 3, VOP3),
    "v_or3_b32": _bits(lambda a, b, c: a | b | c, 3, VOP3),
    "v_lshl_or_b32": _bits(lambda a, b, c: a << _five(b) | c, 3, VOP3),
    "v_lshl_add_u32": _bits(lambda a, b, c: (a << _five(b)) + c, 3, VOP3),
    "v_alignbit_b32": _bits(lambda a, b, c: _align(a, b, _five(c)), 3, VOP3, half_sources=(2,)),
    "v_alignbyte_b32": _bits(lambda a, b, c: _align(a, b, (c & np.uint32(3)) * 8), 3, VOP3, half_sources=(2,)),
    "v_bfe_u32": _bits(lambda a, b, c: a >> _five(b) & (np.uint32(1) << _five(c)) - np.uint32(1), 3, VOP3),
    "v_bfi_b32": _bits(lambda a, b, c: a & b | ~a & c, 3, VOP3),
    "v_perm_b32": _bits(_perm, 3, VOP3),
    "v_dot2_f32_f16": _dot2("f16"),
    "v_dot2_f32_bf16": _dot2("bf16"),
    "v_dot4_i32_iu8": Opcode(_dot4, 3, VOP3P, "neg_lo neg_hi clamp"),
    "v_pk_fma_f16": _packed_f16(fused, 3),
    "v_pk_mul_f16": _packed_f16(lambda a, b: a * b, 2),
    "v_pk_add_f16": _packed_f16(lambda a, b: a + b, 2),
    "v_pk_lshlrev_b16": _packed(lambda h, _: h[1] << (h[0] & LOW4) & LOW16, 2, "op_sel op_sel_hi", "u16"),
    "v_pk_lshrrev_b16": _packed(lambda h, _: h[1] >> (h[0] & LOW4), 2, "op_sel op_sel_hi", "u16"),
    "v_pk_ashrrev_i16": _packed(_signed_shift, 2, "op_sel op_sel_hi", "u16"),
    "v_fma_f32": Opcode(lambda s, m: round_to(fused(*map(as_float, s)), np.float32, m.clamp), 3, VOP3, "clamp"),
    "v_fma_mix_f32": Opcode(_fma_mix, 3, VOP3P, "op_sel op_sel_hi clamp", "mix"),
    "v_cvt_f32_f16": _bits(
        lambda a: as_bits(widen(a, "f16")), 1, VOP1, constants="none", half_sources=(0,), needs_half=True
    ),
    "v_cvt_f16_f32": _bits(lambda a: round_to(as_float(a), np.float16), 1, VOP1, needs_half=True, destination="half"),
    "v_cvt_pk_rtz_f16_f32": _bits(lambda a, b: toward_zero(a) | toward_zero(b) << np.uint32(16), 2, VOP2),
    "v_cvt_f32_ubyte0": _ubyte(0),
    "v_cvt_f32_ubyte1": _ubyte(1),
    "v_cvt_f32_ubyte2": _ubyte(2),
    "v_cvt_f32_ubyte3": _ubyte(3),
    "v_cvt_pk_f32_fp8": Opcode(
        _pair_from_fp8, 1, VOP1, "op_sel", "none", half_sources=(0,), destination="pair", architectures=GFX12
    ),
    "v_cvt_f32_fp8": Opcode(
        lambda s, m: from_fp8(s[0] >> np.uint32(8 * m.byte_sel)), 1, VOP1, "byte_sel", "none", architectures=GFX12
    ),
    "v_cvt_pk_fp8_f32": Opcode(
        lambda s, m: to_fp8(s[0]) | to_fp8(s[1]) << np.uint32(8),
        2,
        VOP3,
        "op_sel",
        destination="half",
        architectures=GFX12,
    ),
}
OPCODES["v_cvt_pkrtz_f16_f32"] = OPCODES["v_cvt_pk_rtz_f16_f32"]  # the assembler takes both spellings

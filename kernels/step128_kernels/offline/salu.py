"""What each scalar instruction computes, on plain integers: the integer part of the scalar ALU of RDNA3 and RDNA4.

Source: AMD, "RDNA3.5" and "RDNA4" Instruction Set Architecture reference guides, chapters on SOP1, SOP2, SOPC and SOPK.
An opcode that is not in these tables is an error for the counter, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Result = tuple[int, int | None]
"""The destination's value and SCC; SCC ``None`` leaves it as it was."""


@dataclass(frozen=True)
class ScalarOp:
    """Meaning of one opcode."""

    compute: Callable[..., Result]
    """Takes the sources as unsigned integers of ``source_bits`` (SCC last if ``reads_scc``)."""
    source_bits: tuple[int, ...]
    destination_bits: int
    """0 for comparisons, which only write SCC."""
    reads_scc: bool = False
    reads_destination: bool = False
    """The destination is also the first source (SOPK arithmetic, bit set)."""


def signed(value: int, bits: int = 32) -> int:
    """Read an unsigned integer of ``bits`` as two's complement."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _mask(bits: int) -> int:
    return (1 << bits) - 1


def _with_scc(compute: Callable[..., int], bits: int) -> Callable[..., Result]:
    """SCC says whether the result is not zero."""

    def run(*sources: int) -> Result:
        value = compute(*sources) & _mask(bits)
        return value, int(value != 0)

    return run


def _plain(compute: Callable[..., int], bits: int) -> Callable[..., Result]:
    return lambda *sources: (compute(*sources) & _mask(bits), None)


def _compare(compute: Callable[..., bool]) -> Callable[..., Result]:
    return lambda *sources: (0, int(compute(*sources)))


def _carry(compute: Callable[..., int]) -> Callable[..., Result]:
    """SCC is the unsigned carry or borrow."""

    def run(*sources: int) -> Result:
        exact = compute(*sources)
        return exact & 0xFFFFFFFF, int(not 0 <= exact <= 0xFFFFFFFF)

    return run


def _overflow(compute: Callable[[int, int], int]) -> Callable[..., Result]:
    """SCC is the signed overflow."""

    def run(a: int, b: int) -> Result:
        exact = compute(signed(a), signed(b))
        return exact & 0xFFFFFFFF, int(not -(1 << 31) <= exact < 1 << 31)

    return run


def _chosen(first: Callable[[int, int], bool]) -> Callable[..., Result]:
    """Minimum and maximum: SCC says that the first source was chosen."""
    return lambda a, b: (a, 1) if first(a, b) else (b, 0)


def _field(value: int, spec: int, bits: int, sign: bool) -> int:
    offset, width = spec & (bits - 1), spec >> 16 & 0x7F
    found = value >> offset & _mask(width) if width else 0
    return signed(found, width) if sign and 0 < width <= bits - offset else found


def _count_leading_same(value: int) -> int:
    """Position of the first bit from the top that differs from the sign; -1 if none."""
    return next((i for i in range(1, 32) if value >> (31 - i) & 1 != value >> 31), -1)


def _first(value: int, order: range) -> int:
    return next((i for i, position in enumerate(order) if value >> position & 1), -1)


def _short(value: int) -> int:
    """A 16-bit constant of SOPK, which the assembler may print unsigned, as the signed number that it is."""
    return signed(value & 0xFFFF, 16)


def _table() -> dict[str, ScalarOp]:
    ops: dict[str, ScalarOp] = {}

    def add(names: str, compute: Callable[..., Result], sources: tuple[int, ...], bits: int, **flags: bool) -> None:
        for name in names.split():
            ops[name] = ScalarOp(compute, sources, bits, **flags)

    two, pair = (32, 32), (64, 64)
    add("s_add_i32 s_add_co_i32", _overflow(lambda a, b: a + b), two, 32)
    add("s_sub_i32 s_sub_co_i32", _overflow(lambda a, b: a - b), two, 32)
    add("s_addk_i32 s_addk_co_i32", _overflow(lambda a, b: a + _short(b)), two, 32, reads_destination=True)
    add("s_add_u32 s_add_co_u32", _carry(lambda a, b: a + b), two, 32)
    add("s_sub_u32 s_sub_co_u32", _carry(lambda a, b: a - b), two, 32)
    add("s_addc_u32 s_add_co_ci_u32", _carry(lambda a, b, c: a + b + c), two, 32, reads_scc=True)
    add("s_subb_u32 s_sub_co_ci_u32", _carry(lambda a, b, c: a - b - c), two, 32, reads_scc=True)
    add("s_add_nc_u64 s_add_u64", _plain(lambda a, b: a + b, 64), pair, 64)
    add("s_sub_nc_u64 s_sub_u64", _plain(lambda a, b: a - b, 64), pair, 64)
    add("s_mul_u64", _plain(lambda a, b: a * b, 64), pair, 64)
    add("s_mul_i32", _plain(lambda a, b: a * b, 32), two, 32)
    add("s_mulk_i32", _plain(lambda a, b: a * _short(b), 32), two, 32, reads_destination=True)
    add("s_mul_hi_u32", _plain(lambda a, b: a * b >> 32, 32), two, 32)
    add("s_mul_hi_i32", _plain(lambda a, b: signed(a) * signed(b) >> 32, 32), two, 32)
    for n in (1, 2, 3, 4):
        add(f"s_lshl{n}_add_u32", _carry(lambda a, b, n=n: (a << n) + b), two, 32)
    for bits in (32, 64):
        kinds = (bits, bits)
        shift = bits - 1
        add(f"s_lshl_b{bits}", _with_scc(lambda a, b, m=shift: a << (b & m), bits), (bits, 32), bits)
        add(f"s_lshr_b{bits}", _with_scc(lambda a, b, m=shift: a >> (b & m), bits), (bits, 32), bits)
        add(
            f"s_ashr_i{bits}",
            _with_scc(lambda a, b, m=shift: signed(a, m + 1) >> (b & m), bits),
            (bits, 32),
            bits,
        )
        add(f"s_and_b{bits}", _with_scc(lambda a, b: a & b, bits), kinds, bits)
        add(f"s_or_b{bits}", _with_scc(lambda a, b: a | b, bits), kinds, bits)
        add(f"s_xor_b{bits}", _with_scc(lambda a, b: a ^ b, bits), kinds, bits)
        add(f"s_nand_b{bits}", _with_scc(lambda a, b: ~(a & b), bits), kinds, bits)
        add(f"s_nor_b{bits}", _with_scc(lambda a, b: ~(a | b), bits), kinds, bits)
        add(f"s_xnor_b{bits}", _with_scc(lambda a, b: ~(a ^ b), bits), kinds, bits)
        add(f"s_andn2_b{bits} s_and_not1_b{bits}", _with_scc(lambda a, b: a & ~b, bits), kinds, bits)
        add(f"s_orn2_b{bits} s_or_not1_b{bits}", _with_scc(lambda a, b: a | ~b, bits), kinds, bits)
        add(f"s_not_b{bits}", _with_scc(lambda a: ~a, bits), (bits,), bits)
        add(f"s_mov_b{bits}", _plain(lambda a: a, bits), (bits,), bits)
        add(f"s_brev_b{bits}", _plain(lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2), bits), (bits,), bits)
        add(
            f"s_cmov_b{bits}",
            _plain(lambda d, a, c: a if c else d, bits),
            kinds,
            bits,
            reads_scc=True,
            reads_destination=True,
        )
        add(f"s_bfe_u{bits}", _with_scc(lambda a, s, n=bits: _field(a, s, n, False), bits), (bits, 32), bits)
        add(f"s_bfe_i{bits}", _with_scc(lambda a, s, n=bits: _field(a, s, n, True), bits), (bits, 32), bits)
        add(f"s_bfm_b{bits}", _plain(lambda a, b, m=shift: _mask(a & m) << (b & m), bits), two, bits)
        add(
            f"s_bitset0_b{bits}",
            _plain(lambda d, a, m=shift: d & ~(1 << (a & m)), bits),
            (bits, 32),
            bits,
            reads_destination=True,
        )
        add(
            f"s_bitset1_b{bits}",
            _plain(lambda d, a, m=shift: d | 1 << (a & m), bits),
            (bits, 32),
            bits,
            reads_destination=True,
        )
        add(f"s_bitcmp0_b{bits}", _compare(lambda a, b, m=shift: not a >> (b & m) & 1), (bits, 32), 0)
        add(f"s_bitcmp1_b{bits}", _compare(lambda a, b, m=shift: bool(a >> (b & m) & 1)), (bits, 32), 0)
        add(f"s_bcnt1_i32_b{bits}", _with_scc(lambda a: a.bit_count(), 32), (bits,), 32)
        add(f"s_ff1_i32_b{bits} s_ctz_i32_b{bits}", _plain(lambda a, n=bits: _first(a, range(n)), 32), (bits,), 32)
        add(
            f"s_flbit_i32_b{bits} s_clz_i32_u{bits}",
            _plain(lambda a, n=bits: _first(a, range(n - 1, -1, -1)), 32),
            (bits,),
            32,
        )
    add("s_cls_i32 s_flbit_i32", _plain(_count_leading_same, 32), (32,), 32)
    add("s_movk_i32", _plain(_short, 32), (32,), 32)
    add("s_abs_i32", _with_scc(lambda a: abs(signed(a)), 32), (32,), 32)
    add("s_absdiff_i32", _with_scc(lambda a, b: abs(signed(a) - signed(b)), 32), two, 32)
    add("s_sext_i32_i8", _plain(lambda a: signed(a & 0xFF, 8), 32), (32,), 32)
    add("s_sext_i32_i16", _plain(lambda a: signed(a & 0xFFFF, 16), 32), (32,), 32)
    add("s_min_u32", _chosen(lambda a, b: a < b), two, 32)
    add("s_max_u32", _chosen(lambda a, b: a >= b), two, 32)
    add("s_min_i32", _chosen(lambda a, b: signed(a) < signed(b)), two, 32)
    add("s_max_i32", _chosen(lambda a, b: signed(a) >= signed(b)), two, 32)
    add("s_pack_ll_b32_b16", _plain(lambda a, b: a & 0xFFFF | b << 16, 32), two, 32)
    add("s_pack_lh_b32_b16", _plain(lambda a, b: a & 0xFFFF | b & 0xFFFF0000, 32), two, 32)
    add("s_pack_hl_b32_b16", _plain(lambda a, b: a >> 16 | b << 16, 32), two, 32)
    add("s_pack_hh_b32_b16", _plain(lambda a, b: a >> 16 | b & 0xFFFF0000, 32), two, 32)
    orders: dict[str, Callable[[int, int], bool]] = {
        "eq": lambda a, b: a == b,
        "lg": lambda a, b: a != b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
    }
    for name, order in orders.items():
        add(f"s_cmp_{name}_u32 s_cmpk_{name}_u32", _compare(order), two, 0)
        add(f"s_cmp_{name}_i32", _compare(lambda a, b, order=order: order(signed(a), signed(b))), two, 0)
        add(f"s_cmpk_{name}_i32", _compare(lambda a, b, order=order: order(signed(a), _short(b))), two, 0)
        add(f"s_cmp_{name}_u64", _compare(order), pair, 0)
    return ops


SCALAR_OPS = _table()
"""Meaning of every scalar integer opcode by name."""

NO_EFFECT = re.compile(
    r"s_(nop|delay_alu|clause|wait\w*|code_end|barrier\w*|sendmsg|sethalt|sleep\w*|setprio|set_inst_prefetch_distance"
    r"|inst_prefetch|prefetch_\w+|icache_inv|dcache_\w+|gl1_inv|round_mode|denorm_mode|setreg\w*|version|ttracedata\w*)$"
)
"""Scalar instructions that change no register which control flow could read."""

NOT_MODELLED = re.compile(
    r"s_(\w+_f16|\w+_f32|cvt_\w+|getreg_b32|sendmsg_rtn_\w+|memtime|memrealtime|quadmask_b32|wqm_b32)$"
)
"""Scalar instructions whose result is treated as unknown (floats, hardware registers); comparisons write SCC."""

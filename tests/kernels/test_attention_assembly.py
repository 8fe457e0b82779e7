"""What Triton makes of the attention kernels' assembly, and the blocks over all inputs in that order of operands.

Which operand of a block is which element is not taken on trust: the compiled kernel's LLVM code is read for it, since
the interpreter's tests (interpreted/conftest.py) rest on the same order.
"""

import re
from functools import cache

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from isa import AsmBlock, AsmError
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from step128_kernels.attention.fp8 import (
    RDNA3_TO_HALVES,
    RDNA3_TO_HALVES_CONSTRAINTS,
    RDNA4_TO_PAIRS,
    RDNA4_TO_PAIRS_CONSTRAINTS,
    TO_HALVES,
    TO_HALVES_CONSTRAINTS,
)
from step128_kernels.attention.paged import _halves

TARGETS = {"rdna4": "gfx1201", "rdna3": "gfx1151"}
PAIRS, PAIRS_CONSTRAINTS = RDNA4_TO_PAIRS.value, RDNA4_TO_PAIRS_CONSTRAINTS.value
NARROW, NARROW_CONSTRAINTS = TO_HALVES.value, TO_HALVES_CONSTRAINTS.value
SHIFTS, SHIFTS_CONSTRAINTS = RDNA3_TO_HALVES.value, RDNA3_TO_HALVES_CONSTRAINTS.value

# Every pair of FP8 bytes in the low half of a word and, in another order, in the high half.
ELEMENTS = np.stack([np.arange(65536), np.arange(65536) * 40503 % 65536], axis=1).astype(np.uint16)
WORDS = np.ascontiguousarray(ELEMENTS).view(np.uint32)[:, 0]

Halves = tuple[np.ndarray, np.ndarray]


def wanted(nan: float) -> Halves:
    """float16 of the low and of the high bytes of ELEMENTS; ``nan`` stands for 0x7f, and negative for 0xff."""
    value = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).half().numpy()
    value = np.where(np.isnan(value), np.copysign(np.float16(nan), value), value)
    return value[ELEMENTS & 0xFF], value[ELEMENTS >> 8]


def by_rdna4(pairs: str = PAIRS, narrow: str = NARROW, constraints: str = PAIRS_CONSTRAINTS) -> Halves:
    """As ``halves`` joins the two blocks: a pair an element, then both elements' low and both elements' high words."""
    words = [pair.view(np.uint32).reshape(-1, 2) for pair in AsmBlock(pairs, constraints).run(WORDS)]
    block = AsmBlock(narrow, NARROW_CONSTRAINTS)
    low, high = (
        block.run(*(np.ascontiguousarray(pair[:, half]) for pair in words))[0].view(np.float16).reshape(-1, 2)
        for half in (0, 1)
    )
    return low, high


def by_rdna3(text: str = SHIFTS, constraints: str = SHIFTS_CONSTRAINTS) -> Halves:
    low, high = (half.view(np.float16).reshape(-1, 2) for half in AsmBlock(text, constraints).run(WORDS))
    return low, high


def same(found: Halves, right: Halves) -> bool:
    """Bit for bit, the sign of zero included; but any NaN is NaN."""
    return all(
        bool(((a.view(np.uint16) == b.view(np.uint16)) | (np.isnan(a) & np.isnan(b))).all())
        for a, b in zip(map(np.ascontiguousarray, found), map(np.ascontiguousarray, right), strict=True)
    )


def test_the_words_hold_every_pair_in_both_halves() -> None:
    assert all(len(set(ELEMENTS[:, half].tolist())) == 65536 for half in (0, 1))


def test_gfx12_converts_every_pair_exactly() -> None:
    assert same(by_rdna4(), wanted(float("nan")))


def test_gfx11_converts_every_pair_exactly_but_nan_becomes_480() -> None:
    """480 is what 0x7f would be if e4m3 had no NaN; the cache update stores 0x7f for NaN only."""
    assert same(by_rdna3(), wanted(480.0))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("$2.l", "$2.h"),
        ("$2.h", "$2.l"),
        ("f32_fp8 $0, $2.l\nv_cvt_pk_f32_fp8 $1, $2.h", "f32_fp8 $1, $2.l\nv_cvt_pk_f32_fp8 $0, $2.h"),
    ],
)
def test_a_wrong_half_or_register_shows_on_gfx12(right: str, wrong: str) -> None:
    assert right in PAIRS
    assert not same(by_rdna4(PAIRS.replace(right, wrong)), wanted(float("nan")))


@pytest.mark.parametrize("narrow", ["$0, $2, $1", "$0, $1, $1", "$0, $1, 0"])
def test_wrong_operands_of_the_narrowing_show(narrow: str) -> None:
    assert not same(by_rdna4(narrow=NARROW.replace("$0, $1, $2", narrow)), wanted(float("nan")))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("v_lshlrev_b32 $0, 8", "v_lshlrev_b32 $0, 7"),
        ("v_lshlrev_b32 $0, 8", "v_lshrrev_b32 $0, 8"),
        ("v_pk_ashrrev_i16 $1", "v_pk_lshrrev_b16 $1"),  # loses the sign
        ("v_pk_ashrrev_i16 $0", "v_pk_lshrrev_b16 $0"),
        ("v_pk_ashrrev_i16 $1, 1", "v_pk_ashrrev_i16 $1, 2"),
        ("v_and_b32 $1, 0xbf80bf80", "v_and_b32 $1, 0xbfc0bf80"),  # a bit of the other byte
        ("v_and_b32 $0, 0xbf80bf80", "v_and_b32 $0, 0xbf803f80"),
        ("$1, 0x5c00", "$1, 0x5800"),
        ("v_pk_mul_f16 $0, $0", "v_pk_mul_f16 $0, $1"),
        ("v_pk_mul_f16 $0", "v_pk_add_f16 $0"),
    ],
)
def test_a_wrong_opcode_or_constant_shows_on_gfx11(right: str, wrong: str) -> None:
    assert right in SHIFTS
    assert not same(by_rdna3(SHIFTS.replace(right, wrong)), wanted(480.0))


def test_a_constant_for_the_low_half_only_is_refused() -> None:
    """Without op_sel_hi 0 the high element would be multiplied by the constant's high half."""
    with pytest.raises(AsmError, match="op_sel_hi"):
        by_rdna3(SHIFTS.replace("0x5c00 op_sel_hi:[1,0]", "0x5c00"))


def test_a_missing_early_clobber_is_found() -> None:
    for convert in (lambda: by_rdna4(constraints="=v,=&v,v"), lambda: by_rdna3(constraints="=v,=&v,v")):
        with pytest.raises(AsmError, match=r"\$0 needs =&v"):
            convert()


@triton.jit
def convert_words(word_ptr, low_ptr, high_ptr, TARGET: tl.constexpr):
    place = tl.arange(0, 64)
    low, high = _halves(tl.load(word_ptr + place), TARGET)
    tl.store(low_ptr + place, low)
    tl.store(high_ptr + place, high)


@cache
def compiled(target: str) -> dict[str, str]:
    """64 words over one wave: each lane has two, of neighbouring places."""
    types = {"word_ptr": "*i16", "low_ptr": "*fp16", "high_ptr": "*fp16", "TARGET": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(convert_words, types, {"TARGET": target}, aligned)
    return triton.compile(source, target=GPUTarget("hip", TARGETS[target], 32), options={"num_warps": 1}).asm


def sources(target: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Definitions of LLVM's values, and what is stored: (value, pointer argument's buffer)."""
    text = compiled(target)["llir"]
    defined = dict(re.findall(r"^ +(%\d+) = (.*?)(?:, !dbg.*)?$", text, re.MULTILINE))
    stores = re.findall(r"raw\.ptr\.buffer\.store\.i32\(i32 (%\d+), ptr addrspace\(8\) (%\d+)", text)
    return defined, [(value, re.search(r"p1\(ptr addrspace\(1\) (%\d+)", defined[to])[1]) for value, to in stores]


def origin(defined: dict[str, str], value: str) -> list[str]:
    """From a value back to the call that it comes from: the operations without their numbers."""
    steps = []
    while value in defined and " call " not in f" {defined[value]}":
        steps.append(re.sub(r"%\d+", "%", defined[value]))
        value = re.search(r"%\d+", defined[value])[0]
    return [*steps, defined[value]]


def test_operands_on_gfx12_are_in_the_order_that_the_tests_take() -> None:
    """A word's two elements come as a vector, element 0 in its low half; a pair of registers comes back for each, in
    the elements' order; the narrowing takes element 0 first.
    """
    defined, stored = sources("rdna4")
    assert [pointer for _, pointer in stored] == ["%1", "%2"]
    for (value, _), shift in zip(stored, (False, True), strict=True):
        bitcast, narrow = origin(defined, value)
        assert bitcast == "bitcast <2 x half> % to i32"
        assert f'asm "{NARROW}", "{NARROW_CONSTRAINTS}"' in narrow
        for number, element in enumerate(re.findall(r"float (%\d+)", narrow)):
            *steps, call = origin(defined, element)
            assert steps[-1] == f"extractvalue {{ i64, i64 }} %, {number}"
            assert any(step.startswith("lshr i64 %, 32") for step in steps) == shift
            assert f'call {{ i64, i64 }} asm "{PAIRS.replace(chr(10), chr(92) + "0A")}"' in call
            loaded = origin(defined, re.search(r"<2 x i16> (%\d+)", call)[1])
            assert loaded[0] == "bitcast i32 % to <2 x i16>" and "buffer.load.i32" in loaded[-1]


def test_operands_on_gfx11_are_in_the_order_that_the_tests_take() -> None:
    defined, stored = sources("rdna3")
    assert [pointer for _, pointer in stored] == ["%1", "%2"]
    for number, (value, _) in enumerate(stored):
        bitcast, extract, call = origin(defined, value)
        assert bitcast == "bitcast <2 x half> % to i32"
        assert extract == f"extractvalue {{ <2 x half>, <2 x half> }} %, {number}"
        assert f'asm "{SHIFTS.replace(chr(10), chr(92) + "0A")}"' in call


@pytest.mark.parametrize("target", TARGETS)
def test_float16_subnormals_are_kept(target: str) -> None:
    """The bytes below 2**-6 are subnormal float16 before gfx11's multiplication: flushed, they would be zeros."""
    (mode,) = re.findall(r"\.amdhsa_float_denorm_mode_16_64 (\d)", compiled(target)["amdgcn"])
    assert mode == "3"

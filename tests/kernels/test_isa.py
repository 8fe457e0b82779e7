"""The assembly evaluator against results worked out by hand, and every opcode against Triton's own assembler."""

import math

import numpy as np
import pytest
import torch
from isa import OPCODES, AsmBlock, AsmError, assembles

THREE = "=v,v,v,v"

# opcode -> (text, constraints, input words, expected word), computed by hand.
EXAMPLES: dict[str, tuple[str, str, tuple[int, ...], int]] = {
    "v_mov_b32": ("v_mov_b32 $0, $1", "=v,v", (0xDEADBEEF,), 0xDEADBEEF),
    "v_not_b32": ("v_not_b32 $0, $1", "=v,v", (0x00FF1234,), 0xFF00EDCB),
    "v_and_b32": ("v_and_b32 $0, 0x0f0f0f0f, $1", "=v,v", (0x12345678,), 0x02040608),
    "v_or_b32": ("v_or_b32 $0, $1, $2", "=v,v,v", (0x10, 0x80000001), 0x80000011),
    "v_xor_b32": ("v_xor_b32 $0, -1, $1", "=v,v", (0x12345678,), 0xEDCBA987),
    "v_lshlrev_b32": ("v_lshlrev_b32 $0, $1, $2", "=v,v,v", (36, 0x12345678), 0x23456780),  # 36 & 31 = 4
    "v_lshrrev_b32": ("v_lshrrev_b32 $0, 8, $1", "=v,v", (0x80345678,), 0x00803456),
    "v_ashrrev_i32": ("v_ashrrev_i32 $0, 8, $1", "=v,v", (0x80345678,), 0xFF803456),
    "v_add_nc_u32": ("v_add_nc_u32 $0, $1, $2", "=v,v,v", (0xFFFFFFFF, 3), 2),
    "v_and_or_b32": ("v_and_or_b32 $0, $1, $2, $3", THREE, (0xF0F0, 0x3FF0, 0x64000001), 0x640030F1),
    "v_or3_b32": ("v_or3_b32 $0, $1, $2, $3", THREE, (1, 0x100, 0x80000000), 0x80000101),
    "v_lshl_or_b32": ("v_lshl_or_b32 $0, $1, 4, $2", "=v,v,v", (0xF000000A, 5), 0xA5),
    "v_lshl_add_u32": ("v_lshl_add_u32 $0, $1, 4, $2", "=v,v,v", (0x0FFFFFFF, 0x11), 1),
    "v_alignbit_b32": ("v_alignbit_b32 $0, $1, $2, 4", "=v,v,v", (0x12345678, 0x9ABCDEF0), 0x89ABCDEF),
    "v_alignbyte_b32": ("v_alignbyte_b32 $0, $1, $2, $3", THREE, (0x12345678, 0x9ABCDEF0, 5), 0x789ABCDE),  # 5 & 3 = 1
    "v_bfe_u32": ("v_bfe_u32 $0, $1, 12, 8", "=v,v", (0x12345678,), 0x45),
    "v_bfi_b32": ("v_bfi_b32 $0, $1, $2, $3", THREE, (0xFFFF0000, 0x12345678, 0x9ABCDEF0), 0x1234DEF0),
    "v_perm_b32": ("v_perm_b32 $0, $1, $2, $3", THREE, (0x77665544, 0x33221100, 0x0C0D0600), 0x00FF6600),
    "v_dot2_f32_f16": ("v_dot2_f32_f16 $0, $1, $2, $3", THREE, (0x42003E00, 0xB8004000, 0x41200000), 0x41380000),
    "v_dot2_f32_bf16": ("v_dot2_f32_bf16 $0, $1, $2, $3", THREE, (0x40403FC0, 0xBF004000, 0x41200000), 0x41380000),
    "v_dot4_i32_iu8": ("v_dot4_i32_iu8 $0, $1, $2, $3", THREE, (0xFF807F01, 0x010203FF, 10), 1157),
    "v_pk_fma_f16": ("v_pk_fma_f16 $0, $1, $2, $3", THREE, (0x40003C00, 0x42004200, 0xBC003800), 0x45004300),
    "v_pk_mul_f16": ("v_pk_mul_f16 $0, $1, 2.0 op_sel_hi:[1,0]", "=v,v", (0xC2003E00,), 0xC6004200),
    "v_pk_add_f16": ("v_pk_add_f16 $0, $1, $2", "=v,v,v", (0xC2003E00, 0x3C003C00), 0xC0004100),
    "v_pk_lshlrev_b16": ("v_pk_lshlrev_b16 $0, 4, $1 op_sel_hi:[0,1]", "=v,v", (0xF123F456,), 0x12304560),
    "v_pk_lshrrev_b16": ("v_pk_lshrrev_b16 $0, $1, $2", "=v,v,v", (0x00080004, 0xF123F456), 0x00F10F45),
    "v_pk_ashrrev_i16": ("v_pk_ashrrev_i16 $0, 1, $1 op_sel_hi:[0,1]", "=v,v", (0xF1237457,), 0xF8913A2B),
    "v_fma_f32": ("v_fma_f32 $0, $1, $2, $3", THREE, (0x39800001, 0x397FFFFE, 0x3F800001), 0x3F800001),
    "v_fma_mix_f32": (
        "v_fma_mix_f32 $0, $1, $2, 1.0 op_sel:[1,0,0] op_sel_hi:[1,0,0]",
        "=v,v,v",
        (0xC2007E00, 0x3FC00000),
        0xC0600000,  # -3 * 1.5 + 1 = -3.5; the low half, a NaN, is not read
    ),
    "v_cvt_f32_f16": ("v_cvt_f32_f16 $0, $1.h", "=v,v", (0xC1007E00,), 0xC0200000),
    "v_cvt_f16_f32": ("v_cvt_f16_f32 $0.h, $1", "=v,v,0", (0x3F803000, 0x12345678), 0x3C025678),  # tie: to even
    "v_cvt_pk_rtz_f16_f32": ("v_cvt_pk_rtz_f16_f32 $0, $1, $2", "=v,v,v", (0x3F803FFF, 0xC7FFFFFF), 0xFBFF3C01),
    "v_cvt_pkrtz_f16_f32": ("v_cvt_pkrtz_f16_f32 $0, $1, $2", "=v,v,v", (0x7F800000, 0x33FFFFFF), 0x00017C00),
    "v_cvt_f32_ubyte0": ("v_cvt_f32_ubyte0 $0, $1", "=v,v", (0xFF804001,), 0x3F800000),
    "v_cvt_f32_ubyte1": ("v_cvt_f32_ubyte1 $0, $1", "=v,v", (0xFF804001,), 0x42800000),
    "v_cvt_f32_ubyte2": ("v_cvt_f32_ubyte2 $0, $1", "=v,v", (0xFF804001,), 0x43000000),
    "v_cvt_f32_ubyte3": ("v_cvt_f32_ubyte3 $0, $1", "=v,v", (0xFF804001,), 0x437F0000),
    "v_cvt_pk_f32_fp8": ("v_cvt_pk_f32_fp8 $0, $1 op_sel:[1,0]", "=v,v", (0xB8300000,), 0xBF8000003F000000),
    "v_cvt_f32_fp8": ("v_cvt_f32_fp8 $0, $1 byte_sel:1", "=v,v", (0x00003000,), 0x3F000000),
    "v_cvt_pk_fp8_f32": (
        "v_cvt_pk_fp8_f32 $0, $1, $2 op_sel:[0,0,1]",
        "=v,v,v,0",
        (0x3F000000, 0xBF800000, 0x12345678),
        0xB8305678,
    ),
}


def run(text: str, constraints: str, *words: int) -> int:
    (result,) = AsmBlock(text, constraints).run(*(np.array([word], np.uint32) for word in words))
    return int(result[0])


def f16(*values: float) -> int:
    """One or two floats as packed float16, the first in the low half."""
    return sum(int(np.float16(value).view(np.uint16)) << 16 * i for i, value in enumerate(values))


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def test_every_opcode_has_an_example() -> None:
    assert set(EXAMPLES) == set(OPCODES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_opcode_by_hand(name: str) -> None:
    text, constraints, words, expected = EXAMPLES[name]
    assert f"{run(text, constraints, *words):#x}" == f"{expected:#x}"


@pytest.mark.parametrize("arch", ["gfx1201", "gfx1151"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_assembler_takes_what_the_table_says(name: str, arch: str) -> None:
    text, constraints, *_ = EXAMPLES[name]
    reason = assembles(text, constraints, arch)
    assert (reason is None) == (arch in OPCODES[name].architectures), reason


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("v_dot4_i32_iu8 $0, $1, $2, $3 neg_lo:[1,1,0]", (0xFF807F01, 0x010203FF, 10), 133),
        ("v_dot4_i32_iu8 $0, $1, $2, $3 neg_lo:[1,0,0]", (0xFF807F01, 0x010203FF, 10), 389),
        ("v_dot4_i32_iu8 $0, $1, $2, $3 neg_lo:[0,1,0]", (0xFF807F01, 0x010203FF, 10), 901),
        ("v_dot4_i32_iu8 $0, $1, $2, $3", (1, 1, 0x7FFFFFFF), 0x80000000),
        ("v_dot4_i32_iu8 $0, $1, $2, $3 clamp", (1, 1, 0x7FFFFFFF), 0x7FFFFFFF),
        ("v_dot2_f32_f16 $0, $1, $2, $3 neg_lo:[1,0,0]", (f16(1.5, 3), f16(2, -0.5), bits(10)), bits(5.5)),
        ("v_dot2_f32_f16 $0, $1, $2, $3 neg_hi:[0,1,0]", (f16(1.5, 3), f16(2, -0.5), bits(10)), bits(14.5)),
        ("v_dot2_f32_f16 $0, $1, $2, $3", (f16(1, 1), f16(1, 1), bits(2.0**24)), bits(2.0**24)),  # two roundings
        ("v_pk_fma_f16 $0, $1, $2, $3 op_sel:[1,0,0] op_sel_hi:[0,1,1]", (f16(2, 3), f16(5, 7), 0), f16(15, 14)),
        ("v_pk_fma_f16 $0, $1, $2, $3 neg_lo:[1,0,0] neg_hi:[0,0,1]", (f16(2, 3), f16(5, 7), f16(1, 2)), f16(-9, 19)),
        ("v_pk_fma_f16 $0, $1, $2, $3 clamp", (f16(2, -3), f16(0.25, 7), f16(0, 2)), f16(0.5, 0)),
        ("v_fma_f32 $0, $1, $2, $3 clamp", (bits(2), bits(3), bits(math.nan)), 0),
        ("v_fma_mix_f32 $0, $1, $2, $3", (bits(2), bits(3), bits(4)), bits(10)),
        ("v_fma_mix_f32 $0, $1, $2, $3 op_sel_hi:[1,1,1]", (f16(2, 9), f16(3, 9), f16(4, 9)), bits(10)),
        ("v_bfe_u32 $0, $1, $2, $3", (0xFFFFFFFF, 4, 32), 0),  # a width of 32 is a width of 0
    ],
)
def test_modifiers_by_hand(text: str, words: tuple[int, ...], expected: int) -> None:
    assert f"{run(text, THREE, *words):#x}" == f"{expected:#x}"


def test_perm_takes_all_selectors() -> None:
    """Bytes 0..7 of {S0, S1}; 8..11 the signs of bytes 1, 3, 5, 7; 12 zero; the rest ones."""
    block = AsmBlock("v_perm_b32 $0, $1, $2, $3", THREE)
    for high, low, table in [
        (0x87068504, 0x03820180, [0x80, 0x01, 0x82, 0x03, 0x04, 0x85, 0x06, 0x87, 0x00, 0x00, 0xFF, 0xFF, 0x00]),
        (0x78F97AFB, 0xFC7DFE7F, [0x7F, 0xFE, 0x7D, 0xFC, 0xFB, 0x7A, 0xF9, 0x78, 0xFF, 0xFF, 0x00, 0x00, 0x00]),
    ]:
        wanted = np.array(table + [0xFF] * 243, np.uint32)
        for place in range(0, 32, 8):
            selectors = np.arange(256, dtype=np.uint32) << np.uint32(place) | np.uint32(0x0C0C0C0C & ~(255 << place))
            (result,) = block.run(np.array(high, np.uint32), np.array(low, np.uint32), selectors)
            np.testing.assert_array_equal(result, wanted << np.uint32(place))


def test_swapped_perm_sources_show() -> None:
    words = (0x77665544, 0x33221100, 0x07050301)
    right, wrong = run("v_perm_b32 $0, $1, $2, $3", THREE, *words), run("v_perm_b32 $0, $2, $1, $3", THREE, *words)
    assert (right, wrong) == (0x77553311, 0x33117755)


def test_fp8_agrees_with_torch() -> None:
    codes = np.arange(256, dtype=np.uint32)
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    (pairs,) = AsmBlock("v_cvt_pk_f32_fp8 $0, $1", "=v,v").run(codes | codes[::-1] << np.uint32(8))
    np.testing.assert_array_equal(pairs.view(np.float32).reshape(256, 2), np.stack([wanted, wanted[::-1]], 1))
    for byte in range(4):
        (one,) = AsmBlock(f"v_cvt_f32_fp8 $0, $1 byte_sel:{byte}", "=v,v").run(codes << np.uint32(8 * byte))
        np.testing.assert_array_equal(one.view(np.float32), wanted)
    grid = np.sort(wanted[np.isfinite(wanted)])
    middles = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate(
        [grid, middles, np.nextafter(middles, 500), np.nextafter(middles, -500), [464, -464, 1e-40]]
    )
    values = values.astype(np.float32)
    (packed,) = AsmBlock("v_cvt_pk_fp8_f32 $0, $1, $1", "=v,v,0").run(values.view(np.uint32), np.zeros(1, np.uint32))
    encoded = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32)
    np.testing.assert_array_equal(packed, encoded * np.uint32(257))
    with pytest.raises(AsmError, match="FP16_OVFL"):
        run("v_cvt_pk_fp8_f32 $0, $1, $1", "=v,v,0", bits(465), 0)


def test_f16_agrees_with_torch() -> None:
    codes = np.arange(65536, dtype=np.uint32)
    wanted = torch.from_numpy(codes.astype(np.uint16).view(np.int16)).view(torch.float16).float().numpy()
    (wide,) = AsmBlock("v_cvt_f32_f16 $0, $1.l", "=v,v").run(codes)
    np.testing.assert_array_equal(wide.view(np.float32), wanted)
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(100_000) * 2.0 ** rng.integers(-30, 18, 100_000)).astype(np.float32)
    finite = np.sort(wanted[np.isfinite(wanted)])
    values = np.concatenate(
        [values, finite, (finite[1:] + finite[:-1]) / 2, np.array([65519.9, 65520, -1e30, np.inf], np.float32)]
    )
    (narrow,) = AsmBlock("v_cvt_f16_f32 $0.l, $1", "=v,v,0").run(values.view(np.uint32), np.zeros(1, np.uint32))
    rounded = torch.from_numpy(values).half().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(narrow, rounded)
    (cut,) = AsmBlock("v_cvt_pk_rtz_f16_f32 $0, $1, 0", "=v,v").run(values.view(np.uint32))
    toward_zero = cut.astype(np.uint16).view(np.float16).astype(np.float64)
    above = (cut + 1).astype(np.uint16).view(np.float16).astype(np.float64)
    inside = np.isfinite(values)
    assert (np.abs(toward_zero) <= np.abs(values))[inside].all()
    assert (np.abs(above) > np.abs(values))[inside & (np.abs(toward_zero) < 65504)].all()


@pytest.mark.parametrize(
    ("text", "constraints", "fault"),
    [
        ("v_bitop3_b32 $0, $1, $2, $3", THREE, "not modelled"),
        ("v_mov_b32 $0, $1 row_ror:8", "=v,v", "unknown operand or modifier"),
        ("v_and_b32 $0, $1, $2 clamp", "=v,v,v", "not a modifier"),
        ("v_mov_b32 $0, $1; v_not_b32 $0, $0", "=v,v", "comment"),
        ("v_and_or_b32 $0, $1, 0x12345, 0x7777", "=v,v", "one literal"),
        ("v_and_or_b32 $0, $1, $2, $3", "=v,s,s,s", "one literal"),
        ("v_and_or_b32 $0, $1, $2, 0x12345", "=v,s,s", "one literal"),
        ("v_cvt_f32_f16 $0, $1", "=v,v", "true16"),
        ("v_cvt_f16_f32 $0, $1", "=v,v", "true16"),
        ("v_cvt_f16_f32 $0.l, $1", "=v,v", "not .wholly. written"),
        ("v_pk_mul_f16 $0, $1, 2.0", "=v,v", "op_sel_hi"),
        ("v_dot2_f32_f16 $0, $1, 1.0, $2", "=v,v,v", "must be a register"),
        ("v_mov_b32 $1, $0", "=v,v", "writes an input"),
        ("v_mov_b32 $0, $2", "=v,v", "more operands"),
        ("v_add_nc_u32 $0, $0, $1", "=v,v", "before it is written"),
        ("v_mov_b32 $0, $2", "=v,=v,v", r"outputs \[1\]"),
        ("v_mov_b32 $0, 1.5", "=v,v", "unknown operand"),
        ("v_mov_b32 $0, $1", "=v,r", "constraints"),
    ],
)
def test_faults_are_refused(text: str, constraints: str, fault: str) -> None:
    with pytest.raises(AsmError, match=fault):
        run(text, constraints, *range(1, 1 + sum("=" not in part for part in constraints.split(","))))


@pytest.mark.parametrize(
    ("text", "constraints"),
    [
        ("v_mov_b32 $0, $1; v_not_b32 $0, $0", "=v,v"),  # the second instruction is a comment
        ("v_and_or_b32 $0, $1, 0x12345, 0x7777", "=v,v"),
        ("v_and_or_b32 $0, $1, $2, 0x12345", "=v,s,s"),
        ("v_cvt_f32_f16 $0, $1", "=v,v"),
        ("v_and_b32 $0, $1, $2 clamp", "=v,v,v"),
    ],
)
def test_the_assembler_refuses_them_too(text: str, constraints: str) -> None:
    assert assembles(text, constraints, "gfx1201")


LOOKUP = "v_perm_b32 $0, $1, $2, $3\nv_and_or_b32 $0, $0, $4, $2"


def test_missing_early_clobber_is_found() -> None:
    words = (0x77665544, 0x33221100, 0x07050301, 0x00FF00FF)
    with pytest.raises(AsmError, match=r"\$0 needs =&v"):
        run(LOOKUP, "=v,v,v,v,v", *words)
    assert run(LOOKUP, "=&v,v,v,v,v", *words) == 0x00550011 | 0x33221100
    assert assembles(LOOKUP, "=&v,v,v,v,v", "gfx1201") is None
    assert run(LOOKUP, "=v,v,s,v,s", *words) == 0x00550011 | 0x33221100  # scalars are in other registers
    two = AsmBlock("v_mov_b32 $0, $2\nv_mov_b32 $1, $2", "=v,=v,v")
    with pytest.raises(AsmError, match=r"\$0 needs =&v"):
        two.run(np.ones(1, np.uint32))


def test_tied_accumulator() -> None:
    text = "v_dot4_i32_iu8 $0, $1, $2, $0\nv_dot4_i32_iu8 $0, $3, $4, $0"
    assert run(text, "=v,v,v,v,v,0", 1, 2, 3, 4, 100) == 114
    with pytest.raises(AsmError, match="needs =&v"):  # equal values may share the accumulator's register
        run(text, "=v,v,v,v,v,0", 1, 2, 3, 100, 100)
    assert run(text, "=&v,v,v,v,v,0", 1, 2, 3, 100, 100) == 402

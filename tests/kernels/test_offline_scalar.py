"""The scalar machine, instruction by instruction, on hand-written assembly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offline_kernels import counted_loop, launch

from step128_kernels.errors import CountingError
from step128_kernels.offline.asm import parse_assembly
from step128_kernels.offline.floats import SCALAR_FLOATS, VECTOR_FLOATS, as_bits, as_float
from step128_kernels.offline.machine import FULL, Unknown, X, both, differ, either, invert, unknown
from step128_kernels.offline.operands import literal, scalar_index, vector_indices
from step128_kernels.offline.salu import SCALAR_OPS
from step128_kernels.offline.scalar import UndecidedError, WaveRunner

WORDS = st.integers(0, FULL)

FRAME = """
toy:                                    ; @toy
{code}
.Lfunc_end0:
	.amdhsa_kernel toy
		.amdhsa_kernarg_size 48
		.amdhsa_user_sgpr_count 2
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
	.end_amdhsa_kernel
	.amdgpu_metadata
---
amdhsa.kernels:
  - .args:
      - .offset:         0
        .size:           8
      - .offset:         8
        .size:           8
      - .offset:         16
        .size:           4
    .vgpr_count:     3
...
"""


def run(code: str, n: int = 7, grid: tuple[int, int, int] = (4, 1, 1)) -> list[int]:
    """Block counts of wave 0 of program (3, 0, 0) of kernel ``toy(x_ptr, out_ptr, n)`` on gfx1201."""
    assembly = parse_assembly(FRAME.format(code=code))
    one = launch(counted_loop, {"n": n}, grid=grid)
    runner = WaveRunner(assembly, "gfx1201", one, ("x_ptr", "out_ptr", "n"))
    return runner.run((3, 0, 0), 0, {}).counts


def reaches(condition: str) -> bool:
    """Whether code that sets SCC sets it to 1."""
    return run(f"{condition}\n s_cbranch_scc0 .LBB0_2\n s_nop 0\n.LBB0_2:\n s_endpgm")[1] == 1


def test_kernel_argument_decides_a_loop() -> None:
    code = """
	s_load_b32 s2, s[0:1], 0x10
	s_wait_kmcnt 0x0
.LBB0_1:
	s_add_co_i32 s2, s2, -1
	s_cmp_lg_u32 s2, 0
	s_cbranch_scc1 .LBB0_1
	s_endpgm"""
    assert run(code, n=9) == [1, 9, 1]


@pytest.mark.parametrize("n", [(5 << 32) + 7, -(5 << 32), 1 << 31, (1 << 64) - 1])
def test_a_long_argument_has_64_bits(n: int) -> None:
    """Triton makes int64 of what int32 does not hold."""
    for register, half in (("s4", n & FULL), ("s5", n >> 32 & FULL)):
        code = f"s_load_b64 s[4:5], s[0:1], 0x10\n s_cmp_eq_u32 {register}, {half:#x}"
        assert run(f"{code}\n s_cbranch_scc0 .LBB0_2\n s_nop 0\n.LBB0_2:\n s_endpgm", n)[1] == 1


@pytest.mark.parametrize("n", [7, -7, (1 << 31) - 1])
def test_a_short_argument_leaves_the_next_alone(n: int) -> None:
    code = "s_load_b64 s[4:5], s[0:1], 0x10\n s_cmp_eq_u32 s5, 0"
    assert run(f"{code}\n s_cbranch_scc0 .LBB0_2\n s_nop 0\n.LBB0_2:\n s_endpgm", n)[1] == 1


def test_program_number_is_in_ttmp9() -> None:
    assert reaches("s_cmp_eq_u32 ttmp9, 3")
    assert not reaches("s_cmp_eq_u32 ttmp9, 2")


def test_64_bit_arithmetic_carries() -> None:
    assert reaches("s_mov_b64 s[4:5], -1\n s_add_nc_u64 s[4:5], s[4:5], 1\n s_cmp_eq_u64 s[4:5], 0")
    assert reaches("s_mov_b32 s4, -1\n s_add_co_u32 s4, s4, 1\n s_add_co_ci_u32 s5, 0, 0\n s_cmp_eq_u32 s5, 1")
    assert reaches("s_mov_b32 s4, 3\n s_mov_b32 s5, 0\n s_lshl_b64 s[4:5], s[4:5], 33\n s_cmp_eq_u32 s5, 6")


@pytest.mark.parametrize(
    "narrow",
    [
        "v_cmp_gt_i32_e32 vcc_lo, 5, v1\n s_and_saveexec_b32 s4, vcc_lo",
        "s_mov_b32 s4, exec_lo\n v_cmpx_gt_i32_e32 5, v1",
    ],
)
def test_saved_lanes_come_back_full(narrow: str) -> None:
    assert reaches(f"{narrow}\n s_or_b32 exec_lo, exec_lo, s4\n s_cmp_eq_u32 exec_lo, -1")
    both_ways = "s_xor_b32 s4, exec_lo, s4\n s_or_saveexec_b32 s5, s4"
    assert reaches(f"{narrow}\n {both_ways}\n s_cmp_eq_u32 exec_lo, -1")


def test_selection_needs_only_what_it_selects() -> None:
    assert reaches("s_load_b32 s4, s[6:7], 0x0\n s_cmp_eq_u32 0, 0\n s_cselect_b32 s4, 3, s4\n s_cmp_eq_u32 s4, 3")
    assert reaches("s_cmp_eq_u32 0, 1\n s_cselect_b64 s[4:5], 0, -1\n s_cmp_eq_u64 s[4:5], -1")


def test_masked_load_finds_zero() -> None:
    setup = "s_mov_b32 s4, 0\n s_mov_b32 s5, 0x100\n s_mov_b32 s6, 0x7ffffffe\n s_mov_b32 s7, 0x31027000\n"
    load = "v_mov_b32_e32 v5, 0x80000000\n buffer_load_b32 v5, v5, s[4:7], null offen\n s_wait_loadcnt 0x0\n"
    assert reaches(f"{setup}{load}v_readfirstlane_b32 s8, v5\n s_cmp_eq_u32 s8, 0")


def test_a_vector_register_may_be_its_own_source() -> None:
    code = "v_mov_b32_e32 v5, 6\n v_lshlrev_b32_e32 v5, 2, v5\n v_readfirstlane_b32 s8, v5\n s_cmp_eq_u32 s8, 24"
    assert reaches(code)


def test_scalars_spilled_to_lanes_come_back() -> None:
    assert reaches("s_mov_b32 s4, 5\n v_writelane_b32 v9, s4, 2\n s_mov_b32 s4, 0\n v_readlane_b32 s4, v9, 2\n"
                   "s_cmp_eq_u32 s4, 5")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("s_frobnicate_b32 s2, s3\n s_endpgm", "s_frobnicate_b32 is unknown"),
        ("what is this\n s_endpgm", "not understood: what is this"),
        ("s_cbranch_cdbgsys .LBB0_1\n.LBB0_1:\n s_endpgm", "branch is not understood"),
        ("s_branch .LBB0_9\n s_endpgm", "unknown label"),
        ("s_swappc_b64 s[4:5], s[6:7]\n s_endpgm", "s_swappc_b64 is unknown"),
        (".LBB0_1:\n v_cmp_lt_i32 vcc_lo, 0, v1\n s_cbranch_vccnz .LBB0_1\n s_endpgm", "loop at .LBB0_1 depends on"),
        (".LBB0_1:\n s_cbranch_execz .LBB0_2\n v_cmpx_lt_i32 0, v1\n s_branch .LBB0_1\n.LBB0_2:\n s_endpgm",
         "loop at .LBB0_1 depends on a comparison"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_an_error(code: str, message: str) -> None:
    with pytest.raises(CountingError, match=message):
        run(code)


def test_operands() -> None:
    assert scalar_index("s[4:7]") == 4
    assert scalar_index("ttmp9") == 117
    assert scalar_index("vcc_lo") == 106
    assert scalar_index("v3") is None
    assert list(vector_indices("v[3:5]")) == [3, 4, 5]
    assert list(vector_indices("v7.l")) == [7]
    assert literal("-16", 64) == (1 << 64) - 16
    assert literal("0x4f7ffffe", 32) == 0x4F7FFFFE
    assert literal("1.0", 32) == 0x3F800000


@given(WORDS, WORDS)
def test_masks_agree_with_integers(a: int, b: int) -> None:
    assert both(a, b) == a & b
    assert either(a, b) == a | b
    assert differ(a, b) == a ^ b
    assert invert(a) == a ^ FULL


def test_masks_of_unknown_lanes() -> None:
    lanes, others = unknown("lanes"), unknown("others")
    assert both(lanes, 0) == 0
    assert both(lanes, FULL) is lanes
    assert both(lanes, invert(lanes)) == 0
    assert either(lanes, invert(lanes)) == FULL
    assert either(differ(lanes, FULL), lanes) == FULL
    assert differ(lanes, lanes) == 0
    assert isinstance(both(lanes, others), Unknown)


@given(WORDS, WORDS)
def test_integer_arithmetic(a: int, b: int) -> None:
    def signed(value: int) -> int:
        return value - (value >> 31 << 32)

    total = signed(a) + signed(b)
    assert SCALAR_OPS["s_add_co_i32"].compute(a, b) == (total & FULL, int(not -(2**31) <= total < 2**31))
    assert SCALAR_OPS["s_sub_co_u32"].compute(a, b) == ((a - b) & FULL, int(b > a))
    assert SCALAR_OPS["s_mul_hi_i32"].compute(a, b)[0] == (signed(a) * signed(b) >> 32) & FULL
    assert SCALAR_OPS["s_ashr_i32"].compute(a, b)[0] == (signed(a) >> (b % 32)) & FULL
    assert SCALAR_OPS["s_bfe_u32"].compute(a, 0x50019) == ((a >> 25) & 31, int((a >> 25) & 31 != 0))
    assert SCALAR_OPS["s_bfe_i32"].compute(a, 0x100000)[0] == (signed(a << 16 & FULL) >> 16) & FULL
    assert SCALAR_OPS["s_min_i32"].compute(a, b)[0] == min(signed(a), signed(b)) & FULL
    assert SCALAR_OPS["s_lshl4_add_u32"].compute(a, b)[0] == (16 * a + b) & FULL


@given(WORDS, st.integers(1, FULL))
def test_division_as_llvm_expands_it(a: int, b: int) -> None:
    estimate = VECTOR_FLOATS["v_s_rcp_f32"](SCALAR_FLOATS["s_cvt_f32_u32"].compute(b)[0])
    scaled = SCALAR_FLOATS["s_mul_f32"].compute(estimate, 0x4F7FFFFE)[0]
    inverse = SCALAR_FLOATS["s_cvt_u32_f32"].compute(scaled)[0]
    inverse = (inverse + (inverse * (-b * inverse & FULL) >> 32)) & FULL
    quotient = inverse * a >> 32
    rest = (a - quotient * b) & FULL
    for _ in range(2):
        if rest >= b:
            quotient, rest = quotient + 1, rest - b
    assert (quotient, rest) == divmod(a, b)


def test_floats_beyond_the_largest_are_infinite() -> None:
    assert as_float(as_bits(1e300)) == float("inf")
    assert as_float(VECTOR_FLOATS["v_rcp_f32"](0)) == float("inf")
    assert SCALAR_FLOATS["s_cvt_u32_f32"].compute(as_bits(-3.0))[0] == 0
    assert SCALAR_FLOATS["s_cvt_u32_f32"].compute(as_bits(1e30))[0] == FULL


@pytest.mark.parametrize(
    ("opcode", "values", "result"),
    [
        ("v_min_i32", (-3, 2), -3),
        ("v_max_i32", (-3, 2), 2),
        ("v_min_u32", (-3, 2), 2),
        ("v_max_u32", (-3, 2), -3),
        ("v_min3_i32", (5, -7, 6), -7),
        ("v_max3_i32", (5, -7, 6), 6),
        ("v_min3_u32", (5, -7, 6), 5),
        ("v_max3_u32", (5, -7, 6), -7),
    ],
)
def test_loop_bounds_that_the_vector_unit_computed(opcode: str, values: tuple[int, ...], result: int) -> None:
    """As in vLLM's attention with a window, whose first and last tile are v_max3 and v_min3 of scalars."""
    moves = "\n".join(f" s_mov_b32 s{4 + i}, {value}" for i, value in enumerate(values))
    sources = ", ".join(f"s{4 + i}" for i in range(len(values)))
    code = f"{moves}\n {opcode} v1, {sources}\n v_readfirstlane_b32 s9, v1\n s_cmp_eq_u32 s9, "
    assert reaches(f"{code}{result}")
    assert not reaches(f"{code}{result + 1}")


@pytest.mark.parametrize("relation", ["lt", "le", "eq", "ne", "ge", "gt"])
@pytest.mark.parametrize(("a", "b"), [(-1, 1), (1, -1), (4, 4)])
def test_comparisons_in_which_all_lanes_agree(relation: str, a: int, b: int) -> None:
    for kind, mask in (("i32", None), ("u32", FULL)):
        x, y = (a, b) if mask is None else (a & mask, b & mask)
        holds = {"lt": x < y, "le": x <= y, "eq": x == y, "ne": x != y, "ge": x >= y, "gt": x > y}[relation]
        code = f"v_mov_b32 v1, {a}\n v_mov_b32 v2, {b}\n v_cmp_{relation}_{kind} vcc_lo, v1, v2"
        ran = run(f"{code}\n s_cbranch_vccz .LBB0_2\n s_nop 0\n.LBB0_2:\n s_endpgm")
        assert (ran[1] == 1) == holds


@pytest.mark.parametrize(
    "code",
    [
        "v_cmp_gt_i32 vcc_lo, 5, v0",  # lanes' own numbers
        "v_mov_b32 v1, 3\n v_cmp_lt_f32 vcc_lo, v1, v1",  # not integers
        "v_mov_b32 v1, 3\n v_cmpx_gt_i32 v0, v1\n v_cmp_eq_u32 vcc_lo, v1, v1",  # only of some lanes
    ],
)
def test_comparisons_that_lanes_may_decide_differently_stay_unknown(code: str) -> None:
    with pytest.raises(UndecidedError):
        run(f"{code}\n s_cbranch_vccz .LBB0_2\n s_nop 0\n.LBB0_2:\n s_endpgm")


def test_what_a_comparison_depends_on_reaches_the_branch() -> None:
    """Programs that differ in it must all be run."""
    code = "v_mov_b32 v1, ttmp9\n v_cmp_gt_u32 vcc_lo, v1, 1\n s_cbranch_vccz .LBB0_2\n s_nop 0\n.LBB0_2:\n s_endpgm"
    assembly = parse_assembly(FRAME.format(code=code))
    runner = WaveRunner(assembly, "gfx1201", launch(counted_loop, {"n": 1}, grid=(4, 1, 1)), ("x_ptr", "out_ptr", "n"))
    found = [runner.run((x, 0, 0), 0, {}) for x in range(4)]
    assert [trace.counts[1] for trace in found] == [0, 0, 1, 1]
    assert all(trace.depends == X for trace in found)

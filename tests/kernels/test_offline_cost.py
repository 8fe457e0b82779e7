"""Registers, spills, LDS, occupancy, instruction counts and the cost model."""

import re

import pytest
from offline_kernels import ARCHES, BLOCK, case, counted_loop, launch, product, softmax, tail_loop

from step128_kernels.errors import CountingError
from step128_kernels.launch import Launch
from step128_kernels.offline.asm import Assembly, Block, parse_assembly
from step128_kernels.offline.compile import compile_launch
from step128_kernels.offline.cost import DEVICES, access_bytes, instruction_cycles, launch_seconds
from step128_kernels.offline.count import LaunchCount
from step128_kernels.offline.inspect import LaunchReport, inspect_case
from step128_kernels.offline.occupancy import waves_by_registers, waves_per_simd


def report(launch: Launch, arch: str) -> LaunchReport:
    (found,) = inspect_case(case(launch, arch=arch)).launches
    return found


@pytest.mark.parametrize(
    ("vgprs", "waves"), [(1, 16), (96, 16), (97, 12), (120, 12), (144, 10), (168, 9), (192, 8), (216, 7), (256, 5)]
)
def test_occupancy_by_registers(vgprs: int, waves: int) -> None:
    assert waves_by_registers(vgprs) == waves


def test_occupancy_by_lds_and_whole_workgroups() -> None:
    assert waves_per_simd(96, 0, 4) == 16
    assert waves_per_simd(96, 64 * 1024, 4) == 2
    assert waves_per_simd(96, 64 * 1024 + 1, 4) == 0
    assert waves_per_simd(256, 0, 8) == 4  # five waves on each of four SIMDs hold two work-groups of eight
    assert waves_per_simd(96, 10 * 1024, 1) == 3


@pytest.mark.parametrize("arch", ARCHES)
def test_straight_code_is_counted_like_reading_it(arch: str) -> None:
    one = launch(softmax, {}, {"BLOCK": 1024}, grid=(10, 1, 1), num_warps=4)
    text = compile_launch(one, arch).assembly
    body = text[text.index("\nsoftmax:") : text.index(".Lfunc_end0:")]
    found = report(one, arch)
    assert found.waves == 40
    pairs = len(re.findall(r"^\s+v_dual_.*::", body, re.MULTILINE))  # issued as one, two of the vector ALU's work
    assert pairs and found.valu == 40 * (len(re.findall(r"^\s+v_", body, re.MULTILINE)) + pairs)
    assert found.mix["transcendental"] == 40 * len(re.findall(r"^\s+v_(?:exp|rcp)", body, re.MULTILINE))
    assert found.instructions == 40 * len(re.findall(r"^\s+(?:[sv]|ds|buffer|global)_", body, re.MULTILINE))


@pytest.mark.parametrize("arch", ARCHES)
def test_lds_is_tritons_shared_memory(arch: str) -> None:
    assert report(launch(softmax, {}, {"BLOCK": 1024}, num_warps=4), arch).lds_bytes == 4 * 4  # a float for each wave
    assert report(launch(softmax, {}, {"BLOCK": 128}, num_warps=1), arch).lds_bytes == 0


@pytest.mark.parametrize("arch", ARCHES)
def test_spills_are_seen(arch: str) -> None:
    # 128 registers of values alone, where sixteen waves leave 96 to each.
    too_much = report(launch(softmax, {}, {"BLOCK": 4096}, num_warps=1, waves_per_eu=16), arch)
    assert too_much.vgpr_spills > 0
    assert too_much.scratch_bytes > 0
    assert too_much.mix["scratch"] > 0
    fits = report(launch(softmax, {}, {"BLOCK": 1024}, num_warps=1), arch)
    assert fits.vgpr_spills == fits.sgpr_spills == fits.scratch_bytes == 0


@pytest.mark.parametrize("arch", ARCHES)
def test_load_widths_and_pointers(arch: str) -> None:
    small = report(launch(counted_loop, {"n": 4}), arch)
    assert dict(small.load_bytes["x_ptr"]) == {128: 4 * BLOCK * 4}
    code = compile_launch(launch(counted_loop, {"n": 4}), arch).assembly
    assert "buffer_load_b128" in code
    masked = report(launch(tail_loop, {"size": 300}), arch)
    assert min(masked.load_bytes["x_ptr"]) == 32


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("size_bytes", "kind"), [(1 << 20, "buffer"), (1 << 31, "global")])
def test_size_of_a_tensor_decides_how_it_is_addressed(arch: str, size_bytes: int, kind: str) -> None:
    types = {"a_ptr": "fp16", "b_ptr": "fp16"}
    one = launch(product, {"K": 64}, {"BM": 16, "BN": 16, "BK": 64}, dtypes=types, size_bytes=size_bytes)
    assert set(re.findall(r"^\s+(\w+)_load_\w+", compile_launch(one, arch).assembly, re.MULTILINE)) - {"ds", "s"} == {
        kind
    }
    assert set(report(one, arch).load_bytes) == ({"a_ptr", "b_ptr"} if kind == "buffer" else {"?"})


@pytest.mark.parametrize("arch", ARCHES)
def test_case_sums_its_launches_and_shows_the_worst(arch: str) -> None:
    small, large = launch(softmax, {}, {"BLOCK": 128}), launch(softmax, {}, {"BLOCK": 2048}, grid=(9, 1, 1))
    found = inspect_case(case(small, large, arch=arch, weights=64, memory_bytes=128))
    first, second = found.launches
    assert found.vgprs == second.vgprs > first.vgprs
    assert found.valu_per_weight == (first.valu + second.valu) * 32 / 64
    assert found.lane_inst_per_byte == (first.instructions + second.instructions) * 32 / 128
    assert found.bound_bytes_per_second == pytest.approx(128 / (first.modelled_seconds + second.modelled_seconds))
    assert found.share_of_bandwidth == found.bound_bytes_per_second / DEVICES[arch].memory_bytes_per_second


def test_a_call_that_loads_less_than_it_must_is_an_error() -> None:
    with pytest.raises(CountingError, match="2048 bytes are loaded as counted, but 2049 must be"):
        inspect_case(case(launch(counted_loop, {"n": 4}), memory_bytes=2049))


@pytest.mark.parametrize("arch", ARCHES)
def test_wmma_is_present_for_a_dot(arch: str) -> None:
    one = launch(product, {"K": 64}, {"BM": 16, "BN": 16, "BK": 32}, dtypes={"a_ptr": "bf16", "b_ptr": "bf16"})
    assert report(one, arch).wmma == 4


def blocks(*texts: str) -> Assembly:
    """Blocks of hand-written code."""
    code = "\n".join(f".LBB0_{i + 1}:\n{text}" for i, text in enumerate(texts))
    frame = f"\ntoy:\n{code}\n s_endpgm\n.Lfunc_end0:\n\t.amdhsa_kernel toy\n.amdgpu_metadata\n---\n"
    return parse_assembly(frame)


def only(text: str) -> Block:
    return blocks(text).blocks[1]


@pytest.mark.parametrize(
    ("text", "unit", "gfx1201", "gfx1151"),
    [
        ("v_add_f32_e32 v0, v1, v2", "valu", 1, 1),
        ("v_dual_fmac_f32 v4, v29, v14 :: v_dual_add_nc_u32 v39, -1, v39", "valu", 1, 1),
        ("v_dot2_f32_f16 v0, v1, v2, v3", "valu", 1, 1),
        ("v_mul_lo_u32 v0, v1, v2", "valu", 4, 4),
        ("v_mad_co_u64_u32 v[0:1], null, v2, v3, v[4:5]", "valu", 4, 4),
        ("v_fma_f64 v[0:1], v[2:3], v[4:5], v[6:7]", "valu", 4, 4),
        ("v_wmma_f32_16x16x16_f16 v[0:7], v[8:11], v[12:15], v[0:7]", "valu", 16, 32),
        ("v_wmma_i32_16x16x16_iu8 v[0:7], v[8:9], v[10:11], v[0:7]", "valu", 8, 32),
        ("v_exp_f32_e32 v0, v1", "transcendental", 4, 4),
        ("ds_load_b128 v[0:3], v4", "lds", 8, 8),
        ("ds_load_2addr_b32 v[0:1], v4 offset1:1", "lds", 4, 4),
        ("buffer_load_b128 v[0:3], v4, s[0:3], null offen", "vmem", 16, 16),
        ("global_load_d16_u8 v0, v[1:2], off", "vmem", 2, 2),
        ("s_add_co_i32 s0, s1, s2", "salu", 1, 1),
        ("s_wait_loadcnt 0x0", "salu", 0, 0),
    ],
)
def test_cycles_of_one_instruction(text: str, unit: str, gfx1201: int, gfx1151: int) -> None:
    instruction = only(text).instructions[0]
    assert getattr(instruction_cycles(instruction, DEVICES["gfx1201"]), unit) == gfx1201
    assert getattr(instruction_cycles(instruction, DEVICES["gfx1151"]), unit) == gfx1151


def test_bytes_of_accesses() -> None:
    widths = {"global_load_d16_hi_u8": 1, "buffer_load_u16": 2, "ds_store_b16_d16_hi": 2, "ds_store_2addr_b64": 16}
    for opcode, size in widths.items():
        assert access_bytes(only(f"{opcode} v0, v1").instructions[0]) == size


def test_seconds_of_a_launch() -> None:
    device = DEVICES["gfx1201"]
    assembly = blocks("\n".join(["v_add_f32_e32 v0, v1, v2"] * 10), "\n".join(["s_mov_b32 s0, s1"] * 3))

    def seconds(times: tuple[int, int], waves: int, num_warps: int = 1) -> float:
        count = LaunchCount(assembly, (((1, *times), waves),), waves, waves // num_warps, (), {})
        return launch_seconds(count, num_warps, device) * device.clock_hz

    assert seconds((100, 0), 128 * 10) == pytest.approx(10 * 1000)
    assert seconds((100, 0), 128 * 10 + 1) == pytest.approx(11 * 1000)  # one SIMD has eleven
    assert seconds((100, 0), 33 * 8, 8) == pytest.approx(4 * 1000)  # 33 work-groups on 32 processors
    assert seconds((10, 100), 1) == pytest.approx(10 * 10 + 100 * 4)  # alone, instructions follow each other


def test_unknown_wmma_is_an_error() -> None:
    instruction = only("v_wmma_f32_16x16x16_fp8_fp8 v[0:7], v[8:9], v[10:11], v[0:7]").instructions[0]
    assert instruction_cycles(instruction, DEVICES["gfx1201"]).valu == 8
    with pytest.raises(CountingError, match="no cycles are known"):
        instruction_cycles(instruction, DEVICES["gfx1151"])

"""What the compiled attention kernels consist of: loads, conversions and WMMAs follow from the call by arithmetic."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from step128_kernels.attention.cases import ARCHS, all_cases, call_case, shipped_configs
from step128_kernels.attention.configs import shape_of
from step128_kernels.attention.launches import decode_launches
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.launch import KernelCase, Launch
from step128_kernels.offline.compile import compile_key, compile_launch
from step128_kernels.offline.cost import DEVICES, Cycles, instruction_cycles, loaded_bytes
from step128_kernels.offline.count import LaunchCount, count_launch
from step128_kernels.offline.inspect import Report, case_title
from step128_kernels.offline.parallel import inspect_cases
from step128_kernels.vllm_plugin.attention_baselines import attention_baseline_case

DEEP = 65536
FULL = {"Hq": 16, "Hkv": 2, "D": 128, "W": 0, "C": DEEP}
SLIDING = {"Hq": 24, "Hkv": 2, "D": 128, "W": 512, "C": 512}
COPIES = {"gfx1201": 1, "gfx1151": 2}
"""gfx11's WMMA wants its operands in both halves of a wave, so both halves load and convert them."""
HARDLY_ANY = 0.15
"""Bit operations per KV byte, of addresses and loop bounds."""
BITS = ("v_and", "v_or", "v_xor", "v_lsh", "v_ash", "v_bf", "v_perm_", "v_cndmask", "v_alignb")


@pytest.fixture(scope="module", autouse=True)
def only_shipped_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STEP128_TUNED_DIR", raising=False)
        yield


def counted(launch: Launch, arch: str) -> tuple[LaunchCount, Counter[str]]:
    """A launch's count, and its wave-instructions by opcode."""
    count = count_launch(compile_launch(launch, arch), launch)
    opcodes: Counter[str] = Counter()
    for block, times in zip(count.assembly.blocks, count.blocks, strict=True):
        for instruction in block.instructions:
            for opcode, _ in instruction.parts:
                opcodes[opcode] += times
    return count, opcodes


@pytest.mark.parametrize("query_tokens", [1, 4])
@pytest.mark.parametrize("kernel", ["attention_fp8", "attention_bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_decode_loads_converts_and_multiplies_each_value_once(arch: str, kernel: str, query_tokens: int) -> None:
    """Once for each 16 query rows: 128-bit loads of the pages and queries alone, and WMMAs for K and V."""
    call = AttentionCall(shape_of(FULL, kernel), 1, query_tokens, DEEP)
    launch = call_case(call, shipped_configs(kernel, FULL, arch)[query_tokens], arch).launches[0]
    count, opcodes = counted(launch, arch)
    row_tiles = -(-query_tokens * call.shape.gqa_ratio // 16)
    kv_bytes = DEEP * call.shape.key_bytes * row_tiles * COPIES[arch]

    queries = count.workgroups * 16 * call.shape.head_dim * 2 * COPIES[arch]
    assert widths(count) == {128: kv_bytes + queries}

    products = 2 * call.shape.head_dim // 16  # K and V, for 16 keys of a KV head
    assert sum(times for opcode, times in opcodes.items() if "wmma" in opcode) == (
        row_tiles * call.shape.kv_heads * DEEP // 16 * products
    )
    if kernel == "attention_fp8":
        assert conversions(opcodes, arch) == kv_bytes
    # gfx1151 converts four bytes by a shift, two masks and what is packed; where the hardware does it nothing is left.
    assert bit_operations(opcodes) / kv_bytes < (1.0 if (arch, kernel) == ("gfx1151", "attention_fp8") else HARDLY_ANY)


def widths(count: LaunchCount) -> Counter[int]:
    """Bytes of pages and queries that all lanes load, by bits of one lane's load."""
    found = Counter[int]()
    for pointer, loads in loaded_bytes(count).items():
        if pointer in ("?", "cache_ptr", "query_ptr"):
            found.update(loads)
    return found


def bit_operations(opcodes: Counter[str]) -> int:
    """Lanes' integer instructions of the kind that a conversion in software is made of."""
    return 32 * sum(times for opcode, times in opcodes.items() if opcode.startswith(BITS))


def conversions(opcodes: Counter[str], arch: str) -> int:
    """FP8 values that the one instruction for it converts, two a lane."""
    return 2 * 32 * opcodes["v_cvt_pk_f32_fp8" if arch == "gfx1201" else "v_pk_mul_f16"]


def cycles(launch: Launch, arch: str) -> tuple[float, dict[str, float]]:
    """Cycles of a SIMD that a whole launch spends on WMMA, and on each other kind of instruction."""
    count = count_launch(compile_launch(launch, arch), launch)
    wmma, other = Cycles(), Cycles()
    for block, times in zip(count.assembly.blocks, count.blocks, strict=True):
        for instruction in block.instructions:
            one = instruction_cycles(instruction, DEVICES[arch])
            if "wmma" in instruction.opcode:
                wmma = wmma.plus(one, times)
            else:
                other = other.plus(one, times)
    units = ("valu", "transcendental", "lds", "vmem", "salu")
    return wmma.valu, {unit: getattr(other, unit) for unit in units}


def test_wmma_is_the_largest_part_of_every_shipped_prefill() -> None:
    """Larger than any other unit's, and two thirds of the vector unit's cycles; each variant of the code once."""
    seen: set[str] = set()
    for one in all_cases():
        if one.phase != "prefill":
            continue
        (launch,) = one.launches
        key = compile_key(launch, one.arch)
        if key in seen:
            continue
        seen.add(key)
        wmma, other = cycles(launch, one.arch)
        assert wmma > max(other.values()), (case_title(one), wmma, other)
        assert wmma > 2 * other["valu"], (case_title(one), wmma, other)
    assert len(seen) >= 2 * 2 * 2  # GPUs, KV dtypes, full and sliding


@pytest.mark.parametrize("query_tokens", [1, 4])
def test_sliding_layers_beside_vllm(query_tokens: int) -> None:
    """Whole launches with FP8 KV, 512 keys of 8192, on gfx1201.

    vLLM's unified kernel cuts the whole context into 16 segments of which the window meets one: two of its
    work-groups have keys. With more query tokens it has no split at all.
    """
    call = AttentionCall(shape_of(SLIDING, "attention_fp8"), 1, query_tokens, 8192)
    config = shipped_configs("attention_fp8", SLIDING, "gfx1201")[query_tokens]
    cases: list[KernelCase] = [call_case(call, config, "gfx1201")]
    cases += [attention_baseline_case(name, call, "gfx1201") for name in ("vllm_unified", "vllm_segmented")]
    found = inspect_cases(cases)
    ours, unified, segmented = (one for one in found if isinstance(one, Report))
    print(
        f"sliding, {query_tokens} query tokens: ours {ours.lane_inst_per_byte:.1f} instructions per KV byte in "
        f"{ours.workgroups} work-groups; unified {unified.lane_inst_per_byte:.1f} in {unified.workgroups}, "
        f"segmented {segmented.lane_inst_per_byte:.1f} in {segmented.workgroups}"
    )
    assert ours.lane_inst_per_byte < min(unified.lane_inst_per_byte, segmented.lane_inst_per_byte) / 2
    if query_tokens == 1:
        tiles, waves, of_a_wave = 512 // 16, 4, 2 + 8  # each wave multiplies all of K, and its part of V
        assert unified.wmma == call.shape.kv_heads * tiles * waves * of_a_wave
        assert unified.launches[0].assumptions == ()


def test_these_gates_can_fail() -> None:
    """Rows that are not aligned are loaded in parts; the twin for other GPUs converts by bits; vLLM's prefill of an FP8
    cache is far from being bound by WMMA.
    """
    call = AttentionCall(AttentionShape(16, 2, 128, 0, 16, "fp8", "bf16"), 1, 1, 4096)
    config = shipped_configs("attention_fp8", FULL, "gfx1201")[1]
    launch = call_case(call, config, "gfx1201").launches[0]
    for name, least in (("head_stride", 16), ("query_stride", 32)):
        odd = replace(launch, scalars={**launch.scalars, name: int(launch.scalars[name]) + 2})
        assert min(widths(counted(odd, "gfx1201")[0])) <= least

    twin = decode_launches(call, config, "portable")[0]
    loads: dict[str, int | tuple[int, ...]] = {"lengths_ptr": 4096, "starts_ptr": (0, 1), "table_ptr": 0}
    _, opcodes = counted(replace(twin, loads=loads), "gfx1201")
    assert conversions(opcodes, "gfx1201") == 0
    assert bit_operations(opcodes) / (4096 * call.shape.key_bytes) > HARDLY_ANY

    prompt = replace(call, query_tokens=512, context_tokens=512)
    wmma, other = cycles(attention_baseline_case("vllm_unified", prompt, "gfx1201").launches[0], "gfx1201")
    assert wmma < other["valu"]

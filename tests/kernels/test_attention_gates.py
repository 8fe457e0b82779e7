"""Gates of the attention kernels: every config that we ship, compiled for both GPUs, and the deep ones counted."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from step128_kernels.attention.cases import ARCHS, SHAPES, all_cases, call_case, case, shipped_configs
from step128_kernels.attention.configs import DECODE_ROWS, PREFILL_ROWS, decode_config, prefill_config
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.errors import KernelToolError
from step128_kernels.launch import KernelCase
from step128_kernels.offline.asm import parse_assembly
from step128_kernels.offline.compile import compile_key, compile_launch
from step128_kernels.offline.cost import DEVICES, instruction_cycles
from step128_kernels.offline.count import count_launch
from step128_kernels.offline.inspect import Report, case_title
from step128_kernels.offline.parallel import inspect_cases
from step128_kernels.tuned.load import load_config
from step128_kernels.tuned.names import DEVICE_OF_ARCH
from step128_kernels.vllm_plugin.attention_baselines import attention_baseline_case

DEEP = 65536
COUNTED_CONTEXT = 8192
"""Below it, what every work-group does once (queries, result, the sum) costs more than the keys."""
MOST_INSTRUCTIONS_PER_BYTE = {1: 3.0, 4: 8.0}
"""Of an FP8 cache on gfx1201, by query tokens: lanes' instructions of every kind, the sum over the splits included."""
SIXTEEN_ROWS = 4.0
"""The same of a sliding layer's loop for each 16 query rows (see test_sliding_layers)."""


@pytest.fixture(scope="module", autouse=True)
def only_shipped_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STEP128_TUNED_DIR", raising=False)
        yield


@pytest.fixture(scope="module")
def reports(only_shipped_files: None) -> dict[str, Report]:
    """Decodes of one sequence as shipped: full layers from 8k tokens on, and sliding layers; by title."""
    wanted = [one for one in all_cases() if one.shape["context"] >= COUNTED_CONTEXT or one.shape["W"]]
    wanted = [one for one in wanted if one.phase == "decode" and one.shape["batch"] == 1]
    found = inspect_cases(wanted)
    failed = [str(result) for result in found if isinstance(result, KernelToolError)]
    assert not failed, failed[:5]
    return {case_title(result.case): result for result in found if isinstance(result, Report)}


def full(reports: dict[str, Report], arch: str) -> list[Report]:
    return [one for one in reports.values() if not one.case.shape["W"] and one.case.arch == arch]


def deep(reports: dict[str, Report], arch: str) -> list[Report]:
    return [one for one in full(reports, arch) if one.case.shape["context"] == DEEP]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", list(SHAPES))
def test_every_layer_has_a_file_of_its_own(kernel: str, arch: str) -> None:
    for shape in SHAPES[kernel]:
        table = load_config(kernel, shape, DEVICE_OF_ARCH[arch], arch, default={1: {"phase": "none"}})
        assert table.exact, (kernel, shape, arch)
        assert table.source in ("measured", "modelled, not measured")
        assert set(table.configs) == {*DECODE_ROWS, *PREFILL_ROWS}


def test_no_shipped_config_spills() -> None:
    """Compiled only, each variant once: sizes that are run-time arguments change no code."""
    seen: set[str] = set()
    for one in all_cases():
        for launch in one.launches:
            key = compile_key(launch, one.arch)
            if key not in seen:
                seen.add(key)
                assert not problems(launch, one.arch), (case_title(one), problems(launch, one.arch))
    assert len(seen) >= 2 * 2 * (2 + 2) + 2  # two GPUs, two dtypes, full and sliding, decode and prefill, and the sum


def problems(launch: object, arch: str) -> list[str]:
    """Registers that went to memory, and loads of the cache that are not 128 bits wide."""
    compiled = compile_launch(launch, arch)  # type: ignore[arg-type]
    notes = parse_assembly(compiled.assembly).metadata
    names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = [f"{name} {notes[name]}" for name in names if notes[name]]
    narrow = set(re.findall(r"(?:global|buffer)_load_(?:d16_\w+|u8|u16|i8|i16|b64|b96)", compiled.assembly))
    return found + sorted(narrow)


@pytest.mark.parametrize("query_tokens", MOST_INSTRUCTIONS_PER_BYTE)
@pytest.mark.parametrize("ratio", [8, 12])
def test_instructions_per_byte_of_an_fp8_cache(ratio: int, query_tokens: int) -> None:
    """Whole launch, 64k tokens, one sequence, on gfx1201, beside vLLM's kernels compiled in the same run."""
    call = AttentionCall(AttentionShape(2 * ratio, 2, 128, 0, 16, "fp8", "bf16"), 1, query_tokens, DEEP)
    shipped = shipped_configs("attention_fp8", {"Hq": 16, "Hkv": 2, "D": 128, "W": 0, "C": DEEP}, "gfx1201")
    cases = [call_case(call, shipped[query_tokens], "gfx1201")]
    cases += [attention_baseline_case(name, call, "gfx1201") for name in ("vllm_unified", "vllm_segmented")]
    ours, unified, segmented = (one for one in inspect_cases(cases) if isinstance(one, Report))
    print(
        f"{query_tokens} query tokens, ratio {ratio}: ours {ours.lane_inst_per_byte:.2f} instructions per KV byte in "
        f"{ours.workgroups} work-groups; unified {unified.lane_inst_per_byte:.1f} in {unified.workgroups} "
        f"({unified.lane_inst_per_byte / ours.lane_inst_per_byte:.1f} times), segmented "
        f"{segmented.lane_inst_per_byte:.1f} in {segmented.workgroups} "
        f"({segmented.lane_inst_per_byte / ours.lane_inst_per_byte:.1f} times)"
    )
    assert ours.lane_inst_per_byte <= MOST_INSTRUCTIONS_PER_BYTE[query_tokens]
    assert ours.lane_inst_per_byte < min(unified.lane_inst_per_byte, segmented.lane_inst_per_byte) / 3
    # FP8 is converted by the hardware: one instruction for two bytes, one to make two of them float16, and a sixteenth
    # of that for the probabilities. There is no room for another way.
    tiles = -(-query_tokens * ratio // 16)
    assert ours.mix["convert"] * 32 == pytest.approx(ours.case.memory_bytes * tiles * 17 / 16, rel=0.01)
    assert ours.lds_bytes == 0 or all(one.lds_bytes == 0 for one in ours.launches if "decode" in one.name)


def test_every_shipped_fp8_decode_keeps_to_the_limit(reports: dict[str, Report]) -> None:
    """On gfx1201, whole launches, at every tensor parallelism and context from 8k on."""
    mine = [one for one in full(reports, "gfx1201") if one.case.kernel == "attention_fp8"]
    assert len(mine) == 4 * 3 * 2  # ranks, contexts, query tokens
    over = {
        case_title(one.case): one.lane_inst_per_byte
        for one in mine
        if one.lane_inst_per_byte > MOST_INSTRUCTIONS_PER_BYTE[one.case.shape["q_len"]]
    }
    assert not over, over


@pytest.mark.parametrize("arch", ARCHS)
def test_full_layers_fill_the_card_with_one_sequence(reports: dict[str, Report], arch: str) -> None:
    """64k tokens, 1 and 4 query tokens, at every tensor parallelism, one KV head a rank (8 ranks) included."""
    mine = deep(reports, arch)
    assert len(mine) == 2 * 4 * 2  # KV dtypes, ranks, query tokens
    few = {case_title(one.case): one.workgroups for one in mine if one.workgroups < 2 * DEVICES[arch].compute_units}
    assert not few, few


@pytest.mark.parametrize("arch", ARCHS)
def test_full_layers_are_bound_by_memory(reports: dict[str, Report], arch: str) -> None:
    """With one query token, by a model that is optimistic: expect 50 to 75 % of its bounds."""
    slow = {
        case_title(one.case): one.share_of_bandwidth
        for one in deep(reports, arch)
        if one.case.shape["q_len"] == 1 and one.share_of_bandwidth * 0.75 < 1
    }
    assert not slow, slow


def test_sliding_layers(reports: dict[str, Report]) -> None:
    """512 keys are 17 tiles of 32, so 16 splits leave a work-group one or two: more would have nothing to do. That is
    what bounds them: 32 work-groups a row tile at two KV heads. At so few keys, what every work-group does once (its
    queries, its result) and the sum over the splits cost more than the keys: whole launches take more instructions per
    byte than deep layers, and still only microseconds. The gate is therefore the tiles': the launch less a launch of
    the same grid over nothing to speak of, a window of 16 keys.
    """
    mine = [one for one in reports.values() if one.case.shape["W"]]
    assert len(mine) == 2 * 2 * 4 * 2  # GPUs, KV dtypes, ranks, query tokens
    for one in mine:
        shape = one.case.shape
        tiles = -(-(shape["q_len"] * shape["Hq"] // shape["Hkv"]) // 16)
        assert one.workgroups == tiles * shape["Hkv"] * one.case.config["SPLITS"]
        assert one.case.config["SPLITS"] in (4, 8, 16)
        assert one.spills == 0
        assert one.modelled_seconds < 1e-5
    for query_tokens in (1, 4):
        layer = {"Hq": 24, "Hkv": 2, "D": 128, "W": 512, "C": 512}
        config = shipped_configs("attention_fp8", layer, "gfx1201")[query_tokens]
        calls = [
            AttentionCall(AttentionShape(24, 2, 128, window, 16, "fp8", "bf16"), 1, query_tokens, 8192)
            for window in (512, 16)
        ]
        deep, shallow = (one for one in inspect_cases([call_case(call, config, "gfx1201") for call in calls]))
        assert isinstance(deep, Report) and isinstance(shallow, Report)
        whole, once = (sum(one.instructions for one in report.launches) for report in (deep, shallow))
        instructions = whole - once
        keys = deep.case.memory_bytes - shallow.case.memory_bytes
        row_tiles = -(-query_tokens * 12 // 16)
        print(
            f"sliding, {query_tokens} query tokens: {deep.lane_inst_per_byte:.1f} instructions per KV byte, of them "
            f"{32 * instructions / keys:.1f} for the keys; {deep.workgroups} work-groups, "
            f"{deep.modelled_seconds * 1e6:.1f} us to issue (modelled)"
        )
        assert 32 * instructions / keys <= SIXTEEN_ROWS * row_tiles


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", list(SHAPES))
def test_prefill_is_bound_by_wmma(kernel: str, arch: str) -> None:
    """Of the cycles in which a SIMD issues to its vector unit, in the whole launch, WMMA takes more than half."""
    shape = {"Hq": 16, "Hkv": 2, "D": 128, "W": 0, "C": 8192}
    (launch,) = case(kernel, shape, 2048, shipped_configs(kernel, shape, arch)[2048], arch).launches
    count = count_launch(compile_launch(launch, arch), launch)
    cycles = {True: 0.0, False: 0.0}
    for block, times in zip(count.assembly.blocks, count.blocks, strict=True):
        for one in block.instructions:
            if one.is_valu:
                cycles["wmma" in one.opcode] += times * instruction_cycles(one, DEVICES[arch]).valu
    share = cycles[True] / sum(cycles.values())
    print(f"{kernel} on {arch}: WMMA takes {share:.0%} of the vector unit's cycles")
    assert share > 0.5


def test_the_gates_can_fail() -> None:
    """Keys in one part leave the card empty; 64 keys a tile of a 16-bit cache spill in prefill on gfx1201."""
    call = AttentionCall(AttentionShape(16, 2, 128, 0, 16, "fp8", "bf16"), 1, 1, DEEP)
    (alone,) = inspect_cases([call_case(call, decode_config(1, 2), "gfx1201")])
    assert isinstance(alone, Report) and alone.workgroups < 2 * DEVICES["gfx1201"].compute_units
    wide = replace(call, shape=replace(call.shape, kv_dtype="bf16"), query_tokens=512, context_tokens=1024)
    (prefill,) = call_case(wide, prefill_config(128, 64, 8), "gfx1201").launches
    assert problems(prefill, "gfx1201")
    one: KernelCase = attention_baseline_case("vllm_unified", call, "gfx1201")
    assert problems(one.launches[0], "gfx1201")

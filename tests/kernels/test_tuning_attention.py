"""Which config attention runs with: the bucket of the context, the nearest query tokens of the phase, the defaults."""

import itertools
import logging
from collections.abc import Iterator
from math import log2

import pytest
import torch

from step128_kernels.attention import configs
from step128_kernels.attention.cases import SHAPES
from step128_kernels.attention.configs import (
    CONTEXTS,
    DECODE_ROWS,
    DEFAULT,
    KERNELS,
    KEYS,
    PORTABLE,
    PREFILL_ROWS,
    attention_candidates,
    batch_of,
    choose,
    dimensions,
    shape_of,
)
from step128_kernels.attention.launches import decode_launches, prefill_launches, target_of
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.tune.search import ROWS
from step128_kernels.tuned import load as tuning
from step128_kernels.tuned.load import TunedTable, load_config
from step128_kernels.tuned.names import DEVICE_OF_ARCH, expanded, file_name, parse_file_name

GPU = torch.device("cuda", 0)
FULL = AttentionShape(16, 2, 128, 0, 16, "fp8", "bf16")
SLIDING = AttentionShape(24, 2, 128, 512, 16, "bf16", "bf16")


@pytest.fixture(autouse=True)
def on_an_r9700(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(configs, "gpu_identity", lambda device: ("AMD_Radeon_R9700", "gfx1201"))
    monkeypatch.delenv("STEP128_TUNED_DIR", raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, int]]]:
    """Files that are asked for, each holding a config that tells its own number of rows."""
    found: list[tuple[str, dict[str, int]]] = []
    marked = {rows: configs.decode_config(rows, 2) for rows in DECODE_ROWS}
    marked |= {rows: configs.prefill_config(rows, 32, 8) for rows in (512, 2048)}

    def load(kernel: str, shape: dict[str, int], *_: object, **__: object) -> TunedTable:
        found.append((kernel, shape))
        return TunedTable(marked, "measured")

    monkeypatch.setattr(configs, "load_config", load)
    return found


@pytest.mark.parametrize(
    ("context", "bucket"),
    [(1, 1024), (1024, 1024), (2896, 1024), (2897, 8192), (40000, 65536), (131072, 204800), (10**7, 204800)],
)
def test_the_bucket_is_the_nearest_by_ratio(context: int, bucket: int) -> None:
    assert dimensions(FULL, context) == {"Hq": 16, "Hkv": 2, "D": 128, "W": 0, "C": bucket}
    assert bucket == min(CONTEXTS, key=lambda one: abs(log2(one / context)))


def test_a_window_is_a_bucket_of_its_own() -> None:
    assert dimensions(SLIDING, 100_000) == {"Hq": 24, "Hkv": 2, "D": 128, "W": 512, "C": 512}


@pytest.mark.parametrize(
    ("sequences", "query_tokens", "rows"),
    [
        (1, 1, 1),
        (1, 2, 1),  # as near to 4: the smaller
        (1, 4, 4),
        (8, 1, 4),
        (8, 4, 32),
        (64, 8, 32),  # still a decode, whatever the batch
        (1, 9, 512),  # a prefill, however short
        (2, 512, 512),
        (4, 512, 2048),
    ],
)
def test_the_nearest_query_tokens_of_the_phase(
    sequences: int, query_tokens: int, rows: int, asked: list[tuple[str, dict[str, int]]]
) -> None:
    config = choose(FULL, sequences, query_tokens, 65536, GPU)
    assert config["phase"] == ("decode" if query_tokens <= 8 else "prefill")
    assert config["SPLITS" if query_tokens <= 8 else "BLOCK_M"] == rows
    assert asked == [("attention_fp8", dimensions(FULL, 65536))]
    assert choose(FULL, sequences, query_tokens, 65536, GPU) is config
    assert len(asked) == 1  # called for every layer and step, so looked up once


@pytest.mark.parametrize(
    ("kv_dtype", "kernel"), [("fp8", "attention_fp8"), ("bf16", "attention_bf16"), ("fp16", "attention_bf16")]
)
def test_files_are_by_kv_dtype(kv_dtype: str, kernel: str, asked: list[tuple[str, dict[str, int]]]) -> None:
    element = kv_dtype if kv_dtype != "fp8" else "bf16"
    choose(AttentionShape(16, 2, 128, 0, 16, kv_dtype, element), 1, 1, 1024, GPU)
    assert [name for name, _ in asked] == [kernel]


def test_a_file_without_a_phase_leaves_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    only = TunedTable({1: configs.decode_config(7, 2)}, "measured")
    monkeypatch.setattr(configs, "load_config", lambda *_, **__: only)
    assert choose(FULL, 1, 1, 1024, GPU)["SPLITS"] == 7
    assert choose(FULL, 1, 600, 1024, GPU) == DEFAULT[512]


@pytest.mark.parametrize("arch", DEVICE_OF_ARCH)
def test_every_layer_and_call_of_the_model_has_tuned_data(
    arch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(configs, "gpu_identity", lambda device: (DEVICE_OF_ARCH[arch], arch))
    tuning._warned.clear()
    sizes = list(itertools.product((1, 1000, 50_000, 262_144), (1, 2, 4, 8, 512), (1, 8, 100)))
    for kernel, shapes in SHAPES.items():
        for dims in shapes:
            for context, query_tokens, sequences in sizes:
                shape = shape_of(dims, kernel)
                config = choose(shape, sequences, query_tokens, context, GPU)
                table = load_config(kernel, dimensions(shape, context), DEVICE_OF_ARCH[arch], arch, default=DEFAULT)
                assert table.exact and config in table.configs.values()
                call = AttentionCall(shape, sequences, query_tokens, max(context, query_tokens))
                make = prefill_launches if query_tokens > 8 else decode_launches
                assert make(call, config, target_of(arch))
    assert not caplog.records


def test_another_head_size_takes_the_nearest_layers_data_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tuning._load.cache_clear()
    tuning._warned.clear()
    shape = AttentionShape(16, 2, 64, 0, 16, "fp8", "bf16")
    with caplog.at_level(logging.WARNING):
        configs_ = [choose(shape, 1, tokens, 65536, GPU) for tokens in (1, 4)]
    assert configs_[0]["phase"] == "decode"
    (record,) = caplog.records
    said = record.getMessage()
    assert "Hq=16,Hkv=2,D=64,W=0,C=65536,device_name=AMD_Radeon_R9700,dtype=fp8.json" in said
    assert "Using Hq=16,Hkv=2,D=128,W=0,C=65536,device_name=AMD_Radeon_R9700,dtype=fp8.json" in said
    assert "step128-kernels tune --kernel attention_fp8 --shape Hq=16,Hkv=2,D=64,W=0,C=65536 --arch gfx1201" in said


@pytest.mark.parametrize(("arch", "default"), [("gfx1100", DEFAULT), ("", PORTABLE)])
def test_other_gpus_get_the_built_in_configs(
    arch: str, default: dict[int, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(configs, "gpu_identity", lambda device: ("some GPU", arch))
    assert choose(FULL, 8, 4, 65536, GPU) == default[1]
    assert choose(FULL, 1, 100, 65536, GPU) == default[512]
    assert not caplog.records


@pytest.mark.parametrize("default", [DEFAULT, PORTABLE])
def test_built_in_configs_hold_every_key(default: dict[int, dict[str, object]]) -> None:
    assert {config["phase"] for config in default.values()} == set(KEYS)
    assert all(config.keys() == KEYS[str(config["phase"])] for config in default.values())


@pytest.mark.parametrize(("rows", "batch"), [(1, (1, 1)), (4, (1, 4)), (8, (1, 8)), (32, (8, 4)), (2048, (1, 2048))])
def test_batches_of_a_number_of_query_tokens(rows: int, batch: tuple[int, int]) -> None:
    assert batch_of(rows) == batch


@pytest.mark.parametrize("arch", DEVICE_OF_ARCH)
@pytest.mark.parametrize("kernel", KERNELS.values())
def test_candidates_are_launchable_and_only_where_files_have_rows(kernel: str, arch: str) -> None:
    for dims in SHAPES[kernel]:
        offered = {
            (phase, rows): list(attention_candidates(phase, dims, rows, arch)) for phase in ROWS for rows in ROWS[phase]
        }
        assert {key for key, found in offered.items() if found} == {
            *(("decode", rows) for rows in DECODE_ROWS),
            *(("prefill", rows) for rows in PREFILL_ROWS),
        }
        for (phase, rows), found in offered.items():
            assert all(one.keys() == KEYS[phase] and one["phase"] == phase for one in found)
            assert len({tuple(one.items()) for one in found}) == len(found)
            sequences, tokens = batch_of(rows)
            call = AttentionCall(shape_of(dims, kernel), sequences, tokens, max(tokens, dims["C"]))
            make = prefill_launches if phase == "prefill" else decode_launches
            for one in found:
                assert make(call, one, target_of(arch))


def test_names_of_files() -> None:
    dims = {"Hq": 16, "Hkv": 2, "D": 128, "W": 0, "C": 65536}
    for kv_dtype, kernel in KERNELS.items():
        name = f"Hq=16,Hkv=2,D=128,W=0,C=65536,device_name=AMD_Radeon_R9700,dtype={kv_dtype}.json"
        assert file_name(kernel, dims, "AMD Radeon AI PRO R9700").replace("_AI_PRO", "") == name
        assert parse_file_name(kernel, name) == (dims, "AMD_Radeon_R9700")
        others = ("nl4_gemm", "nl4_moe", "vllm_fused_moe", *(other for other in KERNELS.values() if other != kernel))
        assert all(parse_file_name(other, name) is None for other in others)


def test_attention_stands_for_both_kv_dtypes() -> None:
    assert expanded(["nl4_moe", "attention"]) == ["nl4_moe", "attention_fp8", "attention_bf16"]

"""What the attention backend tells vLLM, what it refuses, and one layer's step on a CPU; no server takes part."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import platforms
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheTensor, create_kv_cache_views
from vllm.v1.worker import workspace
from vllm.v1.worker.utils import select_common_block_size

from step128_kernels.attention import scratch_elements
from step128_kernels.vllm_plugin import attention
from step128_kernels.vllm_plugin.attention import (
    PagedAttentionBackend,
    PagedAttentionImpl,
    PagedAttentionMetadataBuilder,
    PagedAttentionOnCpu,
    attention_in_use,
)

FP8 = torch.float8_e4m3fn
SERVED: dict[str, Any] = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "fp8",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": None,
    "attn_type": AttentionType.DECODER,
    "has_sliding_window": True,
}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_current_platform", SimpleNamespace(is_cpu=lambda: False))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's table of backends as it was, for this test alone."""
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("value", [None, "0", "1"])
def test_a_cpu_keeps_vllms_backend_unless_asked(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(attention.CPU_ATTENTION_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(attention.CPU_ATTENTION_VARIABLE, value)
    for _ in range(2):  # vLLM loads plugins more than once in a process
        attention.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is PagedAttentionBackend
    assert (AttentionBackendEnum.CPU_ATTN.get_class() is PagedAttentionOnCpu) == (value == "1")


def test_names_are_members_of_vllms_enum() -> None:
    """vLLM looks a layer's backend up by its name."""
    assert AttentionBackendEnum[PagedAttentionBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert AttentionBackendEnum[PagedAttentionOnCpu.get_name()] is AttentionBackendEnum.CPU_ATTN


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_size": 64, "kv_cache_dtype": "fp8_e4m3"},
        {"head_size": 256, "kv_cache_dtype": "auto", "dtype": torch.float16},
        {"kv_cache_dtype": "bfloat16", "block_size": 128},
        {"kv_cache_dtype": "float16", "dtype": torch.float16, "block_size": None},
        {"has_sliding_window": False, "block_size": 48, "use_kv_connector": True},
    ],
)
def test_served(change: dict[str, Any]) -> None:
    assert PagedAttentionBackend.validate_configuration(**SERVED | change) == []


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_size": 96}, "head_size"),
        ({"dtype": torch.float32}, "on a CPU only"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "float16"}, "needs a model of float16"),
        ({"block_size": 24}, "block_size"),
        ({"block_size": 8}, "block_size"),
        ({"has_sink": True}, "sinks"),
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_per_head_quant_scales": True}, "per-head"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type"),
        ({"use_non_causal": True}, "non-causal"),
        ({"use_dcp": True}, "DCP"),
        ({"use_pcp": True}, "PCP"),
        ({"use_rswa": True}, "R-SWA"),
    ],
)
def test_refused(change: dict[str, Any], reason: str) -> None:
    found = PagedAttentionBackend.validate_configuration(**SERVED | change)
    assert len(found) == 1 and reason in found[0]


def test_a_cpu_takes_float32() -> None:
    change = {"dtype": torch.float32, "kv_cache_dtype": "auto"}
    assert PagedAttentionBackend.validate_configuration(**SERVED | change) == []


def layer(heads: int = 8, head_size: int = 64, **options: Any) -> PagedAttentionImpl:
    return PagedAttentionImpl(heads, head_size, 0.125, **{"num_kv_heads": 1} | options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alibi_slopes": [0.5] * 8}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"sinks": torch.zeros(8)}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "a KV cache shared between layers"),
        ({"head_size": 96}, "head size 96"),
        ({"heads": 17}, "17 over 1 heads"),
        ({"heads": 8, "num_kv_heads": 3}, "8 over 3 heads"),
        ({"heads": 1, "num_kv_heads": 2}, "1 over 2 heads"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "type encoder_only"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache fp8_e5m2"),
    ],
)
def test_a_layer_says_what_it_does_not_serve(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"not {named}$"):
        layer(**options)


@pytest.mark.parametrize("options", [{"logits_soft_cap": 0.0}, {"heads": 16}, {"heads": 96, "num_kv_heads": 8}])
def test_a_layer_that_is_served(options: dict[str, Any]) -> None:
    assert layer(**options).window == 0


def vllms_cache(layout: KVCacheLayout, page: int, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """The first layer's view of vLLM's own pool of two layers and five blocks."""
    spec = FullAttentionSpec(block_size=page, num_kv_heads=kv_heads, head_size=64, dtype=dtype)
    size = spec.page_size_bytes
    tensor = KVCacheTensor(size=10 * size, layers=["a", "b"], layer_stride=5 * size, block_stride=size)
    view: torch.Tensor = create_kv_cache_views(torch.zeros(10 * size, dtype=torch.int8), spec, 5, layout, tensor)[0]
    return view


def metadata(starts: list[int], lengths: list[int], table: torch.Tensor) -> CommonAttentionMetadata:
    start = torch.tensor(starts, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=starts[-1],
        max_query_len=4,
        max_seq_len=4096,
        block_table_tensor=table,
        slot_mapping=torch.arange(starts[-1]),
    )


@pytest.fixture
def builder() -> PagedAttentionMetadataBuilder:
    return PagedAttentionMetadataBuilder(SimpleNamespace(), ["a"], SimpleNamespace(), torch.device("cpu"))


def test_metadata_are_vllms_persistent_tensors(builder: PagedAttentionMetadataBuilder) -> None:
    """A captured graph reads what later steps write there, and a draft's next step what the last one did."""
    common = metadata([0, 1, 5], [20, 33], torch.zeros(2, 4, dtype=torch.int32))
    for built in (builder.build(0, common), builder.build_for_cudagraph_capture(common)):
        assert built.query_start is common.query_start_loc and built.seq_lens is common.seq_lens
        assert built.block_table is common.block_table_tensor and built.slot_mapping is common.slot_mapping
        # With the number of sequences, all that a grid depends on. vLLM captures with the model's longest context.
        assert (built.tokens, built.max_query_tokens, built.max_context_tokens) == (5, 4, 4096)
    assert builder.supports_draft_decode_metadata_update
    builder.update_draft_decode_metadata(builder.build(0, common))


def test_graphs_of_verifications_may_be_captured(builder: PagedAttentionMetadataBuilder) -> None:
    support = builder.get_cudagraph_support(SimpleNamespace(), SimpleNamespace())
    assert support.value >= AttentionCGSupport.UNIFORM_BATCH.value


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])])
def test_a_batch_that_is_not_causal_is_refused(builder: PagedAttentionMetadataBuilder, causal: Any) -> None:
    common = metadata([0, 1], [20], torch.zeros(1, 4, dtype=torch.int32)).replace(causal=causal)
    with pytest.raises(NotImplementedError, match="causal only"):
        builder.build(0, common)


@pytest.mark.parametrize("page", [16, 32, 128, 272])
def test_vllm_splits_no_page(page: int) -> None:
    """The order of a page is ours as a whole: a kernel's block must be the manager's."""
    assert select_common_block_size(page, [PagedAttentionBackend]) == page


@pytest.mark.parametrize(("kv_cache_dtype", "stored"), [("fp8", torch.uint8), ("auto", torch.bfloat16)])
@pytest.mark.parametrize("window", [None, 3])
def test_one_layers_step(
    kv_cache_dtype: str, stored: torch.dtype, window: int | None, builder: PagedAttentionMetadataBuilder
) -> None:
    """A verification after nine tokens and a whole prompt, in vLLM's own pool and the layout asked for."""
    (layout,) = PagedAttentionBackend.supported_kv_cache_layouts()
    cache = vllms_cache(layout, 16, 2, stored)
    mine = layer(16, num_kv_heads=2, kv_cache_dtype=kv_cache_dtype, sliding_window=window)
    module = SimpleNamespace(_k_scale=torch.tensor(0.03), _v_scale=torch.tensor(0.05))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(18, 2, 64, generator=generator).bfloat16() for _ in range(2))
    query = torch.randn(12, 16, 64, generator=generator).bfloat16()
    table = torch.tensor([[4, 0], [2, 1]], dtype=torch.int32)
    slots = torch.cat([4 * 16 + torch.arange(12), 2 * 16 + torch.arange(6)])  # sequences of 12 and of 6 tokens
    for first, last in ((0, 9), (9, 18)):  # the second step writes past the first sequence's nine
        padded = torch.cat([slots[first:last], torch.tensor([-1, -1])])
        mine.do_kv_cache_update(module, key[first:], value[first:], cache, padded)
    out = torch.full((12, 16, 64), 7.0, dtype=torch.bfloat16)
    mine.forward(module, query, key[9:], value[9:], cache, builder.build(0, metadata([0, 3, 9], [12, 6], table)), out)
    if kv_cache_dtype == "fp8":
        key, value = (
            (x.float() / s).to(FP8).float() * s for x, s in ((key, module._k_scale), (value, module._v_scale))
        )
    for rows, tokens in ((slice(0, 3), slice(0, 12)), (slice(3, 9), slice(12, 18))):
        count, new = tokens.stop - tokens.start, rows.stop - rows.start
        age = torch.arange(count - new, count)[:, None] - torch.arange(count)[None]
        q, k, v = (x.float().transpose(0, 1)[None] for x in (query[rows], key[tokens], value[tokens]))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=(age >= 0) & (age < (window or count)), scale=0.125, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(out[rows].float(), wanted, rtol=2**-8, atol=1e-4)  # rounded to bfloat16 once
    assert (out[9:] == 7).all()


def test_the_layout_asked_for_is_the_one_that_fits() -> None:
    """Tokens outside heads, vLLM's default, would interleave the pages of two heads."""
    mine, cache = layer(16, num_kv_heads=2), vllms_cache(KVCacheLayout.LBNHC, 16, 2, torch.bfloat16)
    with pytest.raises(ValueError, match="must be contiguous"):
        mine.do_kv_cache_update(
            SimpleNamespace(_k_scale=None, _v_scale=None),
            *torch.zeros(2, 1, 2, 64).bfloat16(),
            cache,
            torch.zeros(1).long(),
        )


def test_profiling_gives_zeros() -> None:
    out = torch.full((3, 8, 64), float("nan"))
    query = torch.zeros(3, 8, 64)
    assert (layer().forward(None, query, query, query, torch.empty(0), None, out) == 0).all() and not out.any()


def test_output_is_not_quantized() -> None:
    x = torch.zeros(3, 8, 64)
    with pytest.raises(NotImplementedError, match="does not quantize"):
        layer().forward(None, x, x, x, torch.empty(0), None, x, output_scale=torch.ones(1))


def test_all_layers_share_one_buffer_that_graphs_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiling runs through all layers, so the widest one's size stands before the first graph is captured."""
    manager = workspace.WorkspaceManager(torch.device("cpu"))
    monkeypatch.setattr(workspace, "_manager", manager)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    full, sliding = layer(8, 128), layer(12, 128)
    gpu = torch.device("cuda")
    full._scratch(gpu)
    kept = sliding._scratch(gpu)
    assert kept.dtype == torch.float32 and kept.numel() == scratch_elements(12, 128)
    manager.lock()
    assert full._scratch(gpu).numel() == scratch_elements(8, 128)
    assert {one._scratch(gpu).data_ptr() for one in (full, sliding, full)} == {kept.data_ptr()}
    with pytest.raises(AssertionError, match="locked"):
        layer(16, 128)._scratch(gpu)


class Layer(torch.nn.Module):
    """As vLLM's Attention, as far as the report looks at it."""

    def __init__(self, backend: Any, impl: Any) -> None:
        super().__init__()
        self.attn_backend, self.impl, self.kv_cache_dtype = backend, impl, "fp8"
        self._k_scale = torch.tensor(1.0)


def test_the_report_names_every_backend_and_our_path() -> None:
    ours, theirs = Layer(PagedAttentionBackend, layer()), Layer(AttentionBackendEnum.CPU_ATTN.get_class(), object())
    in_place_of_theirs = Layer(PagedAttentionOnCpu, layer())

    def report(*layers: Layer) -> tuple[str | None, str | None]:
        found = attention_in_use(torch.nn.ModuleList([torch.nn.Linear(2, 2), *layers]))
        return found["attention_backend"], found["attention_path"]

    assert report() == (None, None)
    assert report(ours, ours) == ("CUSTOM", "torch")
    assert report(theirs) == ("CPU_ATTN", None)
    assert report(in_place_of_theirs) == ("CPU_ATTN", "torch")
    assert report(ours, theirs) == ("CPU_ATTN+CUSTOM", "torch")

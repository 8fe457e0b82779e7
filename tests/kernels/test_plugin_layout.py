"""When the plugin gives weights the kernels' order, what it leaves alone, and its operators."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from step128_kernels import codebook
from step128_kernels.nl4_gemm import nl4_gemm
from step128_kernels.nl4_layout import to_kernel_layout
from step128_kernels.nl4_moe import nl4_moe
from step128_kernels.nl4_moe.reference import route
from step128_kernels.torch_codebook import dequantize
from step128_kernels.vllm_plugin import kernel_layout
from step128_kernels.vllm_plugin.kernel_layout import in_kernel_layout, use_kernel_layout, weight_order, weight_path
from step128_kernels.vllm_plugin.names import checkpoint_names

Weight = tuple[torch.Tensor, torch.Tensor]


def quantized(*shape: int, seed: int = 0) -> Weight:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1
    packed, scale = codebook.quantize(weight)
    return torch.from_numpy(packed), torch.from_numpy(scale)


def layer_with(**weights: Weight) -> torch.nn.Module:
    layer = torch.nn.Module()
    for prefix, (packed, scale) in weights.items():
        layer.register_parameter(f"{prefix}_packed", torch.nn.Parameter(packed, requires_grad=False))
        layer.register_parameter(f"{prefix}_scale", torch.nn.Parameter(scale, requires_grad=False))
    return layer


def names(layer: torch.nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters()}


class StandIn(torch.nn.Module):
    """As vLLM's StageMissingLayer: no parameters, but the attributes of a layer that is not served."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP128_KERNEL_LAYOUT", "1")


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_a_cpu_keeps_the_checkpoint_s_order(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEP128_KERNEL_LAYOUT", raising=False)
    if value is not None:
        monkeypatch.setenv("STEP128_KERNEL_LAYOUT", value)
    layer = layer_with(weight=quantized(16, 32))
    use_kernel_layout(layer, "weight")
    assert names(layer) == {"weight_packed", "weight_scale"} and not in_kernel_layout(layer, "weight")
    assert weight_path(layer, "weight") == "torch"
    assert kernel_layout._is_due(torch.device("cuda", 0))


@pytest.mark.usefixtures("switched_on")
def test_weights_are_replaced_once() -> None:
    w13, w2 = quantized(3, 32, 48), quantized(3, 48, 16)
    layer = layer_with(w13_weight=w13, w2_weight=w2)
    use_kernel_layout(layer, "w13_weight", "w2_weight")
    assert names(layer) == {"w13_weight_tiles", "w13_weight_scales", "w2_weight_tiles", "w2_weight_scales"}
    for got, wanted in zip(layer.parameters(), (*to_kernel_layout(*w13), *to_kernel_layout(*w2)), strict=True):
        assert torch.equal(got, wanted) and not got.requires_grad
    before = dict(layer.named_parameters())
    use_kernel_layout(layer, "w13_weight", "w2_weight")
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    assert in_kernel_layout(layer, "w2_weight") and weight_path(layer, "w13_weight") == "torch"


@pytest.mark.usefixtures("switched_on")
def test_a_layer_that_is_not_served_is_left_alone() -> None:
    layer = layer_with(weight=quantized(16, 32)).to("meta")
    stand_in = StandIn(layer)
    use_kernel_layout(stand_in, "weight")
    assert names(layer) == {"weight_packed", "weight_scale"}
    assert weight_path(stand_in, "weight") is None and weight_order(stand_in, "weight") is None


def test_names_of_reordered_weights_are_the_checkpoint_s() -> None:
    experts = "language_model.model.layers.3.moe.experts.routed_experts"
    for new, old in {"weight_tiles": "weight_packed", "weight_scales": "weight_scale"}.items():
        for module in ("language_model.lm_head.", "model.layers.3.self_attn.qkv_proj.", f"{experts}.w13_"):
            assert checkpoint_names(module + new) == checkpoint_names(module + old)
    assert checkpoint_names(f"{experts}.w2_weight_scales") == ("model.layers.3.moe.down_proj.weight_scale",)


def test_a_cpu_needs_no_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from step128_kernels.nl4_gemm import nl4_gemm, nl4_gemm_tiled\n"
        "from step128_kernels.nl4_layout import to_kernel_layout\n"
        "from step128_kernels.nl4_moe import nl4_moe, nl4_moe_tiled\n"
        "from step128_kernels.vllm_plugin import kernel_layout\n"
        "weight = torch.full((2, 16, 8), 5, dtype=torch.uint8), torch.ones(2, 16, 1, dtype=torch.float16)\n"
        "x = torch.ones(3, 16)\n"
        "assert torch.equal(nl4_gemm_tiled(x, *to_kernel_layout(*(w[0] for w in weight)), 16),"
        " nl4_gemm(x, *(w[0] for w in weight)))\n"
        "ids = torch.zeros(3, 1, dtype=torch.int32)\n"
        "up = tuple(torch.cat((w, w), 1) for w in weight)\n"
        "tiled = (*to_kernel_layout(*up), *to_kernel_layout(*weight))\n"
        "assert torch.equal(nl4_moe_tiled(x, *tiled, torch.ones(3, 1), ids, 16, 7.0),"
        " nl4_moe(x, *up, *weight, torch.ones(3, 1), ids, 7.0))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def arguments() -> dict[str, tuple[Any, ...]]:
    """For every operator the arguments of one call, weights in the kernels' order."""
    linear = to_kernel_layout(*quantized(37, 48))
    gate_up, down = to_kernel_layout(*quantized(3, 32, 48)), to_kernel_layout(*quantized(3, 48, 16))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    routing = route(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), None, 2, True, 3.0)
    expert_map = torch.tensor([-1, 0, 1, 2, -1], dtype=torch.int32)
    ids = torch.tensor([[3, 36, 0]])
    return {
        "nl4_linear_tiled": (x.view(1, 7, 48), *linear, 37),
        "nl4_moe_tiled": (x, *gate_up, *down, *routing, 16, 7.0, expert_map),
        "nl4_embedding_tiled": (ids, *linear, 48, torch.bfloat16),
    }


@pytest.fixture(scope="module")
def operator() -> Callable[[str], Any]:
    pytest.importorskip("vllm")
    from step128_kernels.vllm_plugin import ops

    return lambda name: getattr(ops, f"{name}_op").default


@pytest.mark.parametrize("name", ["nl4_linear_tiled", "nl4_moe_tiled", "nl4_embedding_tiled"])
def test_operators_are_what_a_compiler_is_told(
    name: str, arguments: dict[str, tuple[Any, ...]], operator: Callable[[str], Any]
) -> None:
    """They change and return no argument, and shape, strides and dtype are those of the fake implementation."""
    torch.library.opcheck(operator(name), arguments[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("switched_on")
def test_methods_compute_the_same_from_either_order() -> None:
    pytest.importorskip("vllm")
    from step128_kernels.vllm_plugin.load_report import weights_in_use
    from step128_kernels.vllm_plugin.quantization import NL4LinearMethod

    method, layer = NL4LinearMethod(), layer_with(weight=quantized(37, 48))
    layer.nl4_rows, layer.nl4_columns = 37, 48  # as create_weights leaves them
    layer.quant_method, layer.params_dtype = method, torch.float32
    x, bias = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), torch.ones(37)
    ids = torch.tensor([[1, 36], [0, 16]])

    def results() -> list[torch.Tensor]:
        return [method.apply(layer, x), method.apply(layer, x, bias), method.embedding(layer, ids)]

    before = results()
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    assert names(layer) == {"weight_tiles", "weight_scales"}
    assert all(torch.equal(a, b) for a, b in zip(results(), before, strict=True))
    served = torch.nn.ModuleList([layer, StandIn(layer)])
    assert weights_in_use(served) == {"weight_path": "torch", "weight_order": "kernel"}
    other = layer_with(weight=quantized(16, 32))
    other.quant_method = method
    assert weights_in_use(torch.nn.ModuleList([layer, other])) == {
        "weight_path": "torch",
        "weight_order": "checkpoint+kernel",
    }
    assert weights_in_use(torch.nn.ModuleList([StandIn(layer)])) == {"weight_path": None, "weight_order": None}


def test_triton_is_reported_only_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, weights that were left in the checkpoint's order are the reference's, and are seen beside others."""
    pytest.importorskip("vllm")
    from step128_kernels.vllm_plugin.load_report import weights_in_use
    from step128_kernels.vllm_plugin.moe import NL4MoEMethod
    from step128_kernels.vllm_plugin.quantization import NL4LinearMethod

    monkeypatch.setenv("STEP128_KERNEL_LAYOUT", "1")
    tiled, left = layer_with(weight=quantized(16, 32)), layer_with(weight=quantized(16, 32))
    use_kernel_layout(tiled, "weight")
    tiled.quant_method = left.quant_method = NL4LinearMethod()
    experts = layer_with(w13_weight=quantized(3, 32, 48), w2_weight=quantized(3, 48, 16))
    experts.quant_method = NL4MoEMethod(None)
    use_kernel_layout(experts, "w13_weight")
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda _: True), raising=False)

    def found(*layers: torch.nn.Module) -> tuple[str | None, str | None]:
        in_use = weights_in_use(torch.nn.ModuleList(layers))
        return in_use["weight_path"], in_use["weight_order"]

    assert found(tiled) == ("triton", "kernel")
    assert found(left) == ("torch", "checkpoint")
    assert found(tiled, left) == ("torch+triton", "checkpoint+kernel")
    assert found(experts) == ("torch+triton", "checkpoint+kernel")  # half of its weights


def plain_experts(
    x: np.ndarray, w13: np.ndarray, w2: np.ndarray, weights: np.ndarray, ids: np.ndarray, owners: list[int]
) -> np.ndarray:
    """``[tokens, hidden]`` in float64, one token and one expert at a time; ``owners``: local number of each expert."""
    result = np.zeros_like(x, dtype=np.float64)
    for token, slot in np.ndindex(*ids.shape):
        expert = -1 if ids[token, slot] < 0 else owners[ids[token, slot]]
        if expert >= 0:
            gate, up = np.split(w13[expert].astype(np.float64) @ x[token], 2)
            hidden = np.minimum(gate / (1 + np.exp(-gate)), 7.0) * np.clip(up, -7.0, 7.0)
            result[token] += weights[token, slot] * (w2[expert].astype(np.float64) @ hidden)
    return result


OWNERS = {"all experts here": [0, 1, 2, 3, 4], "some elsewhere": [-1, 2, -1, 0, 1, 4, 3]}


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_of_vllm_s_router(tokens: int, ids_dtype: torch.dtype, owners: list[int]) -> None:
    """Routing as vLLM hands it to ``apply``: rows that pad a batch have expert -1, and weights that mean nothing."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from step128_kernels.vllm_plugin.moe import NL4MoEMethod

    w13, w2 = quantized(5, 64, 96, seed=1), quantized(5, 96, 32, seed=2)
    method, layer = NL4MoEMethod(None), layer_with(w13_weight=w13, w2_weight=w2)
    layer.nl4_intermediate, layer.activation = 32, MoEActivation.SWIGLUSTEP
    layer.expert_map = torch.tensor(owners, dtype=torch.int32) if -1 in owners else None
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens + 2, 96, generator=generator) * 30  # so that the clamps matter
    ids = torch.rand(tokens + 2, len(owners), generator=generator).argsort(dim=-1)[:, :3].to(ids_dtype)
    weights = torch.rand(tokens + 2, 3, generator=generator)
    padding = [0, tokens + 1]
    ids[padding] = -1

    def apply() -> torch.Tensor:
        return method.apply(layer, x, weights, ids, None, None)

    before = apply()
    method.process_weights_after_loading(layer)
    assert in_kernel_layout(layer, "w13_weight") and in_kernel_layout(layer, "w2_weight")
    got = apply()
    assert torch.equal(got, before) and not got[padding].any()
    exact = [codebook.dequantize(packed.numpy(), scale.numpy()) for packed, scale in (w13, w2)]
    wanted = plain_experts(x.numpy(), *exact, weights.numpy(), ids.numpy(), owners)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=1e-3)
    assert np.abs(wanted).max() > 10
    if tokens > 1:
        assert got[1:-1].any(dim=-1).sum() > 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 7, 200])
def test_on_a_gpu_triton_computes_and_nothing_waits_for_the_host(
    tokens: int, dtype: torch.dtype, owners: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layer, experts (with 200 tokens aligned by sorting) and embedding, replayed on another batch."""
    pytest.importorskip("vllm")
    from step128_kernels.vllm_plugin.ops import nl4_embedding_tiled_op, nl4_linear_tiled_op, nl4_moe_tiled_op

    monkeypatch.delenv("STEP128_KERNEL_LAYOUT", raising=False)
    w13, w2 = quantized(5, 64, 96, seed=1), quantized(5, 96, 32, seed=2)
    layer = layer_with(weight=quantized(37, 96), w13_weight=w13, w2_weight=w2).to("cuda")
    use_kernel_layout(layer, "weight", "w13_weight", "w2_weight")
    assert {weight_path(layer, prefix) for prefix in ("weight", "w13_weight", "w2_weight")} == {"triton"}
    expert_map = torch.tensor(owners, dtype=torch.int32) if -1 in owners else None
    map_on_gpu = None if expert_map is None else expert_map.to("cuda")

    def batch(seed: int, padding: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, 96, generator=generator).to(dtype)
        logits = torch.randn(tokens, len(owners), generator=generator)
        weights, ids = route(logits, None, 2, True, 3.0)
        ids[tokens - padding :] = -1
        return [x, weights, ids, torch.randint(37, (tokens,), generator=generator)]

    linear = (layer.weight_tiles, layer.weight_scales)
    experts = [getattr(layer, f"{name}_weight_{part}") for name in ("w13", "w2") for part in ("tiles", "scales")]
    x, weights, ids, token_ids = on_gpu = [part.to("cuda") for part in batch(0, 0)]

    def compute() -> list[torch.Tensor]:
        return [
            nl4_linear_tiled_op(x, *linear, 37),
            nl4_moe_tiled_op(x, *experts, weights, ids, 32, 7.0, map_on_gpu),
            nl4_embedding_tiled_op(token_ids, *linear, 96, dtype),
        ]

    compute()  # compiles, and finds the block sizes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for padding in (0, (tokens + 1) // 2):
        another = batch(1, padding)
        for old, new in zip(on_gpu, another, strict=True):
            old.copy_(new)
        graph.replay()
        exact = another[0].float()
        packed, scale = quantized(37, 96)
        wanted = [
            nl4_gemm(exact, packed, scale),
            nl4_moe(exact, *w13, *w2, another[1], another[2], 7.0, expert_map),
            dequantize(packed[another[3]], scale[another[3]], dtype).float(),
        ]
        tolerance = 2e-2 if dtype == torch.float16 else 1e-1  # of activations and of what is between two products
        for got, reference in zip(captured, wanted, strict=True):
            torch.testing.assert_close(got.cpu().float(), reference, rtol=tolerance, atol=tolerance)
        assert not captured[1][tokens - padding :].any()
        assert torch.equal(captured[2].cpu().float(), wanted[2])

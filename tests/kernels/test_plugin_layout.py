"""When the plugin gives weights the kernels' order, what it leaves alone, and its operators."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from step128_kernels import codebook
from step128_kernels.nl4_gemm import nl4_gemm, nl4_gemm_tiled
from step128_kernels.nl4_layout import to_kernel_layout
from step128_kernels.nl4_moe import nl4_moe, nl4_moe_tiled
from step128_kernels.nl4_moe.reference import route
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
def test_methods_compute_the_same_from_either_order(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(
        torch.nn.Parameter, "is_cuda", property(lambda weight: weight.dtype == torch.int64), raising=False
    )
    mixed = weights_in_use(torch.nn.ModuleList([layer, other]))
    assert mixed == {"weight_path": "torch+triton", "weight_order": "checkpoint+kernel"}
    assert weights_in_use(torch.nn.ModuleList([StandIn(layer)])) == {"weight_path": None, "weight_order": None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 4, 7, 100])
def test_on_a_gpu_triton_computes_and_nothing_waits_for_the_host(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEP128_KERNEL_LAYOUT", raising=False)
    w13, w2 = quantized(5, 64, 96, seed=1), quantized(5, 96, 32, seed=2)
    layer = layer_with(weight=quantized(37, 96), w13_weight=w13, w2_weight=w2).to("cuda")
    use_kernel_layout(layer, "weight", "w13_weight", "w2_weight")
    assert {weight_path(layer, prefix) for prefix in ("weight", "w13_weight", "w2_weight")} == {"triton"}
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(0)).to("cuda", torch.float16)
    routing = route(torch.randn(tokens, 5, generator=torch.Generator().manual_seed(1)), None, 2, True, 3.0)
    on_gpu = [part.to("cuda") for part in routing]
    experts = [getattr(layer, f"{name}_weight_{part}") for name in ("w13", "w2") for part in ("tiles", "scales")]

    def compute() -> list[torch.Tensor]:
        return [
            nl4_gemm_tiled(x, layer.weight_tiles, layer.weight_scales, 37),
            nl4_moe_tiled(x, *experts, *on_gpu, 32, 7.0),
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
    graph.replay()
    exact = x.cpu().float()
    wanted = [nl4_gemm(exact, *quantized(37, 96)), nl4_moe(exact, *w13, *w2, *routing, 7.0)]
    for got, reference in zip(captured, wanted, strict=True):
        torch.testing.assert_close(got.cpu().float(), reference, rtol=2e-2, atol=2e-2)  # float16 and its products

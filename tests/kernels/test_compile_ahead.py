"""What is compiled while a model loads is what calls look up, and it harms nobody when it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from step128_kernels import compile_ahead, run_launch
from step128_kernels.nl4_gemm.triton_gemm import nl4_gemm_triton
from step128_kernels.nl4_layout import tile_shape
from step128_kernels.nl4_moe.launches import MoeShape
from step128_kernels.nl4_moe.triton_moe import nl4_moe_triton

CPU = torch.device("cpu")
SHAPE = MoeShape(tokens=1, top_k=3, experts=6, hidden=96, intermediate=48)
ROWS = (*range(1, 70), 127, 128, 200, 600, 2560, 2561)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compile_ahead, "_known", set())
    cached = compile_ahead.compile_linear, compile_ahead.compile_experts
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, wherever it would go: once vLLM is imported, its logger keeps its children's messages."""
    logger = compile_ahead._log
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


class Keys:
    """Triton's ``JITFunction.run`` for gfx1201, up to the key under which it looks a compiled kernel up."""

    def __init__(self) -> None:
        self.ahead: dict[Any, Any] = {}
        self.asked: set[Any] = set()
        self._backend = make_backend(GPUTarget("hip", "gfx1201", 32))
        self._binders: dict[str, Callable[..., Any]] = {}

    def run(self, function: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        name = function.__name__
        if name not in self._binders:
            sources = function.signature, function.params, self._backend
            self._binders[name] = create_function_from_signature(*sources)
        _, specialization, options = self._binders[name](*arguments, **keywords)
        key = name, str(specialization), str(options)  # as compute_cache_key makes it
        if not warmup:
            self.asked.add(key)
        return self.ahead.setdefault(key, object()) if warmup else None


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    found = Keys()
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda function, *a, **k: found.run(function, *a, **k),  # a plain function binds as a method
    )
    return found


@pytest.fixture(params=["amd", "portable"])
def amd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    is_amd = request.param == "amd"
    monkeypatch.setattr(run_launch, "_arch", lambda device: "gfx1201" if is_amd else "")
    monkeypatch.setattr(torch.version, "hip", "7.2" if is_amd else None)
    return is_amd


def weight(rows: int, columns: int, *experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = (*experts, *tile_shape(rows, columns), 16)
    return torch.zeros(*places, 2, dtype=torch.int64), torch.zeros(places, dtype=torch.int32)


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(37, 96), (128, 512)])
def test_linear_layers_find_what_was_compiled(n: int, k: int, dtype: torch.dtype, keys: Keys) -> None:
    assert compile_ahead.compile_linear(n, k, dtype, CPU) == len(keys.ahead) > 0
    for rows in ROWS:
        nl4_gemm_triton(torch.zeros(rows, k, dtype=dtype), *weight(n, k), n)
    assert keys.asked == keys.ahead.keys()  # nothing is missing, and nothing was compiled for nobody


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("has_map", "limit"), [(False, None), (True, 7.0)])
def test_experts_find_what_was_compiled(
    has_map: bool, limit: float | None, ids_dtype: torch.dtype, dtype: torch.dtype, keys: Keys
) -> None:
    shape = replace(SHAPE, has_map=has_map)
    assert compile_ahead.compile_experts(shape, limit, dtype, CPU) == len(keys.ahead) > 0
    experts = weight(96, 96, 6), weight(96, 48, 6)
    expert_map = torch.arange(8) - 2 if has_map else None
    for rows in ROWS:
        ids = torch.zeros(rows, 3, dtype=ids_dtype)
        routing = torch.ones(rows, 3), ids, 48, limit, expert_map
        nl4_moe_triton(torch.zeros(rows, 96, dtype=dtype), *experts[0], *experts[1], *routing)
    assert keys.asked == keys.ahead.keys()


@pytest.mark.usefixtures("keys")
def test_a_shape_is_gone_through_once(log: pytest.LogCaptureFixture) -> None:
    found = compile_ahead.compile_linear(128, 512, torch.bfloat16, CPU)
    (line,) = log.messages
    assert line.startswith(
        f"step128: {found} kernel variants for nl4_gemm N=128 K=512 torch.bfloat16 compiled ahead in"
    )
    compile_ahead.compile_linear(128, 512, torch.bfloat16, CPU)
    assert compile_ahead.compile_linear(256, 1024, torch.bfloat16, CPU) == 0  # other sizes, the same code
    assert log.messages == [line]
    assert compile_ahead.compile_linear(37, 512, torch.bfloat16, CPU) > 0


class FakeFunction:
    """Records what it is asked to compile; refuses blocks of 32 rows."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def warmup(self, *, grid: tuple[int, int, int], **arguments: Any) -> object:
        self.asked.append(arguments | {"grid": grid})
        if arguments["BLOCK_M"] == 32:
            raise RuntimeError("no registers left")
        return self


def test_a_failure_is_a_warning(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    function, plain = FakeFunction(), compile_ahead.gemm_launch
    monkeypatch.setattr(compile_ahead, "gemm_launch", lambda *a: replace(plain(*a), function=function))
    assert compile_ahead.compile_linear(128, 512, torch.bfloat16, CPU) == 1
    (warning,) = [record for record in log.records if record.levelno == logging.WARNING]
    assert "nl4_gemm_prefill of nl4_gemm N=128 K=512" in warning.getMessage()
    assert "RuntimeError: no registers left" in warning.getMessage()
    assert {asked["BLOCK_M"] for asked in function.asked} == {1, 2, 4, 8, 16, 32, 64}
    assert [asked["BLOCK_M"] for asked in function.asked].count(32) == 1  # a failure is not waited for again
    first = function.asked[0]
    assert (first["m"], first["n"], first["k"], first["grid"]) == (1, 128, 512, (1, 2, 1))
    assert (first["num_warps"], first["num_stages"]) == (8, 1)
    x, tiles, y = first["x_ptr"], first["tiles_ptr"], first["y_ptr"]
    assert (x.dtype, x.nbytes, x.device.type) == (torch.int64, 1024, "meta")  # the decode kernel reads words
    assert (tiles.dtype, tiles.nbytes) == (torch.int64, 128 * 512 // 2)
    assert (y.dtype, y.nbytes) == (torch.bfloat16, 256)


def test_a_broken_table_is_a_warning(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> Any:
        raise ValueError("x.json: not JSON")

    monkeypatch.setattr(compile_ahead, "gemm_table", broken)
    monkeypatch.setattr(compile_ahead, "moe_config", broken)
    assert compile_ahead.compile_linear(128, 512, torch.bfloat16, CPU) == 0
    assert compile_ahead.compile_experts(SHAPE, 7.0, torch.bfloat16, CPU) == 0
    linear, experts = log.messages
    assert "nl4_gemm N=128 K=512" in linear and "x.json: not JSON" in linear
    assert "nl4_moe E=6 N=48 K=96 top_k=3 limit=7.0" in experts and "x.json: not JSON" in experts


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Weights count as on a GPU once they are in the kernels' order; what would be compiled."""
    pytest.importorskip("vllm")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setenv("STEP128_KERNEL_LAYOUT", "1")
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(compile_ahead, "compile_linear", lambda *a: asked.append(a))
    monkeypatch.setattr(compile_ahead, "compile_experts", lambda *a: asked.append(a))
    return asked


def test_the_plugin_asks_for_each_layer(on_gpu: list[tuple[Any, ...]]) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from step128_kernels.vllm_plugin.moe import NL4MoEMethod
    from step128_kernels.vllm_plugin.quantization import NL4LinearMethod

    for kind in (torch.nn.Module, ParallelLMHead, VocabParallelEmbedding):
        layer: Any = kind.__new__(kind)
        torch.nn.Module.__init__(layer)
        NL4LinearMethod().create_weights(layer, 48, [20, 17], 48, 37, torch.bfloat16, weight_loader=None)
        NL4LinearMethod().process_weights_after_loading(layer)
    assert on_gpu == [(37, 48, torch.bfloat16, CPU)] * 2  # an embedding is only looked up
    del on_gpu[:]
    experts: Any = torch.nn.Module()
    experts.top_k, experts.expert_map, experts.activation = 3, torch.arange(6), MoEActivation.SWIGLUSTEP
    method = NL4MoEMethod(SimpleNamespace())
    method.create_weights(experts, 6, 96, 48, torch.float16)
    method.process_weights_after_loading(experts)
    assert on_gpu == [(replace(SHAPE, has_map=True), 7.0, torch.float16, CPU)]


def test_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch, on_gpu: list[tuple[Any, ...]]) -> None:
    from step128_kernels.vllm_plugin.quantization import NL4LinearMethod

    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda _: False))
    layer: Any = torch.nn.Module()
    NL4LinearMethod().create_weights(layer, 48, [37], 48, 37, torch.bfloat16, weight_loader=None)
    NL4LinearMethod().process_weights_after_loading(layer)
    assert hasattr(layer, "weight_tiles") and on_gpu == []

"""The real vLLM on weights in the kernels' order: loading, operators, heads, embedding, MTP, ranks, experts' map.

All that differs on a GPU, but for the kernels themselves: on a CPU the operators compute with the torch reference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., dict[str, Any]]
MTP = {"method": "mtp", "num_speculative_tokens": 3}
RUNS: dict[str, dict[str, Any]] = {
    "compiled": {"enforce_eager": False},  # torch.compile cannot look into our operators
    "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},  # experts shared, the rest cut
}


@pytest.fixture
def generate(
    offline_vllm: Run, quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[int]]]:
    """Greedy tokens of the NL4 checkpoint in float32, from one order of the weights or the other."""

    def run(kernel_layout: bool, **engine: Any) -> list[list[int]]:
        monkeypatch.setenv("STEP128_KERNEL_LAYOUT", "1" if kernel_layout else "0")
        monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # it does not know the variable above
        # The last one makes no difference but that each order has a run of its own: equal requests are run once.
        # max_num_seqs: equal requests are run once a session, and these two differ in the environment only.
        arguments = {"model": quantized("all"), "dtype": "float32", "max_num_seqs": 8 + kernel_layout}
        arguments["speculative_config"] = MTP
        prompts = [list(range(100, 100 + length)) for length in (45, 131)]
        result = offline_vllm(engine=arguments | engine, prompts=prompts, max_tokens=24)
        assert result["returncode"] == 0, result["log"][-4000:]
        for report in result["reports"].values():
            assert (report["weight_path"], report["weight_order"]) == (
                "torch",
                "kernel" if kernel_layout else "checkpoint",
            )
        tokens: list[list[int]] = result["tokens"]
        return tokens

    return run


@pytest.mark.serve
@pytest.mark.parametrize("name", RUNS)
def test_the_order_of_the_weights_changes_no_token(generate: Callable[..., list[list[int]]], name: str) -> None:
    assert generate(True, **RUNS[name]) == generate(False)

"""Quantization costs what it should: perplexity on held-out text, by our own model and by the served one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TOKENS = 49_152
CHUNK = 512


@pytest.fixture(scope="session")
def perplexities(tiny: Path, dequantized: Callable[..., Path]) -> dict[str, float]:
    """Perplexity of the bfloat16 weights, NL4 and absmax NL4 on the same held-out library text, all in float32."""
    from step128_checkpoint.tiny.reference import held_out_tokens, load_model, perplexity

    tokens = held_out_tokens(tiny, TOKENS)
    folders = {"bf16": tiny, "nl4": dequantized("all-linears"), "nl4-absmax": dequantized("all-linears", "absmax")}
    return {name: perplexity(load_model(folder, torch.float32), tokens) for name, folder in folders.items()}


def test_perplexity_rises_in_the_order_of_the_error(perplexities: dict[str, float]) -> None:
    print(f"perplexity of {TOKENS} held-out tokens: {perplexities}")
    assert perplexities["bf16"] < perplexities["nl4"] < perplexities["nl4-absmax"]


@pytest.mark.serve
def test_served_perplexity_is_the_models(
    offline_vllm: Callable[..., dict[str, Any]],
    quantized: Callable[..., Path],
    dequantized: Callable[..., Path],
    tiny: Path,
) -> None:
    from step128_checkpoint.tiny.reference import held_out_tokens, load_model

    chunks = held_out_tokens(tiny, 4 * CHUNK).view(4, CHUNK)
    result = offline_vllm(engine={"model": quantized(), "dtype": "float32"}, score=chunks.tolist())
    assert result["returncode"] == 0, result["log"][-4000:]
    logits = load_model(dequantized(), torch.float32)(chunks)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chunks[:, 1:].flatten())
    # Another program, other kernels, float32: they agree far below any effect of interest.
    assert result["nll"] == pytest.approx(float(nll), abs=2e-4)

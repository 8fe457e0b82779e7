"""Quantization costs what it should: perplexity on held-out text, by our own model and by the served one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WINDOW = 512
WINDOWS = 96


def windowed_nll(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of each window's tokens but the first, float32 arithmetic, nats."""
    from step128_checkpoint.tiny.reference import load_model

    model = load_model(folder, torch.float32)
    found = []
    for batch in windows.split(4):
        logits = model(batch)
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        found.append(nll.view(len(batch), -1).mean(dim=1))
    return torch.cat(found).double()


def test_perplexity_rises_in_the_order_of_the_error(
    tiny: Path, dequantized: Callable[..., Path], measured: Callable[[str], None]
) -> None:
    from step128_checkpoint.tiny.reference import held_out_tokens

    windows = held_out_tokens(tiny, WINDOWS * WINDOW).view(WINDOWS, WINDOW)
    folders = {"bf16": tiny, "NL4": dequantized("all-linears"), "absmax NL4": dequantized("all-linears", "absmax")}
    nll = {name: windowed_nll(folder, windows) for name, folder in folders.items()}
    for name, values in nll.items():
        measured(
            f"perplexity of {windows.numel()} held-out tokens in windows of {WINDOW}, {name}: {values.mean().exp():.3f}"
        )
    for better, worse in (("bf16", "NL4"), ("NL4", "absmax NL4")):
        # The same windows on both sides: what differs between windows cancels, and the order is no accident.
        difference = nll[worse] - nll[better]
        error = difference.std() / len(difference) ** 0.5
        measured(f"{worse} - {better}: {difference.mean():.5f} nats a token, standard error {error:.5f}")
        assert difference.mean() > 2 * error


@pytest.mark.serve
def test_served_perplexity_is_the_models(
    offline_vllm: Callable[..., dict[str, Any]],
    quantized: Callable[..., Path],
    dequantized: Callable[..., Path],
    tiny: Path,
) -> None:
    from step128_checkpoint.tiny.reference import held_out_tokens, load_model

    windows = held_out_tokens(tiny, 4 * WINDOW).view(4, WINDOW)
    result = offline_vllm(engine={"model": quantized(), "dtype": "float32"}, score=windows.tolist())
    assert result["returncode"] == 0, result["log"][-4000:]
    logits = load_model(dequantized(), torch.float32)(windows)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    # Another program, other kernels, float32: they agree far below any effect of interest.
    assert result["nll"] == pytest.approx(float(nll), abs=2e-4)

"""vLLM itself, without the launcher's checks before it, refuses a checkpoint that does not fit: never garbage."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

VICTIM = "model.layers.4.self_attn.k_proj.weight_packed"


def misname(tensors: dict[str, Any]) -> None:
    tensors[VICTIM.replace("k_proj", "k_porj")] = tensors.pop(VICTIM)


@pytest.mark.serve
@pytest.mark.parametrize("load_format", ["step128", "auto"])  # as the launcher starts vLLM, and as a user might
def test_misnamed_part_of_a_fused_tensor(
    offline_vllm: Callable[..., dict[str, Any]], quantized: Callable[..., Path], tmp_path: Path, load_format: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quantized(), broken)
    for shard in broken.glob("*.safetensors"):
        tensors = load_file(shard)
        if VICTIM in tensors:
            misname(tensors)
            save_file(tensors, shard, metadata={"format": "pt"})
    for index in broken.glob("*.index.json"):
        index.write_text(index.read_text().replace(VICTIM, VICTIM.replace("k_proj", "k_porj")))
    result = offline_vllm(engine={"model": broken, "load_format": load_format}, prompts=[[5]])
    assert result["returncode"] != 0
    assert f"missing tensor {VICTIM}" in result["log"]
    assert "k_porj" in result["log"]

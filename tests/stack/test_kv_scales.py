"""FP8 KV-cache scales of the checkpoint are those in effect in vLLM, in trunk and MTP layers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

SCALE = {"k": "model.layers.{}.self_attn.k_proj.k_scale", "v": "model.layers.{}.self_attn.v_proj.v_scale"}


def scales_of(folder: Path) -> dict[str, dict[str, float]]:
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    layers = sorted({name.split(".")[2] for name in tensors if name.endswith("k_scale")}, key=int)
    return {layer: {which: tensors[name.format(layer)].item() for which, name in SCALE.items()} for layer in layers}


def in_effect(run: Callable[..., dict[str, Any]], model: Path) -> dict[str, dict[str, float]]:
    engine = {
        "model": model,
        "kv_cache_dtype": "fp8",
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
    }
    result = run(engine=engine, prompts=[[5, 6, 7]], max_tokens=4)
    assert result["returncode"] == 0, result["log"][-4000:]
    reports = result["reports"]
    assert {report["kv_cache_dtype"] for report in reports.values()} == {"fp8"}
    return reports["target-rank0"]["kv_scales"] | reports["draft-rank0"]["kv_scales"]


@pytest.mark.serve
def test_scales_are_read_back_exactly_and_follow_the_checkpoint(
    offline_vllm: Callable[..., dict[str, Any]], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    original = quantized()
    wanted = scales_of(original)
    assert len(wanted) == 12  # 9 trunk layers and 3 MTP layers
    assert in_effect(offline_vllm, original) == wanted

    changed = tmp_path / "changed"
    shutil.copytree(original, changed)
    for shard in changed.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith(("k_scale", "v_scale")):
                tensors[name] = tensors[name] * 1.3
        save_file(tensors, shard, metadata={"format": "pt"})
    assert scales_of(changed) != wanted
    assert in_effect(offline_vllm, changed) == scales_of(changed)

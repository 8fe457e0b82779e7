"""Run as a script: what vLLM 0.32's own code says of the real-size model, without weights and without ranks.

`python meta_models.py REQUEST.json RESULT.json`: builds vLLM's model classes (through this project's plugin) on the
meta device under a pretended tensor-parallel world, and runs vLLM's KV-cache planning on the layers' own specs. A
process of its own, since vLLM's parallel state and torch's default dtype are global.
"""

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm.distributed.parallel_state as parallel_state
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import get_kv_quant_mode

from step128_kernels.vllm_plugin.components import component_of_module

# Parameters of an attention layer only until the weights are loaded.
ATTENTION_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point", "q_zero_point")


class PretendedGroup:
    """A process group of `world_size` ranks seen from rank 0, with no processes and no communication."""

    is_first_rank = is_last_rank = True
    rank_in_group = rank = local_rank = first_rank = 0
    device_communicator = None
    unique_name = "pretended"

    def __init__(self, world_size: int) -> None:
        self.world_size, self.last_rank, self.ranks = world_size, world_size - 1, list(range(world_size))
        self.device_group = self.cpu_group = self

    def size(self) -> int:
        return self.world_size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def pretend_ranks(ranks: int) -> None:
    whole, alone = PretendedGroup(ranks), PretendedGroup(1)
    parallel_state._TP = parallel_state._EP = parallel_state._WORLD = whole
    parallel_state._PP = parallel_state._DP = parallel_state._PCP = parallel_state._DCP = alone


def engine_config(folder: str, *, vision: bool = True, kv_cache_dtype: str = "auto", drafts: int = 3) -> VllmConfig:
    speculative = {"method": "mtp", "num_speculative_tokens": drafts} if drafts else None
    return EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=8192,
        enforce_eager=True,
        kv_cache_dtype=kv_cache_dtype,
        limit_mm_per_prompt={} if vision else {"image": 0},
        speculative_config=speculative,
    ).create_engine_config()


def part_of(name: str, draft: bool) -> str:
    """The launcher's component where vLLM's module belongs to one that a policy quantizes; else what it serves."""
    component = component_of_module(name.rpartition(".")[0]) if name.endswith(("weight", "_packed", "_scale")) else None
    if component:
        return component
    expert = name.rpartition(".")[0].removesuffix(".routed_experts")
    if component_of_module(expert) == "routed_experts":
        return "routed_experts"
    return "draft rest" if draft else "vision rest" if "vision_model" in name else "rest"


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def parameter_bytes(model: torch.nn.Module, draft: bool) -> dict[str, int]:
    """Component -> bytes. The draft's embedding is left out: vLLM puts the target's in its place after loading."""
    sums: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ATTENTION_SCALES or (draft and "embed_tokens" in name):
            continue
        part = part_of(name, draft)
        sums[part] = sums.get(part, 0) + tensor_bytes(parameter)
    return sums


def buffer_bytes(*models: torch.nn.Module) -> dict[str, int]:
    """Last part of the name -> bytes; a table that several layers or both models share counts once."""
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for model in models:
        for name, buffer in model.named_buffers(remove_duplicate=False):
            seen[id(buffer)] = (name.rpartition(".")[2], buffer)
    sums: dict[str, int] = {}
    for name, buffer in seen.values():
        sums[name] = sums.get(name, 0) + tensor_bytes(buffer)
    return sums


def build(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return one case's figures, and the attention layers' own KV-cache specs by layer name."""
    config = engine_config(case["folder"], vision=case["vision"], kv_cache_dtype=case["kv_cache_dtype"])
    draft_config = config.speculative_config.draft_model_config
    pretend_ranks(case["ranks"])
    config.parallel_config.tensor_parallel_size = case["ranks"]
    config.parallel_config.enable_expert_parallel = case["expert_parallel"]
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config), torch.device("meta"):
        target = initialize_model(vllm_config=config)
        draft = initialize_model(vllm_config=config, model_config=draft_config)
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    figures = {
        "target": parameter_bytes(target, draft=False),
        "draft": parameter_bytes(draft, draft=True),
        "buffers": buffer_bytes(target, draft),
        "specs": sorted({describe(spec) for spec in specs.values()}),
    }
    return figures, specs


def describe(spec: Any) -> str:
    window = getattr(spec, "sliding_window", None)
    return f"{type(spec).__name__} heads {spec.num_kv_heads} size {spec.head_size} {spec.dtype} window {window}"


def least_accepted(config: VllmConfig, specs: dict[str, Any], need: int, groups: Any) -> int | None:
    """Return the bytes of one request and the null block if vLLM takes them, and not a byte less; else None."""
    least = need + int(kv_cache_utils._pool_bytes_per_block(config, groups))
    kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [least])
    try:
        kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [least - 1])
    except ValueError:
        return least
    return None


def kv_figures(specs: dict[str, Any], folder: str, axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return vLLM's plan for every combination: bytes of one request, and of a pool for 2.5 requests the capacity."""
    found = []
    configs = {drafts: engine_config(folder, drafts=drafts) for drafts in axes["drafts"]}
    for drafts, element, block, batched, asynchronous, context in itertools.product(*axes.values()):
        config = configs[drafts]
        config.scheduler_config.max_num_batched_tokens = batched
        config.scheduler_config.async_scheduling = asynchronous
        config.scheduler_config.disable_hybrid_kv_cache_manager = False
        config.cache_config.kv_cache_layout = "LBHNC"
        config.model_config.max_model_len = config.model_config.original_max_model_len = context
        changes = {
            "block_size": block,
            "dtype": torch.uint8 if element == 1 else torch.bfloat16,
            "kv_quant_mode": get_kv_quant_mode("fp8" if element == 1 else "auto"),
        }
        chosen = {
            name: replace(spec, **changes)
            for name, spec in specs.items()
            if drafts or name.startswith("language_model")
        }
        plenty = kv_cache_utils.get_kv_cache_configs(config, [dict(chosen)], [1 << 40])[0]
        groups = plenty.kv_cache_groups
        need = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        pool = int(2.5 * need)
        plan = kv_cache_utils.get_kv_cache_configs(config, [dict(chosen)], [pool])[0]
        tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(config, plan)
        found.append(
            {
                "case": [drafts, element, block, batched, config.max_concurrent_batches, context],
                "groups": [len(group.layer_names) for group in groups],
                "least_bytes": least_accepted(config, chosen, need, groups),
                "bytes_per_block": kv_cache_utils._pool_bytes_per_block(config, groups),
                "need_bytes": need,
                "pool_bytes": pool,
                "num_gpu_blocks": plan.num_blocks,
                "kv_cache_size_tokens": tokens,
                "kv_cache_max_concurrency": concurrency,
            }
        )
    return found


def main(request_path: Path, result_path: Path) -> None:
    # It only writes a log line, from the values of a tensor, which a meta tensor has not.
    ExpertMapManager.get_compressed_map_string = lambda self: "not on the meta device"
    request = json.loads(request_path.read_text())
    result: dict[str, Any] = {"models": {}, "kv": {}}
    for name, case in request["models"].items():
        figures, specs = build(case)
        result["models"][name] = figures
        if name in request["kv"]["models"]:
            result["kv"][name] = kv_figures(specs, case["folder"], request["kv"]["axes"])
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""What really took effect when a model was loaded, written for the launcher to check.

vLLM only logs a plugin that fails to load, and ignores scales that it has no place for. So each worker writes one
small JSON file a model into the folder that ``STEP128_LOAD_REPORT_DIR`` names; without the variable nothing is written.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from step128_kernels.vllm_plugin.attention import attention_in_use
from step128_kernels.vllm_plugin.components import component_of_module
from step128_kernels.vllm_plugin.kernel_layout import weight_order, weight_path
from step128_kernels.vllm_plugin.kv_scales import scales_in_effect
from step128_kernels.vllm_plugin.moe import NL4MoEMethod
from step128_kernels.vllm_plugin.quantization import NL4Config, NL4LinearMethod

REPORT_DIR_VARIABLE = "STEP128_LOAD_REPORT_DIR"
SCHEMA_VERSION = 1


def quantized_modules(model: torch.nn.Module) -> dict[str, int]:
    """Number of modules of each component that run with an NL4 weight (a fused module counts once)."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), NL4LinearMethod | NL4MoEMethod):
            component = component_of_module(name)
            if component is not None:
                counts[component] += 1
    return dict(sorted(counts.items()))


def weights_in_use(model: torch.nn.Module) -> dict[str, str | None]:
    """``weight_path`` and ``weight_order`` of the model's NL4 weights; several values joined by a plus sign.

    Both are None for a model without an NL4 weight.
    """
    prefixes = {NL4LinearMethod: ("weight",), NL4MoEMethod: ("w13_weight", "w2_weight")}
    weights = [
        (module, prefix)
        for module in model.modules()
        for method, names in prefixes.items()
        if isinstance(getattr(module, "quant_method", None), method)
        for prefix in names
    ]
    found = {
        "weight_path": {weight_path(*weight) for weight in weights},
        "weight_order": {weight_order(*weight) for weight in weights},
    }
    return {key: "+".join(sorted(value for value in values if value)) or None for key, values in found.items()}


def build(model: torch.nn.Module, vllm_config: Any, role: str, load_seconds: float) -> dict[str, Any]:
    """The report of one loaded model.

    Args:
        model: as vLLM will run it, after ``process_weights_after_loading``.
        vllm_config: vLLM's config.
        role: ``target`` or ``draft``.
        load_seconds: wall time of loading.
    """
    quant_config = vllm_config.quant_config
    nl4 = quant_config if isinstance(quant_config, NL4Config) else None
    return {
        "schema": SCHEMA_VERSION,
        "plugin_version": version("step128"),
        "vllm_version": vllm.__version__,
        "role": role,
        "rank": get_tensor_model_parallel_rank(),
        "world_size": get_tensor_model_parallel_world_size(),
        "model_class": type(model).__name__,
        "quant_method": nl4.get_name() if nl4 else None,
        "policy": nl4.policy if nl4 else None,
        **weights_in_use(model),
        "quantized_modules": quantized_modules(model),
        **attention_in_use(model),
        "kv_cache_dtype": vllm_config.cache_config.cache_dtype,
        "kv_scales": scales_in_effect(model),
        "load_seconds": round(load_seconds, 3),
    }


def write(report: dict[str, Any]) -> None:
    """Write a report into the folder that the environment names, whole or not at all."""
    folder = os.environ.get(REPORT_DIR_VARIABLE)
    if not folder:
        return
    path = Path(folder) / f"{report['role']}-rank{report['rank']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # the launcher makes it; who starts vLLM by hand does not
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(report, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

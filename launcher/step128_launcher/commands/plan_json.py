"""The machine-readable plan. Keys are vLLM's own names where it has one; the schema number changes with their meaning.

Schema 2, one JSON object:
  schema, result ("fits" or "does not fit"), profile, device ("cpu", "rocm", "cuda"), objective, model {path,
  served_model_name, quant_method, policy, assumed (bool: no shard was read), mtp_layers, kv_scales (bool),
  stored_bytes}, machine {cpus, memory_total_bytes, memory_available_bytes, gpus [{pci_address, name, target,
  vram_total_bytes, gtt_total_bytes, integrated}]}, settings {max_model_len, num_speculative_tokens, kv_cache_dtype,
  max_num_seqs, max_num_batched_tokens, tensor_parallel_size, enable_expert_parallel, dtype, block_size, enforce_eager,
  vision, attention_backend, gpu_memory_utilization, kv_cache_memory_bytes, mm_processor_cache_bytes},
  prediction {num_gpu_blocks, kv_cache_size_tokens, kv_cache_max_concurrency},
  memory (the pool that holds the model) and host_memory (null where it is the same pool): {where, total_memory_bytes,
  available_bytes, budget_bytes, total_bytes, free_bytes, lines [{name, bytes, evidence, explanation, source}]},
  expected {weights_bytes, activation_bytes, graph_bytes, non_torch_bytes} (a rank, as vLLM should report them),
  speed [{num_speculative_tokens, context_tokens, requests, tokens_per_step, tokens_per_step_unconditional,
  distinct_experts, read_bytes, step_seconds, tokens_per_second}] and speed_sources {input: text} (modelled, not
  measured), reasons [text], rejected [{wish, reason, missing_bytes}], wish [text: what would make the
  wished plan fit], considered (candidates), warnings [text],
  fallbacks [settings], argv [text], environment {name: value}, unset [name].
An error gives {schema, error, hint, exit_code}. A plan that does not fit has besides: result, profile, model and
machine as above, memory (the pool that lacks it; null where no search was needed), host_memory (null where it is that
pool), rejected, remedies [text].
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from step128_launcher.command import UNSET_VARIABLES, Server, environment_changes, server_argv
from step128_launcher.commands.refusal import RefusedError
from step128_launcher.commands.settings import SETTINGS
from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.items import MemoryPlan
from step128_launcher.planning.plan import Plan

SCHEMA = 2

_GPU = ("pci_address", "name", "target", "vram_total_bytes", "gtt_total_bytes", "integrated")


def plan_document(
    plan: Plan,
    footprint: ModelFootprint,
    hardware: Hardware,
    server: Server,
    base: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Return the plan as described above; it never holds the API key. `base` is the environment it is added to."""
    return {
        "schema": SCHEMA,
        "result": "fits",
        "profile": plan.profile,
        "device": plan.device,
        "objective": plan.objective,
        "model": _model(footprint) | {"served_model_name": server.served_model_name},
        "machine": _machine(hardware),
        "settings": _settings(plan),
        "prediction": asdict(plan.prediction),
        "memory": _memory(plan.memory),
        "host_memory": None if plan.host_memory is None else _memory(plan.host_memory),
        "expected": asdict(plan.expected),
        "speed": [asdict(row) for row in plan.speed],
        "speed_sources": dict(plan.speed_sources),
        "reasons": list(plan.reasons),
        "rejected": [asdict(alternative) for alternative in plan.rejected],
        "wish": list(plan.wish),
        "considered": plan.considered,
        "warnings": list(plan.warnings),
        "fallbacks": [_settings(leaner) for leaner in plan.fallbacks],
        "argv": list(server_argv(plan, server)),
        "environment": environment_changes(plan, server, base),
        "unset": list(UNSET_VARIABLES),
    }


def error_document(error: LauncherError) -> dict[str, Any]:
    """Return the document of an error; for a plan that does not fit, with what it was refused for."""
    code = int(error.exit_code)
    document: dict[str, Any] = {"schema": SCHEMA, "error": error.message, "hint": error.hint, "exit_code": code}
    if isinstance(error, RefusedError):
        subject = error.subject
        document |= {
            "result": "does not fit",
            "profile": subject.profile.name,
            "model": _model(subject.footprint),
            "machine": _machine(subject.hardware),
            "memory": None if error.memory is None else _memory(error.memory),
            "host_memory": None if error.host_memory is None else _memory(error.host_memory),
            "rejected": [asdict(alternative) for alternative in error.rejected],
            "remedies": list(error.remedies),
        }
    return document


def _model(footprint: ModelFootprint) -> dict[str, Any]:
    quantization = footprint.quantization
    return {
        "path": str(footprint.path),
        "quant_method": quantization.method if quantization else None,
        "policy": quantization.policy if quantization else None,
        "assumed": footprint.assumed,
        "mtp_layers": footprint.mtp_layers,
        "kv_scales": footprint.kv_scales is not None,
        "stored_bytes": footprint.stored_bytes,
    }


def _machine(hardware: Hardware) -> dict[str, Any]:
    return {
        "cpus": len(hardware.cpu_ids),
        "memory_total_bytes": hardware.memory_total_bytes,
        "memory_available_bytes": hardware.memory_available_bytes,
        "gpus": [{name: getattr(gpu, name) for name in _GPU} for gpu in hardware.gpus],
    }


def _settings(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in SETTINGS}


def _memory(memory: MemoryPlan) -> dict[str, Any]:
    return {
        "where": memory.where,
        "total_memory_bytes": memory.total_memory_bytes,
        "available_bytes": memory.available_bytes,
        "budget_bytes": memory.budget_bytes,
        "total_bytes": memory.total_bytes,
        "free_bytes": memory.free_bytes,
        "lines": [
            {
                "name": line.name,
                "bytes": line.total_bytes,
                "evidence": line.evidence,
                "explanation": line.explanation,
                "source": line.source,
            }
            for line in memory.lines
        ],
    }

"""The machine-readable plan. Keys are vLLM's own names where it has one; the schema number changes with their meaning.

Schema 1, one JSON object:
  schema, result ("fits" or "does not fit"), profile, model {path, served_model_name, quant_method, policy, mtp_layers,
  kv_scales (bool), stored_bytes}, machine {cpus, memory_total_bytes, memory_available_bytes}, settings {max_model_len,
  num_speculative_tokens, kv_cache_dtype, max_num_seqs, max_num_batched_tokens, tensor_parallel_size, dtype, block_size,
  enforce_eager, kv_cache_memory_bytes, mm_processor_cache_bytes},
  prediction {num_gpu_blocks, kv_cache_size_tokens, kv_cache_max_concurrency},
  memory {budget_bytes, total_bytes, free_bytes, lines [{name, bytes, evidence, explanation}]}, reasons [text],
  rejected [{wish, reason}], warnings [text], argv [text], environment {name: value}, unset [name].
An error gives {schema, error, hint, exit_code}; a plan that does not fit has result and memory besides.
"""

from dataclasses import asdict
from typing import Any

from step128_launcher.checkpoint import ModelFootprint
from step128_launcher.command import UNSET_VARIABLES, Server, environment_changes, server_argv
from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.memory import MemoryPlan
from step128_launcher.plan import DoesNotFitError, Plan

SCHEMA = 1

_SETTINGS = (
    "max_model_len",
    "num_speculative_tokens",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "dtype",
    "block_size",
    "enforce_eager",
    "kv_cache_memory_bytes",
    "mm_processor_cache_bytes",
)


def plan_document(plan: Plan, footprint: ModelFootprint, hardware: Hardware, server: Server) -> dict[str, Any]:
    """Return the plan as described above; it never holds the API key."""
    quantization = footprint.quantization
    return {
        "schema": SCHEMA,
        "result": "fits",
        "profile": plan.profile,
        "model": {
            "path": str(footprint.path),
            "served_model_name": server.served_model_name,
            "quant_method": quantization.method if quantization else None,
            "policy": quantization.policy if quantization else None,
            "mtp_layers": footprint.mtp_layers,
            "kv_scales": footprint.kv_scales is not None,
            "stored_bytes": footprint.stored_bytes,
        },
        "machine": {
            "cpus": len(hardware.cpu_ids),
            "memory_total_bytes": hardware.memory_total_bytes,
            "memory_available_bytes": hardware.memory_available_bytes,
        },
        "settings": {name: getattr(plan, name) for name in _SETTINGS},
        "prediction": asdict(plan.prediction),
        "memory": _memory(plan.memory),
        "reasons": list(plan.reasons),
        "rejected": [asdict(alternative) for alternative in plan.rejected],
        "warnings": list(plan.warnings),
        "argv": list(server_argv(plan, server)),
        "environment": environment_changes(plan, server),
        "unset": list(UNSET_VARIABLES),
    }


def error_document(error: LauncherError) -> dict[str, Any]:
    """Return the document of an error; for a plan that does not fit, with the memory it was refused for."""
    code = int(error.exit_code)
    document: dict[str, Any] = {"schema": SCHEMA, "error": error.message, "hint": error.hint, "exit_code": code}
    if isinstance(error, DoesNotFitError):
        document |= {"result": "does not fit", "memory": _memory(error.memory)}
    return document


def _memory(memory: MemoryPlan) -> dict[str, Any]:
    return {
        "budget_bytes": memory.budget_bytes,
        "total_bytes": memory.total_bytes,
        "free_bytes": memory.free_bytes,
        "lines": [
            {
                "name": line.name,
                "bytes": line.total_bytes,
                "evidence": line.evidence,
                "explanation": line.explanation,
            }
            for line in memory.lines
        ],
    }

"""Makes the calibration folder of what each stage measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from step128_checkpoint.calibration.plan import Plan
from step128_checkpoint.calibration.result import (
    CALIBRATION_NAME,
    FORMAT,
    FORMAT_VERSION,
    HESSIANS_FOLDER,
    IMPORTANCE_NAME,
    SALIENCY_NAME,
)
from step128_checkpoint.calibration.states import file_sha256
from step128_checkpoint.files import sync_folder
from step128_checkpoint.layout import OutputTensor, plan_layout
from step128_checkpoint.manifest import headers_sha256
from step128_checkpoint.pruning.super_experts import find_super_experts
from step128_checkpoint.shards import write_synced

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
_EMPTY = (2).to_bytes(8, "little") + b"{}"
_SALIENCY = re.compile(r"layers\.[0-9]+\.[a-z_]+")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file of CPU tensors (F32, F64, I64), whole or not at all; returns its SHA-256, in hex.

    Data and name are on disk when this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = plan_layout(
        [
            OutputTensor(name, _DTYPES[tensors[name].dtype], tuple(tensors[name].shape), path.name)
            for name in sorted(tensors)
        ],
        max_shard_bytes=0,  # all are for this one file, which is no shard
    )
    unfinished, digest = path.with_name(path.name + ".unfinished"), hashlib.sha256()
    with unfinished.open("wb") as stream:
        for data in (layout.headers.get(path.name, _EMPTY), *(_bytes(tensors[name]) for name in layout.places)):
            digest.update(data)
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(path)
    sync_folder(path.parent)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview | bytes:
    return memoryview(tensor.contiguous().numpy().data).cast("B")


def write_results(
    plan: Plan,
    stage_files: Sequence[Path],
    notes: Sequence[Mapping[str, Any]],
    protected: frozenset[tuple[int, int]],
    product: Path,
) -> str:
    """Write everything but ``hessians/``, which are there already; returns the SHA-256 of calibration.json.

    Args:
        plan: of the calibration.
        stage_files: of the stages after the pilot.
        notes: of all stages.
        protected: super-experts that the pilot found.
        product: the folder to fill.
    """
    importance: dict[str, Tensor] = {}
    saliency: dict[str, Tensor] = {}
    for path in stage_files:
        for name, tensor in load_file(path).items():
            (saliency if _SALIENCY.fullmatch(name) else importance)[name] = tensor
    files = {
        IMPORTANCE_NAME: save_tensors(product / IMPORTANCE_NAME, importance),
        SALIENCY_NAME: save_tensors(product / SALIENCY_NAME, saliency),
    }
    for note in notes:
        files |= {f"{HESSIANS_FOLDER}/{name}": sha256 for name, sha256 in note.get("hessians", {}).items()}
    kept = {number: experts for note in notes for number, experts in note.get("kept", {}).items()}
    options, samples = plan.options, plan.samples
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint": {
            "name": plan.checkpoint.folder.resolve().name,
            "headers_sha256": headers_sha256(plan.checkpoint),
        },
        "samples": {
            "sha256": samples.sha256,
            "mixture": samples.document["mixture"],
            "samples": sum(len(batch.numbers) for batch in plan.batches if not batch.held_out),
            "tokens": sum(batch.tokens for batch in plan.batches if not batch.held_out),
            "held_out_samples": sum(len(batch.numbers) for batch in plan.batches if batch.held_out),
            "held_out_tokens": sum(batch.tokens for batch in plan.batches if batch.held_out),
        },
        "pruned": None
        if options.keep is None
        else {
            "keep": options.keep,
            "criterion": options.criterion,
            "seed": options.seed if options.criterion == "random" else None,
            "super_experts": [list(pair) for pair in sorted(protected)],
            "pilot_samples": sum(len(batch.numbers) for batch in plan.pilot_batches),
            "kept_experts": kept,
            "warnings": _late_super_experts(saliency, protected, kept),
        },
        "kv": {"layers": {number: row for note in notes for number, row in note.get("kv", {}).items()}},
        "files": files,
        "versions": {
            "step128": version("step128"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": device_name(plan.device),
        "batch_tokens": options.batch_tokens,
        "seconds": round(sum(note["seconds"] for note in notes), 1),
    }
    write_synced(product / CALIBRATION_NAME, json.dumps(document, indent=2).encode() + b"\n")
    digest = file_sha256(product / CALIBRATION_NAME)
    assert digest is not None
    return digest


def pilot_super_experts(stage_files: Sequence[Path]) -> frozenset[tuple[int, int]]:
    """The super-experts by what the pilot's stages measured: pairs of true layer number and expert."""
    tensors = {name: tensor for path in stage_files for name, tensor in load_file(path).items()}
    return find_super_experts(_max_activation(tensors))


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _max_activation(tensors: Mapping[str, Tensor]) -> dict[int, Any]:
    return {
        int(name.split(".")[1]): tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith("layers.") and name.endswith(".max_activation")
    }


def _late_super_experts(
    saliency: Mapping[str, Tensor], protected: frozenset[tuple[int, int]], kept: Mapping[str, list[int]]
) -> list[str]:
    """Experts that all samples, but not the pilot's, show to be super-experts, and that were dropped."""
    return [
        f"expert {expert} of layer {layer} was dropped, but all samples together show it to be a super-expert, "
        "which the pilot's samples did not: calibrate again with more --pilot-samples"
        for layer, expert in sorted(find_super_experts(_max_activation(saliency)) - protected)
        if expert not in kept[str(layer)]
    ]

"""The words of a model card: Markdown below YAML front matter, as the hub reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from step128_checkpoint.details import DOWNLOAD_NAME, Details
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.files import read_json_object, size_text
from step128_checkpoint.inspect import Inspection
from step128_checkpoint.manifest import MANIFEST_NAME
from step128_checkpoint.quantization.report import REPORT_NAME
from step128_checkpoint.recipe import Recipe, RecipeStep, read_recipe

MARKER = "<!-- written by `step128-checkpoint model-card`; run it again instead of editing -->"

_WORST_TENSORS = 5
_TYPED_OPTIONS = ("policy", "method", "keep", "criterion", "seed", "dtype", "device")

# What a user asks of such a model, and the keys of a result, or the name of the eval, that answer it.
_QUESTIONS = {
    "perplexity": ("perplexity",),
    "KL divergence from the unquantized model": ("mean_kl",),
    "MTP acceptance": ("acceptance",),
    "tool calls": ("tools",),
    "long context (needle)": ("needle",),
}


@dataclass(frozen=True)
class Evaluation:
    """One result file: its name, and the JSON object in it."""

    file_name: str
    result: dict[str, Any]


def card_text(found: Inspection, evaluations: Sequence[Evaluation], base_model: str | None) -> str:
    """Compose the card.

    Raises:
        CheckpointError: a file of the folder that the card quotes is malformed.
    """
    recipe = read_recipe(found.folder)
    base_model, commit = (base_model, None) if base_model else _downloaded(found.folder)
    sections = [
        _front_matter(found, base_model),
        MARKER,
        f"# {found.folder.resolve().name}",
        _introduction(found, base_model, commit),
        _contents(found),
        _recipe(found.folder, recipe),
        _pruning(found.details),
        _quality(found.folder),
        _results(evaluations),
        "## Check it\n\n"
        "```sh\nstep128-checkpoint verify DIR     # every byte against the manifest\n"
        "step128-checkpoint inspect DIR    # experts, bits per weight, KV scales\n"
        'step128-checkpoint chat DIR --prompt "What is Python?"    # through transformers, dequantized\n```',
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(found: Inspection, base_model: str | None) -> str:
    tags = ["step3p7", "step128", "moe"]
    values: dict[str, Any] = {"pipeline_tag": "image-text-to-text"}
    if base_model:
        values["base_model"] = base_model
        values["base_model_relation"] = "quantized" if found.policy else "finetune"
    if found.details and found.details.pruning:
        tags.append("pruned")
    if found.policy:
        tags += ["nl4", "quantized"]
        values["quantization"] = {
            "format": "nl4",
            "policy": found.policy,
            "method": found.details.method if found.details else None,
            "bits_per_weight": round(found.total.bits_per_weight, 3),
        }
    values["tags"] = tags
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _introduction(found: Inspection, base_model: str | None, commit: str | None) -> str:
    origin = f"made from `{base_model}`" if base_model else "whose origin on the hub was not recorded"
    origin += f" at commit `{commit}`" if commit else ""
    kind = f"An NL4-quantized (policy `{found.policy}`)" if found.policy else "An unquantized"
    return f"{kind} checkpoint of {found.architecture}, {origin}."


def _contents(found: Inspection) -> str:
    total, details, scales = found.total, found.details, found.kv_scales
    rows = [
        ("parameters", f"{total.parameters:,}"),
        ("size of the tensors", size_text(total.size_bytes)),
        ("bits per weight, all tensors", f"{total.bits_per_weight:.3f}"),
        ("files", str(found.shards)),
    ]
    if details:
        each = f", {details.experts_per_token} for each token" if details.experts_per_token else ""
        rows.append(("layers", f"{details.layers}, {details.moe_layers} with {details.experts} routed experts{each}"))
        rows.append(("MTP layers", f"{details.mtp_layers} of {details.mtp_layers_stated}"))
    kv = "none"
    if scales:
        k, v = (
            f"{low:.4g} to {high:.4g}" for low, high in ((scales.k_min, scales.k_max), (scales.v_min, scales.v_max))
        )
        kv = f"{scales.layers} layers, K {k}, V {v}"
    rows.append(("FP8 KV-cache scales", kv))
    components = [
        (row.component, f"{row.parameters:,}", size_text(row.size_bytes), f"{row.bits_per_weight:.2f}")
        for row in found.components
    ]
    return "\n\n".join(
        [
            "## What it holds",
            table(("", ""), rows),
            table(("component", "parameters", "size", "bits per weight"), components),
        ]
    )


def _recipe(folder: Path, recipe: Recipe | None) -> str:
    if recipe is None:
        return f"## Recipe\n\nNot recorded: the folder has no {MANIFEST_NAME}."
    lines = ["## Recipe", ""]
    for number, step in enumerate(recipe.steps, start=1):
        lines.append(f"{number}. `{step.command}` of `{step.source_name}`, step128 {step.step128_version}")
        lines += ["", f"   ```sh\n   {command_line(step)}\n   ```", ""]
        lines += [f"   - {name}: `{json.dumps(value)}`" for name, value in step.options.items()]
        lines.append("")
    sha256 = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    lines.append(
        f"`{MANIFEST_NAME}` holds the SHA-256 of all {len(recipe.tensors)} tensors and {len(recipe.files)} other "
        f"files; its own is `{sha256}`."
    )
    return "\n".join(lines)


def command_line(step: RecipeStep) -> str:
    """The command with those of its recorded options that are typed as they are recorded."""
    parts = [f"step128-checkpoint {step.command} {step.source_name} OUT"]
    parts += [f"--{name} {step.options[name]}" for name in _TYPED_OPTIONS if step.options.get(name) is not None]
    if step.options.get("calibration") is not None:
        parts.append("--calibration CALIBRATION")
    return " ".join(parts)


def _pruning(details: Details | None) -> str:
    pruning = details.pruning if details else None
    if pruning is None:
        return ""
    before = f" of {pruning.before}" if pruning.before else ""
    protected = ", ".join(f"layer {layer} expert {expert}" for layer, expert in pruning.super_experts) or "none"
    parts = [
        f"## Pruning\n\n{pruning.keep}{before} experts of each MoE layer were kept, by {pruning.criterion}. "
        f"Super-experts, always kept: {protected}."
    ]
    if pruning.calibration:
        parts.append(_calibration(pruning.calibration))
    return "\n\n".join(parts)


def _calibration(calibration: Any) -> str:
    """The set that the experts were measured on, its mixture as a table if it has one."""
    samples = calibration.get("samples") if isinstance(calibration, dict) else None
    mixture = samples.get("mixture") if isinstance(samples, dict) else None
    if not isinstance(mixture, list) or not all(isinstance(part, dict) for part in mixture):
        return f"Measured on: `{json.dumps(calibration)}`"
    keys = [key for key in ("name", "kind", "source", "samples", "tokens") if any(key in part for part in mixture)]
    rows = [tuple(_value(part.get(key, "")) for key in keys) for part in mixture]
    return f"Measured on (calibration `{calibration.get('sha256')}`):\n\n{table(keys, rows)}"


def _quality(folder: Path) -> str:
    """The worst tensors of the quantizer's own report, if the folder has one."""
    path = folder / REPORT_NAME
    if not path.exists():
        return ""
    rows = read_json_object(path).get("tensors")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise CheckpointError(f"{path}: malformed: tensors is no list of named rows")
    keys = [key for key in ("sqnr_db", "output_sqnr_db") if rows and key in rows[0]]
    shown = [
        (f"`{row['name']}`", *("not measured" if row.get(key) is None else f"{float(row[key]):.2f}" for key in keys))
        for row in rows[:_WORST_TENSORS]
    ]
    heading = f"## Quantization error\n\nThe {len(shown)} worst of {len(rows)} quantized tensors:"
    return f"{heading}\n\n{table(('tensor', *keys), shown)}" if shown and keys else ""


def _results(evaluations: Sequence[Evaluation]) -> str:
    lines = ["## What was measured", ""]
    for evaluation in evaluations:
        scalars = {
            key: value
            for key, value in evaluation.result.items()
            if isinstance(value, str | int | float) and key != "exit_code"
        }
        scalars |= _acceptance(evaluation.result)
        rows = [(key.replace("_", " "), _value(value)) for key, value in scalars.items()]
        lines += [f"From `{evaluation.file_name}`:", "", table(("", ""), rows), ""]
    answered = {key for evaluation in evaluations for key, value in evaluation.result.items() if value is not None}
    answered |= {str(evaluation.result.get("eval")) for evaluation in evaluations}
    for question, keys in _QUESTIONS.items():
        if not answered & set(keys):
            lines.append(f"- {question}: not measured")
    return "\n".join(lines).rstrip()


def _acceptance(result: dict[str, Any]) -> dict[str, Any]:
    acceptance = result.get("acceptance")
    if not isinstance(acceptance, dict):
        return {}
    return {f"MTP {key}": value for key, value in acceptance.items() if isinstance(value, str | int | float | list)}


def _value(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _downloaded(folder: Path) -> tuple[str | None, str | None]:
    """The hub's name of the model at the start of the recipe, and its commit, as `download` noted them."""
    path = folder / DOWNLOAD_NAME
    if not path.exists():
        return None, None
    note = read_json_object(path)
    repo, commit = note.get("repo"), note.get("commit")
    return (repo, commit) if isinstance(repo, str) and isinstance(commit, str) else (None, None)

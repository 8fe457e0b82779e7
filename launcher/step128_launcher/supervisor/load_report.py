"""What the plugin says it loaded: one JSON file a role and rank, in the folder named by STEP128_LOAD_REPORT_DIR."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
TARGET, DRAFT = "target", "draft"


@dataclass(frozen=True)
class LoadReport:
    """One model (the target, or the MTP draft) on one rank, as the plugin found it after loading.

    `weight_path` says what computes with the quantized weights (triton or torch) and `weight_order` how they lie
    (kernel or checkpoint): values joined by "+" where modules differ, None without such a weight. `attention_backend`
    names vLLM's backend of the attention layers, `attention_path` what computes in ours (triton or torch).
    `quantized_modules` counts vLLM's modules by component; `kv_scales` is layer -> (k, v) in effect.
    """

    role: str
    rank: int
    plugin_version: str
    quant_method: str | None
    policy: str | None
    weight_path: str | None
    weight_order: str | None
    attention_backend: str | None
    attention_path: str | None
    quantized_modules: dict[str, int]
    kv_cache_dtype: str
    kv_scales: dict[int, tuple[float, float]]
    load_seconds: float


def read_load_reports(folder: Path) -> tuple[list[LoadReport], list[str]]:
    """Return all reports in `folder`, by role and rank, and what was wrong with files that are none."""
    reports: list[LoadReport] = []
    problems: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            reports.append(_parse(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path.name}: {error!r}")
    return sorted(reports, key=lambda report: (report.role != TARGET, report.rank)), problems


def _parse(document: dict[str, Any]) -> LoadReport:
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}, this launcher reads {SCHEMA}")
    return LoadReport(
        role=str(document["role"]),
        rank=int(document["rank"]),
        plugin_version=str(document["plugin_version"]),
        quant_method=document["quant_method"],
        policy=document["policy"],
        weight_path=document["weight_path"],
        weight_order=document.get("weight_order"),  # only demanded where there is a GPU
        attention_backend=document.get("attention_backend"),  # only demanded where the plan names one
        attention_path=document.get("attention_path"),
        quantized_modules={str(name): int(count) for name, count in document["quantized_modules"].items()},
        kv_cache_dtype=str(document["kv_cache_dtype"]),
        kv_scales={int(layer): (float(pair["k"]), float(pair["v"])) for layer, pair in document["kv_scales"].items()},
        load_seconds=float(document["load_seconds"]),
    )

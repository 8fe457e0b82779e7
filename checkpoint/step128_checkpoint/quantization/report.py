"""What quantization cost each tensor, worst first: ``quantization_report.json`` in the product, and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from step128_checkpoint.quantization.quality import ErrorSums

REPORT_NAME = "quantization_report.json"
_SHOWN = 10


@dataclass(frozen=True)
class TensorQuality:
    """Of one quantized tensor. ``output_sqnr_db`` weighs input channels by their second moments; None without them."""

    name: str
    component: str
    parameters: int
    sqnr_db: float
    output_sqnr_db: float | None
    feedback: bool


def tensor_qualities(
    notes: Mapping[str, Mapping[str, Any]], component_of: Callable[[str], str | None]
) -> list[TensorQuality]:
    """From the notes that quantizing steps left, the worst tensor first (by output error where it is known)."""
    rows = []
    for note in notes.values():
        if "quality" not in note:
            continue
        sums = ErrorSums(**note["quality"])
        rows.append(
            TensorQuality(
                name=note["weight"],
                component=component_of(note["weight"]) or "",
                parameters=note["parameters"],
                sqnr_db=sums.sqnr_db,
                output_sqnr_db=sums.weighted_sqnr_db if note["weighted"] else None,
                feedback=note["feedback"],
            )
        )
    return sorted(rows, key=lambda row: (row.sqnr_db if row.output_sqnr_db is None else row.output_sqnr_db, row.name))


def report_json(rows: list[TensorQuality], options: Mapping[str, Any], kv_scales: Mapping[str, Any]) -> bytes:
    """The report file's content; ``kv_scales`` says where those come from and what headroom buys."""
    document = {
        "options": dict(options),
        "kv_scales": dict(kv_scales),
        "meaning": {
            "sqnr_db": "10 log10 of squared weights over squared errors",
            "output_sqnr_db": "the same with input channels weighted by E[x^2]: the error of the layer's output, if "
            "its input channels were uncorrelated; they are not, and GPTQ trades this figure for the output itself",
            "feedback": "GPTQ's error feedback; an expert that calibration gave no token goes without",
        },
        "tensors": [
            {
                "name": row.name,
                "component": row.component,
                "parameters": row.parameters,
                "sqnr_db": _rounded(row.sqnr_db),
                "output_sqnr_db": _rounded(row.output_sqnr_db),
                "feedback": row.feedback,
            }
            for row in rows
        ],
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def _rounded(value_db: float | None) -> float | None:
    """Three digits; None where there is no number to write (an exact tensor has an infinite ratio)."""
    return None if value_db is None or not math.isfinite(value_db) else round(value_db, 3)


def worst_tensors(rows: list[TensorQuality]) -> Table:
    """The ten worst tensors, for people."""
    table = Table(title=f"largest errors ({min(_SHOWN, len(rows))} of {len(rows)} quantized tensors)")
    table.add_column("tensor")
    for heading in ("weights, dB", "by E[x²], dB"):
        table.add_column(heading, justify="right")
    if any(row.feedback for row in rows):
        table.caption = "GPTQ trades both figures for the error of the output, which correlated inputs allow"
    for row in rows[:_SHOWN]:
        output = "-" if row.output_sqnr_db is None else f"{row.output_sqnr_db:.2f}"
        table.add_row(row.name, f"{row.sqnr_db:.2f}", output)
    return table

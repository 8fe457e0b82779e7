"""The report of a pruning: a JSON document and, if a calibration measured the experts, a picture of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.pruning.criteria import scores
from step128_checkpoint.pruning.decide import Pruning

# No later conversion carries these on: they are about the step from the input to this product alone.
REPORT_NAME, PICTURE_NAME = "step128_pruning_report.json", "step128_pruning_report.png"
FORMAT, FORMAT_VERSION = "step128-pruning-report", 1
_SHARES = ("dropped_token_share", "dropped_saliency_share")


def pruning_report(name: str, pruning: Pruning, experts: int) -> dict[str, Any]:
    """Everything about a pruning, as JSON values.

    Args:
        name: of the checkpoint that was pruned.
        pruning: what was decided.
        experts: that each layer had before.

    Returns:
        Under ``layers``, by true layer number: ``kept``, ``dropped`` and ``super_experts`` (old numbers) and
        ``old_to_new``. With a calibration also, by old number, ``saliency`` (REAP's), ``score`` (the criterion's, if it
        is another), ``tokens`` routed and ``max_activation``; and what the dropped experts had: ``dropped_token_share``
        of the routed tokens and ``dropped_saliency_share`` of the saliency mass, which is the sum of g(x)·‖f(x)‖₂ over
        the routed tokens. ``mean_of_layers`` has the means of both shares.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint": name,
        "experts": experts,
        "keep": pruning.keep,
        "criterion": pruning.criterion,
        "seed": pruning.seed,
        "calibration": pruning.calibration,
        "super_experts": sorted(map(list, pruning.super_experts)),
        "protected": sorted(map(list, pruning.protected)),
        "warnings": list(pruning.warnings),
        "mean_of_layers": dict(zip(_SHARES, mean_shares(pruning, experts), strict=True)) if pruning.saliency else None,
        "layers": {str(layer): _layer(pruning, layer, experts) for layer in sorted(pruning.kept)},
    }


def dropped_experts(pruning: Pruning, layer: int, experts: int) -> list[int]:
    """Old numbers of the experts that a layer loses, ascending."""
    return sorted(set(range(experts)) - set(pruning.kept[layer]))


def dropped_shares(pruning: Pruning, layer: int, experts: int) -> tuple[float, float]:
    """Shares of a layer's routed tokens and saliency mass that its dropped experts had (0 if nothing was measured)."""
    row, dropped = pruning.saliency[layer], dropped_experts(pruning, layer, experts)
    return _share(row.tokens, dropped), _share(row.gated_norm_sum, dropped)


def mean_shares(pruning: Pruning, experts: int) -> tuple[float, float]:
    """Both shares, each the mean of its layers': their saliencies differ in scale, and the largest would rule a sum."""
    tokens, saliency = np.mean([dropped_shares(pruning, layer, experts) for layer in pruning.saliency], axis=0)
    return float(tokens), float(saliency)


def report_files(name: str, pruning: Pruning, experts: int) -> dict[str, bytes]:
    """The report and, if a calibration measured the experts, its picture, by file name. Arguments as above."""
    files = {REPORT_NAME: json.dumps(pruning_report(name, pruning, experts), indent=1).encode() + b"\n"}
    if pruning.saliency:
        # Imported only when there is something to draw: it needs matplotlib.
        from step128_checkpoint.pruning.picture import draw

        files[PICTURE_NAME] = draw(name, pruning, experts)
    return files


def _layer(pruning: Pruning, layer: int, experts: int) -> dict[str, Any]:
    kept = pruning.kept[layer]
    entry: dict[str, Any] = {
        "kept": list(kept),
        "dropped": dropped_experts(pruning, layer, experts),
        "super_experts": sorted(expert for its_layer, expert in pruning.super_experts if its_layer == layer),
        "old_to_new": {str(old): new for new, old in enumerate(kept)},
    }
    if row := pruning.saliency.get(layer):
        entry |= {
            **dict(zip(_SHARES, dropped_shares(pruning, layer, experts), strict=True)),
            "saliency": scores(row, "reap", 0, layer).tolist(),
            "tokens": row.tokens.tolist(),
            "max_activation": row.max_activation.tolist(),
        }
        if pruning.criterion not in (None, "reap"):
            entry["score"] = scores(row, pruning.criterion, pruning.seed or 0, layer).tolist()
    return entry


def _share(values: NDArray[Any], chosen: list[int]) -> float:
    total = float(values.sum())
    return float(values[chosen].sum()) / total if total > 0 else 0.0

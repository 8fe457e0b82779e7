"""Decides which experts stay: by a calibration that pruned already, by a criterion on its sums, or at random."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from step128_checkpoint.calibration.result import Calibration, LayerSaliency
from step128_checkpoint.dimensions import read_dimensions
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.manifest import headers_sha256
from step128_checkpoint.pruning.criteria import Criterion, keep_experts, unseen
from step128_checkpoint.pruning.super_experts import find_super_experts
from step128_checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Pruning:
    """Which experts stay, and why. Layers are true layer numbers, experts the input's numbers.

    ``kept`` has an entry for every MoE layer, all of the same length, each ascending. ``super_experts`` and
    ``protected`` (by the user) are pairs of layer and expert. ``calibration`` says what they were measured on: its
    ``sha256`` and ``samples`` (JSON values). ``saliency`` is empty without one. ``warnings`` are those of a calibration
    that pruned.
    """

    kept: dict[int, tuple[int, ...]]
    criterion: Criterion | None = None
    seed: int | None = None
    super_experts: frozenset[tuple[int, int]] = frozenset()
    protected: frozenset[tuple[int, int]] = frozenset()
    calibration: dict[str, Any] | None = None
    saliency: dict[int, LayerSaliency] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def keep(self) -> int:
        """Experts that every layer keeps."""
        return len(next(iter(self.kept.values()), ()))


def experts_per_token(checkpoint: Checkpoint) -> int:
    """The experts that the router chooses for each token, of which a layer must keep at least as many.

    Raises:
        CheckpointError: config.json does not state it.
    """
    value = checkpoint.text_config.get("moe_top_k")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: text_config.moe_top_k is {value!r}, not a count")
    return value


def decide(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    keep: int,
    criterion: Criterion = "reap",
    seed: int = 0,
    protected: Collection[tuple[int, int]] = (),
    super_expert_layers: float = 1.0,
) -> Pruning:
    """Choose ``keep`` experts of every MoE layer.

    Args:
        checkpoint: to be pruned.
        calibration: of that checkpoint, unpruned; only ``random`` goes without (and then knows no super-experts).
        keep: experts that each layer keeps.
        criterion: how the others are ranked.
        seed: of ``random``.
        protected: pairs of true layer number and expert, kept whatever their score.
        super_expert_layers: share of the MoE layers, from the first, whose super-experts are kept too.

    Raises:
        ConfigurationError: ``keep``, ``criterion`` and ``protected`` do not fit together or to the model.
        CheckpointError: the calibration is another checkpoint's, or damaged.
    """
    dimensions = read_dimensions(checkpoint)
    layers, experts = sorted(dimensions.moe_layers), dimensions.num_experts
    for layer, expert in protected:
        if layer not in dimensions.moe_layers:
            raise ConfigurationError(f"layer {layer} has no experts to protect; layers {layers[0]} to {layers[-1]} do")
        if not 0 <= expert < experts:
            raise ConfigurationError(f"layer {layer} has no expert {expert}; it has 0 to {experts - 1}")
    if calibration is None and criterion != "random":
        raise ConfigurationError(
            f"criterion {criterion} ranks experts by a calibration. Run `calibrate`, and name its folder: --calibration"
        )
    saliency = _saliency(checkpoint, calibration, layers, experts) if calibration else {}
    found = (
        find_super_experts({layer: row.max_activation for layer, row in saliency.items()}, super_expert_layers)
        if saliency
        else frozenset()
    )
    guarded = found | set(protected)
    kept = {
        layer: keep_experts(
            saliency.get(layer, unseen(experts)),
            keep,
            criterion,
            {expert for guarded_layer, expert in guarded if guarded_layer == layer},
            seed,
            layer,
            experts_per_token=experts_per_token(checkpoint),
        )
        for layer in layers
    }
    return Pruning(
        kept,
        criterion,
        seed if criterion == "random" else None,
        found,
        frozenset(protected),
        _described(calibration) if calibration else None,
        saliency,
    )


def decided_by(checkpoint: Checkpoint, calibration: Calibration) -> Pruning:
    """What a calibration made with ``--prune`` decided: its measurements hold for those experts and no others.

    Raises:
        CheckpointError: the calibration is another checkpoint's, or damaged.
    """
    dimensions = read_dimensions(checkpoint)
    pruned = calibration.document["pruned"]
    return Pruning(
        calibration.kept_experts or {},
        pruned["criterion"],
        pruned.get("seed"),
        frozenset((int(layer), int(expert)) for layer, expert in pruned["super_experts"]),
        frozenset(),
        _described(calibration),
        _saliency(checkpoint, calibration, sorted(dimensions.moe_layers), dimensions.num_experts),
        tuple(pruned.get("warnings", ())),
    )


def _described(calibration: Calibration) -> dict[str, Any]:
    return {"sha256": calibration.sha256, "samples": calibration.document.get("samples")}


def _saliency(
    checkpoint: Checkpoint, calibration: Calibration, layers: list[int], experts: int
) -> dict[int, LayerSaliency]:
    measured = calibration.document["checkpoint"]
    if measured["headers_sha256"] != headers_sha256(checkpoint):
        raise CheckpointError(
            f"{calibration.folder}: this is the calibration of another checkpoint ({measured['name']}), not of "
            f"{checkpoint.folder}: config.json or the tensors differ. Calibrate this one."
        )
    saliency = calibration.saliency()
    if sorted(saliency) != layers or any(len(row.tokens) != experts for row in saliency.values()):
        raise CheckpointError(
            f"{calibration.folder}: its saliency is not that of {len(layers)} layers of {experts} experts. "
            "Calibrate again."
        )
    return saliency

"""The stages of a sweep: each reads hidden states, runs a layer on them, measures, and writes the next ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer

from step128_checkpoint.calibration.batches import Batch
from step128_checkpoint.calibration.embeddings import embed
from step128_checkpoint.calibration.layers import keep_in_place, load_layer, run_layer
from step128_checkpoint.calibration.moments import SecondMoments
from step128_checkpoint.calibration.mtp import DraftLayer, load_draft_layer, load_norm
from step128_checkpoint.calibration.observers import LayerObserver
from step128_checkpoint.calibration.plan import Plan, Stage
from step128_checkpoint.calibration.result import LayerSaliency, hessian_key
from step128_checkpoint.calibration.states import StateReader, StateWriter
from step128_checkpoint.errors import CheckpointError

OnTokens = Callable[[int], None]
Choose = Callable[[int, LayerSaliency], tuple[int, ...]]
"""From a layer's number and saliency to the experts that it keeps, ascending."""

_LM_HEAD = "lm_head.weight"


@dataclass
class Measured:
    """Of one stage. ``tensors`` have their final names; ``hessians`` are by file name, then key.

    ``notes`` are JSON values: ``states`` (SHA-256 of the hidden states written), and by layer ``kv`` and ``kept``
    (experts).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    hessians: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, observer: LayerObserver, number: int) -> None:
        """Collect what was seen of one layer, except its saliency."""
        self.tensors |= observer.importance
        if observer.kv is not None:
            self.notes.setdefault("kv", {})[str(number)] = observer.kv.result
        if matrices := observer.hessians():
            self.hessians[f"layer-{number:05d}.safetensors"] = matrices


@torch.no_grad()
def measure_embeddings(plan: Plan, stage: Stage, target: Path, on_tokens: OnTokens) -> Measured:
    """Write what enters the first layer; of the vision tower, the inputs' second moments."""
    measured = Measured()
    numbers = [number for batch in plan.batches_of(stage) for number in batch.numbers]
    moments = None if stage.pilot else measured.tensors.update
    with StateWriter(target) as writer:
        for number, rows in embed(plan.checkpoint, plan.samples, numbers, plan.device, plan.dtype, moments):
            _check_finite(rows, f"the embedding of sample {number}")
            writer.write(rows)
            on_tokens(len(rows))
        measured.notes["states"] = writer.finish()
    return measured


@torch.no_grad()
def measure_layer(
    plan: Plan, stage: Stage, source: Path, target: Path, choose: Choose | None, on_tokens: OnTokens
) -> Measured:
    """Run one trunk layer; if ``choose`` is given and the layer has experts, whole first, then with those it names."""
    number = stage.layer
    batches, measured = plan.batches_of(stage), Measured()
    layer = load_layer(plan.checkpoint, plan.config, number, plan.dtype, plan.device)
    sparse = number in plan.dimensions.moe_layers
    if sparse and choose is not None:
        ranking = LayerObserver(layer, number, moments=False)
        counted = [batch for batch in batches if not batch.held_out]
        _visit(plan, layer, number, counted, source, ranking, None, on_tokens)
        ranking.close()
        saliency = _saliency(ranking, number, measured)
        kept = choose(number, saliency)
        measured.notes["kept"] = {str(number): list(kept)}
        keep_in_place(layer, kept)
        observer = LayerObserver(layer, number, saliency=False, hessians=plan.options.hessians)
    else:
        observer = LayerObserver(
            layer, number, moments=not stage.pilot, hessians=plan.options.hessians and not stage.pilot
        )
    with StateWriter(target) as writer:
        _visit(plan, layer, number, batches, source, observer, writer, on_tokens)
        measured.notes["states"] = writer.finish()
    observer.close()
    if sparse and choose is None:
        _saliency(observer, number, measured)
    measured.take(observer, number)
    return measured


@torch.no_grad()
def measure_last(plan: Plan, source: Path, on_tokens: OnTokens) -> Measured:
    """From the trunk's last hidden states: what lm_head reads, and the chain of MTP layers with their heads.

    The MTP layers are in memory together (they have no experts: all of them are smaller than one MoE layer), so their
    hidden states need no disk.
    """
    checkpoint, config, device = plan.checkpoint, plan.config, plan.device
    norm = load_norm(checkpoint, config, "model.norm.weight", plan.dtype, device)
    chain = [load_draft_layer(checkpoint, config, number, plan.dtype, device) for number in plan.mtp_layers]
    watched = [
        (draft, LayerObserver(draft.layer, draft.number, hessians=plan.options.hessians), _head_moments(plan))
        for draft in chain
    ]
    trunk_head = _head_moments(plan)
    numbers = [number for batch in plan.batches for number in batch.numbers] if chain else []
    embeddings = embed(checkpoint, plan.samples, numbers, device, plan.dtype)
    for batch, hidden in StateReader(source, config.hidden_size, plan.dtype).batches(plan.batches, device):
        if not batch.held_out:
            trunk_head.add(norm(batch.unpad(hidden)))
        if chain:
            inputs = batch.pad(torch.cat([next(embeddings)[1] for _ in batch.numbers]))
            _run_chain(watched, batch, hidden, F.pad(inputs[:, 1:], (0, 0, 0, 1)))
        on_tokens(batch.tokens)
    measured = Measured()
    _take_head(measured, trunk_head, _LM_HEAD, "lm_head.safetensors")
    for draft, observer, head in watched:
        observer.close()
        measured.take(observer, draft.number)
        weight = f"model.layers.{draft.number}.transformer.shared_head.output.weight"
        _take_head(measured, head, weight, f"layer-{draft.number:05d}.safetensors")
    return measured


def _run_chain(
    watched: Sequence[tuple[DraftLayer, LayerObserver, SecondMoments]],
    batch: Batch,
    hidden: Tensor,
    next_embeddings: Tensor,
) -> None:
    for draft, observer, head in watched:
        real = draft.real(batch).to(hidden.device)
        observer.start(real, batch.held_out)
        hidden = draft.run(hidden, next_embeddings, observer.kv)
        rows = hidden.flatten(0, 1)[real]
        _check_finite(rows, f"MTP layer {draft.number}")
        if not batch.held_out:
            head.add(draft.head_norm(rows))


def _head_moments(plan: Plan) -> SecondMoments:
    return SecondMoments(plan.dimensions.hidden_size, plan.device, matrices=plan.options.hessians)


def _take_head(measured: Measured, head: SecondMoments, weight: str, file_name: str) -> None:
    measured.tensors[weight] = head.importance[0]
    matrices = head.matrices
    if matrices is not None:
        measured.hessians.setdefault(file_name, {})[hessian_key(weight)] = matrices[0]


def _visit(
    plan: Plan,
    layer: Step3p7DecoderLayer,
    number: int,
    batches: Sequence[Batch],
    source: Path,
    observer: LayerObserver,
    writer: StateWriter | None,
    on_tokens: OnTokens,
) -> None:
    for batch, hidden in StateReader(source, plan.dimensions.hidden_size, plan.dtype).batches(batches, plan.device):
        observer.start(None if batch.real is None else batch.real.to(plan.device), batch.held_out)
        rows = batch.unpad(run_layer(layer, number, hidden, observer.kv))
        _check_finite(rows, f"layer {number}")
        if writer is not None:
            writer.write(rows)
        on_tokens(batch.tokens)


def _saliency(observer: LayerObserver, number: int, measured: Measured) -> LayerSaliency:
    found = observer.saliency
    assert found is not None  # a MoE layer, observed for it
    for name, values in vars(found).items():
        measured.tensors[f"layers.{number}.{name}"] = torch.from_numpy(values)
    return found


def _check_finite(rows: Tensor, where: str) -> None:
    if not bool(torch.isfinite(rows).all()):
        found = "NaN" if bool(rows.isnan().any()) else "infinity"
        raise CheckpointError(
            f"{where} gave {found}. Run `verify` to see whether its weights are damaged; if not, use --dtype float32."
        )

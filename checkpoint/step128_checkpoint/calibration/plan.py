"""A calibration before it starts: stages, batches, and what disk and memory they need. Reads headers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from step128_checkpoint.calibration.batches import Batch, plan_batches
from step128_checkpoint.calibration.layers import text_config
from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.samples import SampleSet, open_samples
from step128_checkpoint.calibration.states import file_sha256
from step128_checkpoint.devices import find_device
from step128_checkpoint.dimensions import Dimensions, layer_of, read_dimensions
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.plain import require_structure
from step128_checkpoint.policy import PACKED_SUFFIX
from step128_checkpoint.reader import Checkpoint, open_checkpoint

StageKind = Literal["embeddings", "layer", "last"]


@dataclass(frozen=True)
class Stage:
    """One step of the sweep, done whole or not at all. ``tokens`` is its share of the work.

    ``pilot``: of the unpruned model, for the super-experts only. ``index`` counts within pilot or sweep: a stage reads
    the hidden states that the one before it wrote. ``layer`` is the layer's number, of a layer's stage.
    """

    name: str
    kind: StageKind
    pilot: bool
    index: int
    layer: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """A calibration, checked as far as headers allow. ``batches`` end with those of held-out samples."""

    options: CalibrationOptions
    checkpoint: Checkpoint
    samples: SampleSet
    config: Step3p7TextConfig
    dimensions: Dimensions
    mtp_layers: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batches: tuple[Batch, ...]
    pilot_batches: tuple[Batch, ...]
    stages: tuple[Stage, ...]

    @property
    def total_tokens(self) -> int:
        """The work of all stages, in tokens through a layer."""
        return sum(stage.tokens for stage in self.stages)

    def batches_of(self, stage: Stage) -> tuple[Batch, ...]:
        """The batches that go through a stage."""
        return self.pilot_batches if stage.pilot else self.batches

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the results, as JSON values; the checkpoint by names, sizes and times.

        Device and batch size are not part of it: they decide rounding alone, and a run that ran out of memory goes on
        with a smaller batch, or elsewhere.
        """
        options = self.options
        return {
            "command": "calibrate",
            "input": self.checkpoint.fingerprint(),
            "samples": self.samples.sha256,
            "prune": options.keep,
            "criterion": options.criterion if options.keep is not None else None,
            "seed": options.seed if options.keep is not None and options.criterion == "random" else None,
            "pilot_samples": options.pilot_samples if options.keep is not None else None,
            "hessians": options.hessians,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def make_plan(options: CalibrationOptions) -> Plan:
    """Open checkpoint and samples, and check that they, the options and the machine fit together.

    Raises:
        InputNotFoundError: one of them is missing.
        CheckpointError: one of them is bad, or the samples are of another tokenizer.
        ConfigurationError: a number of experts that cannot be kept, a quantized checkpoint that is to be pruned, or a
            device that is not there.
    """
    checkpoint = open_checkpoint(options.checkpoint)
    require_structure(checkpoint)
    dimensions, config = read_dimensions(checkpoint), text_config(checkpoint)
    samples = open_samples(options.samples)
    _check_samples(samples, checkpoint, dimensions.vocab_size)
    _check_keep(options, checkpoint, dimensions, config.num_experts_per_tok)
    numbers = np.arange(len(samples))
    counted, held_out = numbers[~samples.held_out].tolist(), numbers[samples.held_out].tolist()
    lengths = samples.lengths.tolist()
    batches = plan_batches(lengths, counted, False, options.batch_tokens)
    batches += plan_batches(lengths, held_out, True, options.batch_tokens, sum(batch.tokens for batch in batches))
    pilot = _pilot(samples, counted, options.pilot_samples) if options.keep is not None else []
    pilot_batches = plan_batches(lengths, pilot, False, options.batch_tokens)
    layers = {layer_of(name) for name in checkpoint.tensors}
    mtp_layers = tuple(
        number
        for number in range(dimensions.num_hidden_layers, dimensions.num_hidden_layers + dimensions.num_mtp_layers)
        if number in layers
    )
    return Plan(
        options,
        checkpoint,
        samples,
        config,
        dimensions,
        mtp_layers,
        _dtype(options, checkpoint),
        find_device(options.device),
        tuple(batches),
        tuple(pilot_batches),
        _stages(dimensions, batches, pilot_batches),
    )


def _check_samples(samples: SampleSet, checkpoint: Checkpoint, vocab_size: int) -> None:
    if samples.held_out.all():
        raise CheckpointError(f"{samples.folder}: holds no samples to calibrate with. Make more samples.")
    largest = max(int(samples.token_ids(number).max()) for number in range(len(samples)))
    if largest >= vocab_size:
        raise CheckpointError(
            f"{samples.folder}: token id {largest} is outside this model's vocabulary of {vocab_size}. Make the "
            "samples with this model's tokenizer."
        )
    made_with, tokenizer = samples.document.get("tokenizer_sha256"), file_sha256(checkpoint.folder / "tokenizer.json")
    if None not in (made_with, tokenizer) and made_with != tokenizer:
        raise CheckpointError(
            f"{samples.folder}: made with another tokenizer.json than {checkpoint.folder} has. Make the samples with "
            "this model's folder."
        )


def _pilot(samples: SampleSet, counted: Sequence[int], wanted: int) -> list[int]:
    """The first sample of every part of the mixture, as far as ``wanted`` goes, and others evenly from the rest."""
    first: dict[str, int] = {}
    for number in counted:
        first.setdefault(samples.domain(number), number)
    chosen = list(first.values())[:wanted]
    others = sorted(set(counted) - set(chosen))
    places = np.linspace(0, len(others) - 1, min(wanted - len(chosen), len(others))).round()
    return sorted([*chosen, *(others[int(place)] for place in places)])


def _check_keep(
    options: CalibrationOptions, checkpoint: Checkpoint, dimensions: Dimensions, experts_per_token: int
) -> None:
    if options.keep is None:
        return
    if any(name.endswith(PACKED_SUFFIX) for name in checkpoint.tensors):
        raise ConfigurationError(
            f"{checkpoint.folder} is quantized: `prune` and `quantize` start from the plain checkpoint. Calibrate that "
            "one, or leave out --prune."
        )
    if not dimensions.moe_layers:
        raise ConfigurationError(f"{options.checkpoint}: no layer has experts to prune. Leave out --prune.")
    if not experts_per_token <= options.keep <= dimensions.num_experts:
        raise ConfigurationError(
            f"{options.keep} experts cannot be kept: each token needs {experts_per_token}, there are "
            f"{dimensions.num_experts}"
        )


def _dtype(options: CalibrationOptions, checkpoint: Checkpoint) -> torch.dtype:
    if options.dtype != "auto":
        return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    # A norm is never quantized. float16 weights have more digits than bfloat16.
    return torch.bfloat16 if checkpoint.tensors["model.norm.weight"].dtype == "BF16" else torch.float32


def _stages(dimensions: Dimensions, batches: Sequence[Batch], pilot: Sequence[Batch]) -> tuple[Stage, ...]:
    counted = sum(batch.tokens for batch in batches if not batch.held_out)
    every, few = sum(batch.tokens for batch in batches), sum(batch.tokens for batch in pilot)
    stages: list[Stage] = []
    layers = range(dimensions.num_hidden_layers)
    if pilot:
        stages.append(Stage("pilot embeddings", "embeddings", True, 0, -1, few))
        for layer in layers[: max(dimensions.moe_layers) + 1]:
            stages.append(Stage(f"pilot layer {layer}", "layer", True, layer + 1, layer, few))
    stages.append(Stage("embeddings", "embeddings", False, 0, -1, every))
    for layer in layers:
        # A layer that is pruned is seen twice: whole, to rank its experts, and pruned.
        tokens = every + (counted if pilot and layer in dimensions.moe_layers else 0)
        stages.append(Stage(f"layer {layer}", "layer", False, layer + 1, layer, tokens))
    stages.append(Stage("MTP layers and heads", "last", False, len(layers) + 1, -1, every))
    return tuple(stages)

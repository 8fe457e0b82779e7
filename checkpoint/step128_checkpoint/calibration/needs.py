"""What a calibration needs of the machine, by arithmetic on the plan: disk and memory, checked before anything runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from step128_checkpoint.calibration.plan import Plan
from step128_checkpoint.calibration.result import hessian_key
from step128_checkpoint.devices import free_bytes
from step128_checkpoint.dimensions import layer_of
from step128_checkpoint.errors import ConfigurationError, OutputError
from step128_checkpoint.expected import expected_weights
from step128_checkpoint.files import size_text
from step128_checkpoint.policy import load_policy

_SALIENCY_BYTES = 8 + 8 + 8 + 4  # of one expert
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Needs:
    """In bytes. ``states``: the two files of hidden states, gone at the end. ``results``: the folder that stays.

    ``disk``: the most that is there at one time. ``layer`` and ``batch``: in memory at one time, at most.
    """

    states: int
    results: int
    disk: int
    layer: int
    batch: int

    @property
    def memory(self) -> int:
        """What the device that computes must have free."""
        return self.layer + self.batch


def needs_of(plan: Plan) -> Needs:
    """Work out what a plan needs; an upper bound, but for what torch itself takes."""
    tokens = sum(batch.tokens for batch in plan.batches)
    states = 2 * tokens * plan.dimensions.hidden_size * plan.dtype.itemsize
    inputs = dict(_inputs(plan))
    vectors = 4 * sum(experts * columns for _, columns, experts in inputs.values())
    saliency = _SALIENCY_BYTES * plan.dimensions.num_experts * len(plan.dimensions.moe_layers)
    matrices = _matrix_bytes(plan, inputs)
    results = vectors + saliency + sum(matrices.values())
    # Each stage's results are there twice while the final files are made of them; matrices go to their place at once.
    return Needs(states, results, max(states + results, results + vectors + saliency), *_memory(plan, matrices))


def check_disk(plan: Plan, needs: Needs, work: Path) -> None:
    """Compare what is still to be written with what is free.

    Raises:
        OutputError: it does not fit.
    """
    present = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file()) if work.exists() else 0
    place = next(folder for folder in work.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(place).free, needs.disk - present
    if needed > free:
        raise OutputError(
            f"{plan.options.out}: {size_text(needed)} are needed there ({size_text(needs.states)} of them for hidden "
            f"states, which go at the end), {size_text(free)} are free. Free some space, write to another disk, or use "
            "fewer samples."
        )


def check_memory(plan: Plan, needs: Needs) -> None:
    """Compare the largest layer and a batch with ``--max-memory``, or with what is free on the device.

    Raises:
        ConfigurationError: it does not fit; says what is needed for what.
    """
    free, of_whom = plan.options.max_memory_bytes, "--max-memory allows"
    if free is None:
        free, of_whom = free_bytes(plan.device), f"{plan.device} has free:"
    if needs.memory > free:
        raise ConfigurationError(
            f"{size_text(needs.memory)} of memory are needed: {size_text(needs.layer)} for the largest layer and its "
            f"statistics, {size_text(needs.batch)} for {plan.options.batch_tokens} tokens at once; {of_whom} "
            f"{size_text(free)}. Use a smaller --batch-tokens or another --device."
        )


def calibrated_weights(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Every weight of the language model whose inputs a calibration observes, with its shape: what a policy can
    quantize but the embedding, whose input is a token's number."""
    policy = load_policy()
    layers = plan.dimensions.num_hidden_layers
    return {
        name: shape
        for name, shape in expected_weights(plan.dimensions, len(plan.mtp_layers))
        if policy.component_of(name, layers) not in (None, "vision_linears") and name != _EMBEDDING
    }


def _inputs(plan: Plan) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Each weight's name with its input's key, columns and experts."""
    for name, shape in calibrated_weights(plan).items():
        experts = 1 if len(shape) == 2 else plan.options.keep or shape[0]
        yield name, (hessian_key(name), shape[-1], experts)


def _matrix_bytes(plan: Plan, inputs: dict[str, tuple[str, int, int]]) -> dict[str, int]:
    """Bytes of the second-moment matrix of each input, by key; empty if none are asked for."""
    if not plan.options.hessians:
        return {}
    # Of the experts' inputs, only those of down_proj have matrices of their own.
    return {
        key: 4 * columns**2 * (experts if name.endswith("moe.down_proj.weight") else 1)
        for name, (key, columns, experts) in inputs.items()
    }


def _memory(plan: Plan, matrices: dict[str, int]) -> tuple[int, int]:
    d, size = plan.dimensions, plan.dtype.itemsize
    weights: dict[int, int] = {}
    mtp = set(plan.mtp_layers)
    for name, shape in expected_weights(d, len(mtp)):
        layer = layer_of(name)
        if layer is not None and "shared_head.output" not in name:
            stage = -1 if layer in mtp else layer  # MTP layers are in memory together
            weights[stage] = weights.get(stage, 0) + math.prod(shape) * size
    for key, matrix_bytes in matrices.items():
        layer = layer_of(f"{key}.")
        stage = -1 if layer is None or layer in mtp else layer
        weights[stage] = weights.get(stage, 0) + matrix_bytes
    longest = max(batch.width for batch in plan.batches)
    tokens = max(plan.options.batch_tokens, longest)
    width = max(d.heads) * d.head_dim
    inner = max(d.intermediate_size, 2 * d.moe_intermediate_size, d.shared_expert_size)
    # Copies alive at one time: hidden states and their float32 norms; queries with norm and rotation, repeated keys and
    # values, attention's output; gate, up and their product; and the mask, one byte and one float for each pair.
    per_token = d.hidden_size * (8 * size + 12) + width * (8 * size + 12) + inner * 5 * size + longest * (1 + size)
    return max(weights.values()), tokens * per_token

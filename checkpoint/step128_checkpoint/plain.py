"""What a checkpoint must be before it is pruned or quantized: whole, as its config.json says, and not quantized yet."""

from __future__ import annotations

from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.expected import structure_problems
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX
from step128_checkpoint.reader import Checkpoint


def require_plain(checkpoint: Checkpoint) -> None:
    """Refuse anything but a whole bf16, fp16 or fp32 checkpoint, from headers alone.

    Raises:
        CheckpointError: it is quantized already, or contradicts its config.json (a tensor is missing, unknown or of a
            wrong shape or type). Names the tensor.
    """
    for config in (checkpoint.config, checkpoint.text_config):
        if entry := config.get("quantization_config"):
            method = entry.get("quant_method") if isinstance(entry, dict) else entry
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: the checkpoint is quantized already (quant_method {method!r}). "
                "Start from the bf16, fp16 or fp32 checkpoint."
            )
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith((f"weight{PACKED_SUFFIX}", f"weight{SCALE_SUFFIX}")):
            raise CheckpointError(f"{tensor.path}: tensor {tensor.name} shows that the checkpoint is quantized already")
    require_structure(checkpoint)


def require_structure(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint, quantized or not, that contradicts its config.json, from headers alone.

    Raises:
        CheckpointError: the first problem, and how many more there are.
    """
    if problems := structure_problems(checkpoint):
        more = f" (`step128-checkpoint inspect` shows {len(problems) - 1} more)" if problems[1:] else ""
        raise CheckpointError(problems[0] + more)

"""A checkpoint that does not fit the model fails the load, with the tensor's name, whatever loader reads it.

The ``step128`` loader looks at the shards' headers before it reads any weight. With another load format the names are
seen as they stream by, so the same check comes right after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from vllm.config import VllmConfig

from step128_kernels.vllm_plugin.names import describe_mismatch, needed_tensors

_SAFETENSORS_DTYPES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


class CheckpointMismatchError(ValueError):
    """The checkpoint does not hold what the model needs; the message starts with ``step128:`` for the launcher."""


def check_tensors(model: torch.nn.Module, is_draft: bool, dtypes: Mapping[str, str], source: str) -> None:
    """Compare a checkpoint's tensors (safetensors dtype by hub name) with what the model needs.

    Raises:
        CheckpointMismatchError: a tensor is missing, unknown, or of a wrong dtype.
    """
    needed = needed_tensors((name for name, _ in model.named_parameters()), is_draft)
    problem = describe_mismatch(needed, dtypes)
    if problem is not None:
        raise CheckpointMismatchError(f"step128: {source}: {problem}")


def recorded(weights: Iterable[tuple[str, torch.Tensor]], dtypes: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on, noting name and dtype of each."""
    for name, tensor in weights:
        dtypes[name] = _SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype))
        yield name, tensor


def refuse_pipeline_parallelism(vllm_config: VllmConfig) -> None:
    """Say so at once: vLLM 0.32 drops KV scales on ranks without the head, and has no drafter across stages.

    Raises:
        ValueError: the pipeline parallel size is over 1.
    """
    size = vllm_config.parallel_config.pipeline_parallel_size
    if size > 1:
        raise ValueError(
            f"step128: pipeline parallel size {size} is not supported for Step-3.7. Use tensor parallelism instead."
        )

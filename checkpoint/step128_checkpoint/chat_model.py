"""Loads a checkpoint, NL4 or plain, into transformers' own Step-3.7 model: the second opinion on what we quantized.

transformers gets the weights under the hub's names and renames, fuses and splits them itself, as it does when it loads
a plain checkpoint. It asks for each one when its turn comes, and only then is it read and dequantized, so there is
never a second copy of the model, neither in memory nor on disk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, Step3p7Config, Step3p7ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from step128_checkpoint.calibration.weights import load_weight, weight_shape
from step128_checkpoint.devices import free_bytes
from step128_checkpoint.dimensions import layer_of
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.expected import structure_problems
from step128_checkpoint.files import read_json_object, size_text
from step128_checkpoint.kv_scales import KV_SCALE
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX
from step128_checkpoint.reader import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MemoryShortageError(ConfigurationError):
    """The model does not fit into what is free."""


@dataclass(frozen=True)
class _LazyWeight:
    """A weight that is read when it is sliced, which is how transformers asks for a tensor of a file."""

    checkpoint: Checkpoint
    name: str
    dtype: torch.dtype

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        return load_weight(self.checkpoint, self.name, self.dtype, "cpu")


def needed_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Memory that the loaded model takes, with what loading takes besides: the largest layer's experts once more."""
    sizes = {name: _elements(checkpoint, name) * dtype.itemsize for name in weight_names(checkpoint)}
    return sum(sizes.values()) + 3 * max(sizes.values())


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """Plain names of the weights that transformers' model has: no MTP layers, no KV scales."""
    trunk = checkpoint.num_hidden_layers
    names = []
    for name in checkpoint.tensors:
        layer = layer_of(name)
        if KV_SCALE.fullmatch(name) or name.endswith(f"weight{SCALE_SUFFIX}") or (layer is not None and layer >= trunk):
            continue
        names.append(name.removesuffix(PACKED_SUFFIX) if name.endswith(f"weight{PACKED_SUFFIX}") else name)
    return names


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> Any:
    """Load transformers' Step3p7ForConditionalGeneration from a checkpoint; in float32 its weights are exact.

    Args:
        checkpoint: opened; its files are opened and closed here.
        dtype: of the model.
        device: where it will run; it is put together in the host's memory first.
        say: told how much memory is needed and free, before anything is loaded.

    Raises:
        MemoryShortageError: it does not fit.
        CheckpointError: the checkpoint contradicts its config.json, its generation_config.json is bad, or transformers
            cannot load it.
    """
    if problems := structure_problems(checkpoint):
        raise CheckpointError(problems[0])
    generation = _generation_config(checkpoint)
    needed = needed_bytes(checkpoint, dtype)
    for place in dict.fromkeys((torch.device("cpu"), device)):
        free = free_bytes(place)
        say(f"{size_text(needed)} of memory are needed in {str(dtype).removeprefix('torch.')}, "
            f"{size_text(free)} are free on {place}")  # fmt: skip
        if needed > free:
            raise MemoryShortageError(
                f"{checkpoint.folder}: {size_text(needed)} of memory are needed on {place}, {size_text(free)} are "
                "free. Try --dtype bfloat16, or `perplexity`, which holds one layer at a time."
            )
    values = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with checkpoint, _bars_on_terminals_only():
        try:
            model, loading = Step3p7ForConditionalGeneration.from_pretrained(
                None,
                config=Step3p7Config.from_dict(values),
                state_dict={
                    name: _LazyWeight(checkpoint, name, _kept(name, dtype)) for name in weight_names(checkpoint)
                },
                dtype=dtype,
                output_loading_info=True,
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}: transformers {transformers.__version__} cannot load it: {error}"
            ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            raise CheckpointError(
                f"{checkpoint.folder}: transformers reports {kind.replace('_', ' ')}: {names[0]}, ..."
            )
    if generation is not None:
        model.generation_config = generation
    return model.to(device)


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """The checkpoint's generation_config.json, if it has one."""
    path = checkpoint.folder / "generation_config.json"
    if not path.exists():
        return None
    values = read_json_object(path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values.get(name)
        if ids is not None and not all(type(token) is int for token in (ids if isinstance(ids, list) else [ids])):
            raise CheckpointError(f"{path}: {name} is {ids!r}; a number or a list of numbers is needed")
    try:
        return GenerationConfig.from_dict(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: transformers {transformers.__version__} refuses it: {error}") from error


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep transformers' progress bars out of files and pipes, as ours are."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _kept(name: str, dtype: torch.dtype) -> torch.dtype:
    """Read the router's bias as it is stored, so that it is rounded once at most, by transformers."""
    return torch.float32 if name.endswith("router_bias") else dtype


def _elements(checkpoint: Checkpoint, name: str) -> int:
    count = 1
    for length in weight_shape(checkpoint, name):
        count *= length
    return count

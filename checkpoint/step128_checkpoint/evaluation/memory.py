"""What an evaluation needs: hidden states in the host's memory, and one layer on the device."""

from __future__ import annotations

import math
from collections import Counter

import torch

from step128_checkpoint.devices import free_bytes
from step128_checkpoint.dimensions import layer_of, read_dimensions
from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.evaluation.blockwise import Subject
from step128_checkpoint.evaluation.windows import Windows
from step128_checkpoint.expected import expected_weights
from step128_checkpoint.files import size_text


def check_memory(subject: Subject, windows: Windows, models: int) -> None:
    """Compare what is needed with what is free; says both, and what to do.

    Args:
        subject: the largest of the checkpoints, and how it runs.
        windows: what is evaluated.
        models: whose states are kept at a time: 2 for a comparison.

    Raises:
        ConfigurationError: it does not fit.
    """
    dimensions, size = read_dimensions(subject.checkpoint), subject.options.dtype.itemsize
    states_bytes = windows.tokens * dimensions.hidden_size * size * (models + 1)  # the last norm makes them anew
    layers: Counter[int] = Counter()
    for name, shape in expected_weights(dimensions, 0):
        if (layer := layer_of(name)) is not None:
            layers[layer] += math.prod(shape) * size
    head_bytes = models * dimensions.vocab_size * dimensions.hidden_size * size
    layer_bytes = max(max(layers.values()), head_bytes)
    device = subject.options.device
    needs: Counter[torch.device] = Counter()
    needs[torch.device("cpu")] += states_bytes
    needs[device] += layer_bytes
    for place, needed_bytes in needs.items():
        free = free_bytes(place)
        if needed_bytes > free:
            raise ConfigurationError(
                f"{size_text(needed_bytes)} of memory are needed on {place}, {size_text(free)} are free: "
                f"{size_text(states_bytes)} for the states of {windows.tokens} tokens (on the host; fewer with "
                f"--tokens), {size_text(layer_bytes)} for the largest layer (on {device}; half with --dtype bfloat16)"
            )

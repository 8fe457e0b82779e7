"""The tensors a Step-3.7 checkpoint must hold: name -> shape, dtype and component, for bfloat16 and NL4 checkpoints.

Checkpoints of other formats are described in `formats/`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from step128_launcher.model.model_config import ModelConfig
from step128_launcher.model.model_weights import (
    EH_PROJ,
    HEAD_GATES,
    KV_SCALES,
    NORMS,
    ROUTER,
    VISION_OTHER,
    Cut,
    Weight,
    model_weights,
    split_experts,
)
from step128_launcher.model.quantization import Format, Quantization

__all__ = [
    "EH_PROJ",
    "FLOAT_DTYPES",
    "HEAD_GATES",
    "KV_SCALES",
    "NORMS",
    "ROUTER",
    "VISION_OTHER",
    "ExpectedTensor",
    "expected_tensors",
    "indivisible_columns",
    "kv_scale_names",
    "plain",
    "stored_weights",
]

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """One tensor the checkpoint must hold; `component` also says whether a policy may quantize it.

    `role` is "weight", or, for the tensors that replace a quantized weight, "packed" (the values) or "scale"
    (everything else they come with). `parameters` counts the weights it stands for, 0 for a scale. `float32_in_memory`:
    vLLM converts this tensor of a quantized weight; the others stay as they are stored.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: frozenset[str]
    component: str
    parameters: int
    cut: Cut
    role: str = "weight"
    float32_in_memory: bool = False


def expected_tensors(
    config: ModelConfig, form: Format, quantization: Quantization | None, per_expert: bool = False
) -> dict[str, ExpectedTensor]:
    """Return name -> expectation for all tensors but the KV-cache scales, with the MTP layers included.

    `per_expert`: each expert has tensors of its own instead of one 3-D tensor for all.
    """
    quantized = quantization.components if quantization else frozenset()
    table: dict[str, ExpectedTensor] = {}
    for weight in stored_weights(config, form, per_expert):
        tensors = _nl4(weight, form.group_size) if weight.component in quantized else (plain(weight),)
        table.update((tensor.name, tensor) for tensor in tensors)
    return table


def stored_weights(config: ModelConfig, form: Format, per_expert: bool) -> Iterator[Weight]:
    """Yield every weight as the checkpoint divides it, with the component that `form`'s patterns give it."""
    components = form.tensor_components(config)
    for weight in model_weights(config):
        named = weight._replace(component=components.get(weight.name, weight.component))
        yield from split_experts(named) if per_expert else (named,)


def plain(weight: Weight) -> ExpectedTensor:
    """Return the tensor of an unquantized weight."""
    return ExpectedTensor(
        weight.name, weight.shape, FLOAT_DTYPES, weight.component, math.prod(weight.shape), weight.cut
    )


def _nl4(weight: Weight, group_size: int) -> tuple[ExpectedTensor, ExpectedTensor]:
    """Return packed [..., N, K/2] and scale [..., N, K/group] of a weight [..., N, K]."""
    *outer, columns = weight.shape
    packed, scales = (*outer, columns // 2), (*outer, columns // group_size)
    component, cut = weight.component, weight.cut
    return (
        ExpectedTensor(
            f"{weight.name}_packed", packed, frozenset({"U8"}), component, math.prod(weight.shape), cut, "packed"
        ),
        ExpectedTensor(f"{weight.name}_scale", scales, frozenset({"F16"}), component, 0, cut, "scale"),
    )


def indivisible_columns(config: ModelConfig, form: Format, quantization: Quantization | None) -> tuple[str, int] | None:
    """Return the first NL4 weight whose input dimension is no multiple of the group size, with that size."""
    quantized = quantization.components if quantization and quantization.method == form.name else frozenset()
    for weight in stored_weights(config, form, per_expert=False):
        if weight.component in quantized and weight.shape[-1] % form.group_size:
            return weight.name, weight.shape[-1]
    return None


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Return the names of one attention layer's K and V scale."""
    attention = f"model.layers.{layer}.self_attn"
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"

"""What a checkpoint holds, added up: components, each in parts that vLLM divides among ranks in the same way."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from step128_launcher.model.model_config import ModelConfig
from step128_launcher.model.model_weights import KV_SCALES, Cut
from step128_launcher.model.quantization import Format, Quantization
from step128_launcher.model.tensors import ExpectedTensor


@dataclass(frozen=True)
class Part:
    """The weights of a component that are stored alike (quantized or not) and divided alike among ranks.

    `parameters` counts weights, not packed bytes or scales; `stored_bytes` is the size in the shards, `packed_bytes`
    that of quantized tensors in memory (more, where vLLM converts scales to float32).
    """

    cut: Cut
    quantized: bool
    parameters: int
    stored_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Component:
    """All tensors of one component, split by whether they serve the trunk or the MTP draft.

    `stored_bytes` is their size in the shards; `parameters` counts weights, not packed bytes or scales.
    `largest_parameters` is the largest single weight. Quantized tensors stay packed in memory, vLLM converts all others
    to the serving dtype.
    """

    name: str
    draft: bool
    quantized: bool
    tensors: int
    parameters: int
    stored_bytes: int
    largest_parameters: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class KvScale:
    """The calibrated FP8 scales of one attention layer (value = stored * scale)."""

    k: float
    v: float


@dataclass(frozen=True)
class ModelFootprint:
    """What a checkpoint holds. `mtp_layers` counts the complete MTP layers that are really in it.

    `kv_scales` holds every trunk layer and either every MTP layer or none of them; None: the checkpoint has none.
    `assumed`: no shard was read; everything follows from config.json and a policy, and the values of the KV scales
    are placeholders.
    """

    path: Path
    config: ModelConfig
    quantization: Quantization | None
    shards: int
    tensors: int
    stored_bytes: int
    components: tuple[Component, ...]
    mtp_layers: int
    kv_scales: dict[int, KvScale] | None
    assumed: bool = False

    @property
    def attention_layers(self) -> range:
        """Indices of all attention layers in the checkpoint: the trunk's, then the MTP layers'."""
        return range(self.config.num_hidden_layers + self.mtp_layers)

    @property
    def unscaled_layers(self) -> tuple[int, ...]:
        """Attention layers without KV scales in a checkpoint that has them: all MTP layers, or none."""
        scales = self.kv_scales
        return () if scales is None else tuple(layer for layer in self.attention_layers if layer not in scales)


def mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """Return what the names of the MTP layers' tensors start with."""
    return tuple(f"model.layers.{layer}." for layer in config.mtp_layer_indices)


def add_up(
    config: ModelConfig, table: Mapping[str, ExpectedTensor], stored_bytes: Mapping[str, int], scales: Iterable[int]
) -> tuple[Component, ...]:
    """Add up the tensors by component, trunk and draft apart; `scales` are the layers with a K and a V scale."""
    groups: dict[tuple[str, bool], list[ExpectedTensor]] = {}
    prefixes = mtp_prefixes(config)
    for name, expected in table.items():
        groups.setdefault((expected.component, name.startswith(prefixes)), []).append(expected)
    components = []
    for (name, draft), tensors in groups.items():
        parts = _parts(tensors, stored_bytes)
        components.append(
            Component(
                name=name,
                draft=draft,
                quantized=any(part.quantized for part in parts),
                tensors=len(tensors),
                parameters=sum(part.parameters for part in parts),
                stored_bytes=sum(part.stored_bytes for part in parts),
                largest_parameters=max(tensor.parameters for tensor in tensors),
                parts=parts,
            )
        )
    # The trunk first, the draft after it, each from its largest part to its smallest.
    components.sort(key=lambda component: (component.draft, -component.stored_bytes))
    layers = list(scales)
    for draft in (False, True):
        count = 2 * sum((layer in config.mtp_layer_indices) == draft for layer in layers)
        if count:
            part = Part(Cut.WHOLE, False, count, 4 * count, 0)
            components.append(Component(KV_SCALES, draft, False, count, count, 4 * count, 1, (part,)))
    return tuple(components)


def requantized(footprint: ModelFootprint, form: Format, policy: str) -> ModelFootprint:
    """Return what the same model would hold under a policy of ours, from its sums alone: fast, for asking "what if".

    Counts of tensors stay those of `footprint`; sizes equal those of `assume_footprint`. KV scales are assumed.
    """
    quantized = frozenset(form.policies[policy])
    components = tuple(_recast(component, component.name in quantized, form) for component in footprint.components)
    scales = footprint.kv_scales or {layer: KvScale(1.0, 1.0) for layer in footprint.attention_layers}
    return replace(
        footprint,
        quantization=Quantization(form.name, policy, quantized, form.group_size),
        stored_bytes=sum(component.stored_bytes for component in components),
        components=components,
        kv_scales=scales,
        assumed=True,
    )


def _recast(component: Component, quantized: bool, form: Format) -> Component:
    """Return the component stored packed, or in two bytes a weight; the KV scales stay as they are."""
    if component.name == KV_SCALES:
        return component
    counts: dict[Cut, int] = {}
    for part in component.parts:
        counts[part.cut] = counts.get(part.cut, 0) + part.parameters
    parts = []
    for cut, count in counts.items():
        stored = int(count * form.bits_per_weight) // 8 if quantized else 2 * count
        parts.append(Part(cut, quantized, count, stored, stored if quantized else 0))
    return replace(
        component, quantized=quantized, stored_bytes=sum(part.stored_bytes for part in parts), parts=tuple(parts)
    )


def _parts(tensors: list[ExpectedTensor], stored_bytes: Mapping[str, int]) -> tuple[Part, ...]:
    sums: dict[tuple[Cut, bool], list[int]] = {}
    for tensor in tensors:
        total = sums.setdefault((tensor.cut, tensor.role != "weight"), [0, 0, 0])
        total[0] += tensor.parameters
        total[1] += stored_bytes[tensor.name]
        if tensor.role != "weight":
            total[2] += 4 * math.prod(tensor.shape) if tensor.float32_in_memory else stored_bytes[tensor.name]
    return tuple(Part(cut, quantized, *total) for (cut, quantized), total in sums.items())

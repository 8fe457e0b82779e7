"""config.json and the safetensors headers of a checkpoint -> ModelFootprint; broken checkpoints are refused by name."""

import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.errors import CheckpointError
from step128_launcher.model_config import ModelConfig, read_model_config
from step128_launcher.quantization import Format, Quantization, read_quantization
from step128_launcher.shards import StoredTensor, read_float32_scalar, read_shards
from step128_launcher.tensors import (
    KV_SCALES,
    ExpectedTensor,
    expected_tensors,
    indivisible_columns,
    kv_scale_names,
    layer_of,
)

_EXAMPLES = 3  # names shown of a list of missing or unexpected tensors


@dataclass(frozen=True)
class Component:
    """All tensors of one component, split by whether they serve the trunk or the MTP draft.

    `stored_bytes` is their size in the shards; `parameters` counts weights, not packed bytes or scales.
    `largest_parameters` is the largest single weight. For a quantized component the stored bytes stay as they are in
    memory; else vLLM converts them to the serving dtype.
    """

    name: str
    draft: bool
    quantized: bool
    tensors: int
    parameters: int
    stored_bytes: int
    largest_parameters: int


@dataclass(frozen=True)
class KvScale:
    """The calibrated FP8 scales of one attention layer (value = stored * scale)."""

    k: float
    v: float


@dataclass(frozen=True)
class ModelFootprint:
    """What a checkpoint holds. `mtp_layers` counts the complete MTP layers that are really in it.

    `kv_scales` holds every trunk layer and either every MTP layer or none of them; None: the checkpoint has none.
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

    @property
    def attention_layers(self) -> range:
        """Indices of all attention layers in the checkpoint: the trunk's, then the MTP layers'."""
        return range(self.config.num_hidden_layers + self.mtp_layers)

    @property
    def unscaled_layers(self) -> tuple[int, ...]:
        """Attention layers without KV scales in a checkpoint that has them: all MTP layers, or none."""
        scales = self.kv_scales
        return () if scales is None else tuple(layer for layer in self.attention_layers if layer not in scales)


def read_footprint(folder: Path, form: Format) -> ModelFootprint:
    """Read and check the checkpoint in `folder` without reading weights or importing torch.

    Raises:
        LauncherError: 66, if the folder or config.json does not exist.
        CheckpointError: 65, naming the file and the tensor, if anything in it contradicts config.json.

    """
    config = read_model_config(folder)
    quantization = read_quantization(folder / "config.json", config.quantization_config, form)
    uneven = indivisible_columns(config, form, quantization)
    if uneven:
        raise CheckpointError(
            f"{folder / 'config.json'}: {uneven[0]} cannot be quantized: its input dimension {uneven[1]} is no "
            f"multiple of the group size {form.group_size}."
        )
    stored, shards = read_shards(folder)
    table = expected_tensors(config, form, quantization)
    scale_names = {name for layer in range(len(config.layer_types)) for name in kv_scale_names(layer)}
    mtp_layers = _mtp_layers(config, stored)
    if mtp_layers == 0:
        table = {name: tensor for name, tensor in table.items() if not _is_mtp(config, name)}
    _check_names(folder, table, {name: tensor for name, tensor in stored.items() if name not in scale_names})
    for name, expected in table.items():
        _check_tensor(stored[name], expected)
    return ModelFootprint(
        path=folder,
        config=config,
        quantization=quantization,
        shards=shards,
        tensors=len(stored),
        stored_bytes=sum(tensor.stored_bytes for tensor in stored.values()),
        components=_components(config, table, stored, len(scale_names & stored.keys())),
        mtp_layers=mtp_layers,
        kv_scales=_kv_scales(folder, config.num_hidden_layers, mtp_layers, stored),
    )


def _is_mtp(config: ModelConfig, name: str) -> bool:
    layer = layer_of(name)
    return layer is not None and layer in config.mtp_layer_indices


def _mtp_layers(config: ModelConfig, stored: dict[str, StoredTensor]) -> int:
    """Return the MTP layers in the checkpoint: all that config.json announces, or none (a checkpoint without them)."""
    return config.num_mtp_layers if any(_is_mtp(config, name) for name in stored) else 0


def _check_names(folder: Path, table: dict[str, ExpectedTensor], stored: dict[str, StoredTensor]) -> None:
    missing = [name for name in table if name not in stored]
    unexpected = [name for name in stored if name not in table]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(table)} tensors are missing: "
            + "; ".join(_explain(name, unexpected) for name in missing[:_EXAMPLES])
            + ("; …" if len(missing) > _EXAMPLES else ".")
        )
    if unexpected:
        first = stored[unexpected[0]]
        raise CheckpointError(
            f"{folder}: {len(unexpected)} tensors that this model does not have, such as "
            + ", ".join(unexpected[:_EXAMPLES])
            + f" (in {first.file.name}).",
            "config.json and the shards disagree (layer counts, experts, quantized_components?).",
        )


def _explain(name: str, unexpected: list[str]) -> str:
    """Return the missing name with what is there instead: the unquantized or quantized form, or a similar name."""
    base = name.removesuffix("_packed").removesuffix("_scale")
    present = set(unexpected)
    if base != name and base in present:
        return f"{name} (config.json calls it quantized, the shards hold the unquantized {base})"
    if base == name and f"{name}_packed" in present:
        return f"{name} (config.json does not call it quantized, the shards hold {name}_packed)"
    close = difflib.get_close_matches(name, unexpected[:2000], n=1, cutoff=0.8)
    return f"{name} (there is {close[0]}: misnamed?)" if close else name


def _check_tensor(found: StoredTensor, expected: ExpectedTensor) -> None:
    if found.dtype not in expected.dtypes:
        raise CheckpointError(
            f"{found.file}: tensor {found.name} is stored as {found.dtype}; "
            f"it must be {' or '.join(sorted(expected.dtypes))}."
        )
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{found.file}: tensor {found.name} has the shape {list(found.shape)}; "
            f"config.json makes it {list(expected.shape)}."
        )


def _kv_scales(
    folder: Path, trunk_layers: int, mtp_layers: int, stored: dict[str, StoredTensor]
) -> dict[int, KvScale] | None:
    """Return the scales, or None if the checkpoint has none; the published one has none for its MTP layers."""
    trunk = _all_or_none(folder, "trunk", range(trunk_layers), stored)
    draft = _all_or_none(folder, "MTP", range(trunk_layers, trunk_layers + mtp_layers), stored)
    if draft and not trunk:
        raise CheckpointError(
            f"{folder}: KV-cache scales are there for the MTP layers, but none for the trunk's.",
            "Calibrate again: the trunk would be served with wrong values.",
        )
    return trunk | draft or None


def _all_or_none(folder: Path, part: str, layers: range, stored: dict[str, StoredTensor]) -> dict[int, KvScale]:
    """Return the scales of `layers`; empty if there are none."""
    names = [(layer, *kv_scale_names(layer)) for layer in layers]
    missing = [name for _, *pair in names for name in pair if name not in stored]
    if len(missing) == 2 * len(names):
        return {}
    if missing:
        raise CheckpointError(
            f"{folder}: KV-cache scales are there for some {part} layers, but {missing[0]} is missing "
            f"({len(missing)} of {2 * len(names)}).",
            "Calibrate again: a layer without scales would be served with wrong values.",
        )
    return {layer: KvScale(_scale(stored[k]), _scale(stored[v])) for layer, k, v in names}


def _scale(tensor: StoredTensor) -> float:
    if tensor.dtype != "F32" or tensor.shape != (1,):
        raise CheckpointError(
            f"{tensor.file}: KV-cache scale {tensor.name} is {tensor.dtype} {list(tensor.shape)}; it must be F32 [1]."
        )
    value = read_float32_scalar(tensor)
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{tensor.file}: KV-cache scale {tensor.name} is {value}; it must be positive.")
    return value


def _components(
    config: ModelConfig, table: dict[str, ExpectedTensor], stored: dict[str, StoredTensor], scales: int
) -> tuple[Component, ...]:
    """Add up the tensors by component, trunk and draft apart."""
    groups: dict[tuple[str, bool], list[ExpectedTensor]] = {}
    for name, expected in table.items():
        groups.setdefault((expected.component, _is_mtp(config, name)), []).append(expected)
    components = []
    for (name, draft), tensors in groups.items():
        weights = [_parameters(tensor) for tensor in tensors]
        components.append(
            Component(
                name=name,
                draft=draft,
                quantized=any(tensor.role == "packed" for tensor in tensors),
                tensors=len(tensors),
                parameters=sum(weights),
                stored_bytes=sum(stored[tensor.name].stored_bytes for tensor in tensors),
                largest_parameters=max(weights),
            )
        )
    # The trunk first, the draft after it, each from its largest part to its smallest.
    components.sort(key=lambda component: (component.draft, -component.stored_bytes))
    if scales:
        components.append(Component(KV_SCALES, False, False, scales, scales, 4 * scales, 1))
    return tuple(components)


def _parameters(tensor: ExpectedTensor) -> int:
    """Return the weights a tensor stands for: two in a packed byte, none in a scale."""
    count = math.prod(tensor.shape)
    return {"weight": count, "packed": 2 * count, "scale": 0}[tensor.role]

"""config.json and the safetensors headers of a checkpoint -> ModelFootprint; broken checkpoints are refused by name."""

import difflib
import math
from pathlib import Path

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.model.footprint import Component, KvScale, ModelFootprint, Part, add_up, mtp_prefixes
from step128_launcher.model.formats.forms import ForeignFormat, choose_tensors
from step128_launcher.model.formats.registry import read_foreign
from step128_launcher.model.kv_scales import read_kv_scales
from step128_launcher.model.model_config import ModelConfig, read_model_config
from step128_launcher.model.model_weights import PER_EXPERT_MARK
from step128_launcher.model.quantization import Format, Quantization, read_quantization
from step128_launcher.model.shards import StoredTensor, read_shards
from step128_launcher.model.tensors import (
    ExpectedTensor,
    expected_tensors,
    indivisible_columns,
    kv_scale_names,
    stored_weights,
)

__all__ = ["Component", "KvScale", "ModelFootprint", "Part", "assume_footprint", "read_footprint"]

_ASSUMED_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_EXAMPLES = 3  # names shown of a list of missing or unexpected tensors


def read_footprint(folder: Path, form: Format) -> ModelFootprint:
    """Read and check the checkpoint in `folder` without reading weights or importing torch.

    Raises:
        LauncherError: 66, if the folder or config.json does not exist.
        CheckpointError: 65, naming the file and the tensor, if anything in it contradicts config.json.

    """
    config = read_model_config(folder)
    foreign = read_foreign(folder / "config.json", config.quantization_config, form.name)
    own = None if foreign else read_quantization(folder / "config.json", config.quantization_config, form)
    _check_groups(folder, config, form, own)
    stored, shards = read_shards(folder)
    per_expert = any(PER_EXPERT_MARK in name for name in stored)
    if foreign:
        table = choose_tensors(stored_weights(config, form, per_expert), stored, form, foreign)
    else:
        table = expected_tensors(config, form, own, per_expert)
    scale_names = {name for layer in range(len(config.layer_types)) for name in kv_scale_names(layer)}
    mtp_layers = _mtp_layers(config, stored)
    if mtp_layers == 0:
        prefixes = mtp_prefixes(config)
        table = {name: tensor for name, tensor in table.items() if not name.startswith(prefixes)}
    _check_names(folder, table, {name: tensor for name, tensor in stored.items() if name not in scale_names})
    for name, expected in table.items():
        _check_tensor(stored[name], expected)
    quantization = _foreign_quantization(folder, foreign, table) if foreign else own
    kv_scales = read_kv_scales(folder, config.num_hidden_layers, mtp_layers, stored)
    sizes = {name: tensor.stored_bytes for name, tensor in stored.items()}
    return ModelFootprint(
        path=folder,
        config=config,
        quantization=quantization,
        shards=shards,
        tensors=len(stored),
        stored_bytes=sum(sizes.values()),
        components=add_up(config, table, sizes, kv_scales or ()),
        mtp_layers=mtp_layers,
        kv_scales=kv_scales,
    )


def _foreign_quantization(folder: Path, foreign: ForeignFormat, table: dict[str, ExpectedTensor]) -> Quantization:
    components = frozenset(tensor.component for tensor in table.values() if tensor.role == "packed")
    if not components:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config.quant_method is {foreign.method!r}, "
            f"but every tensor in {folder} is unquantized.",
            "config.json and the shards are from different checkpoints; fetch both again.",
        )
    return Quantization(foreign.method, foreign.label, components, foreign.group_size)


def assume_footprint(folder: Path, form: Format, policy: str | None) -> ModelFootprint:
    """Return what the checkpoint of `folder`/config.json would hold under `policy`, from config.json alone.

    Without a policy: as config.json's own quantization_config says if it is NL4, else unquantized in its dtype. With
    one, KV-cache scales are assumed for all layers, since the recipe that quantizes also calibrates them.

    Raises:
        LauncherError: 78, if `form` has no such policy; 66 and others as `read_footprint`.
        CheckpointError: 65, if config.json contradicts itself, or a policy is needed to know the sizes.

    """
    config = read_model_config(folder)
    quantization = _assumed_quantization(folder, config, form, policy)
    _check_groups(folder, config, form, quantization)
    table = expected_tensors(config, form, quantization)
    element = _ASSUMED_DTYPE_BYTES.get(config.dtype, 2)
    width = {"weight": element, "packed": 1, "scale": 2}
    sizes = {name: math.prod(tensor.shape) * width[tensor.role] for name, tensor in table.items()}
    layers = range(len(config.layer_types)) if quantization else range(0)
    return ModelFootprint(
        path=folder,
        config=config,
        quantization=quantization,
        shards=0,
        tensors=len(table) + 2 * len(layers),
        stored_bytes=sum(sizes.values()) + 2 * 4 * len(layers),
        components=add_up(config, table, sizes, layers),
        mtp_layers=config.num_mtp_layers,
        kv_scales=dict.fromkeys(layers, KvScale(1.0, 1.0)) or None,
        assumed=True,
    )


def _assumed_quantization(folder: Path, config: ModelConfig, form: Format, policy: str | None) -> Quantization | None:
    if policy is None:
        foreign = read_foreign(folder / "config.json", config.quantization_config, form.name)
        if foreign:
            raise CheckpointError(
                f"{folder / 'config.json'}: a checkpoint in {foreign.method} cannot be sized from config.json alone: "
                "it does not say which weights are quantized.",
                "Give the folder with the shards, or a policy of this project's own format.",
            )
        return read_quantization(folder / "config.json", config.quantization_config, form)
    if policy not in form.policies:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"There is no quantization policy {policy!r}; known: {', '.join(form.policies)}.",
            "The policies are in configs/quantization/nl4.yaml.",
        )
    return Quantization(form.name, policy, frozenset(form.policies[policy]), form.group_size)


def _check_groups(folder: Path, config: ModelConfig, form: Format, quantization: Quantization | None) -> None:
    uneven = indivisible_columns(config, form, quantization)
    if uneven:
        raise CheckpointError(
            f"{folder / 'config.json'}: {uneven[0]} cannot be quantized: its input dimension {uneven[1]} is no "
            f"multiple of the group size {form.group_size}."
        )


def _mtp_layers(config: ModelConfig, stored: dict[str, StoredTensor]) -> int:
    """Return the MTP layers in the checkpoint: all that config.json announces, or none (a checkpoint without them)."""
    prefixes = mtp_prefixes(config)
    return config.num_mtp_layers if any(name.startswith(prefixes) for name in stored) else 0


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

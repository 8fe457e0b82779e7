"""One decoder layer of a checkpoint as transformers' own Step-3.7 module, so that a model runs a layer at a time.

Trunk and multi-token-prediction (MTP) layers are alike here: the config is built over all of them, and an MTP layer's
decoder part has a trunk layer's names. What an MTP layer has besides is in :mod:`mtp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7RotaryEmbedding

from step128_checkpoint.calibration.weights import copy_rows, load_weight, weight_shape
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.reader import Checkpoint

__all__ = ["keep_in_place", "load_layer", "load_weight", "run_layer", "text_config"]

_PER_LAYER_LISTS = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")

# Module names that are not the checkpoint's.
_RENAMED = {
    "mlp.gate.weight": "moe.gate.weight",
    "mlp.gate.e_score_correction_bias": "moe.router_bias",
    "mlp.experts.down_proj": "moe.down_proj.weight",
    **{f"mlp.shared_experts.{part}_proj.weight": f"share_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
}
_BIAS = "e_score_correction_bias"
_GATE_UP, _ROUTER_BIAS = "mlp.experts.gate_up_proj", f"mlp.gate.{_BIAS}"


def text_config(checkpoint: Checkpoint) -> Step3p7TextConfig:
    """The language model's config for transformers, with the MTP layers counted as layers, attention by SDPA.

    Raises:
        CheckpointError: transformers refuses config.json; its reason is in the message.
    """
    values = {key: value for key, value in checkpoint.text_config.items() if key != "model_type"}
    mtp_layers = values.pop("num_nextn_predict_layers", 0)
    total = checkpoint.num_hidden_layers + (mtp_layers if isinstance(mtp_layers, int) else 0)
    values["num_hidden_layers"] = total
    for key in _PER_LAYER_LISTS:
        if isinstance(values.get(key), list):
            values[key] = values[key][:total]
    try:
        config = Step3p7TextConfig(**values)
    except Exception as error:  # transformers has no one type for it: ValueError, TypeError, its validation errors
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: transformers cannot read text_config: {error}"
        ) from error
    config._attn_implementation = "sdpa"
    return config


def load_layer(
    checkpoint: Checkpoint,
    config: Step3p7TextConfig,
    number: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Step3p7DecoderLayer:
    """Read one layer; the checkpoint's files are open.

    The router's bias stays float32 (it decides between experts whose scores differ by little), all else is ``dtype``.
    Peak memory is the layer and one slice of a weight.

    Args:
        checkpoint: plain or NL4.
        config: from :func:`text_config`.
        number: of the trunk or, numbered after it, an MTP layer.
        dtype: of the weights and the computation.
        device: where the layer will run.

    Raises:
        CheckpointError: a weight is missing or of a shape that config.json does not make.
    """
    with torch.device("meta"):
        layer = Step3p7DecoderLayer(config, number)
    layer.load_state_dict(
        {
            name: _load(checkpoint, f"model.layers.{number}.", name, meta, dtype, device)
            for name, meta in layer.state_dict().items()
        },
        assign=True,
    )
    layer.rotary_emb = Step3p7RotaryEmbedding(config).to(device)
    return layer.eval().requires_grad_(False)


def keep_in_place(layer: Step3p7DecoderLayer, kept: Sequence[int]) -> None:
    """Drop a MoE layer's experts but ``kept`` (ascending), with their router rows and bias, in the same memory."""
    owners = {layer.mlp.experts: ("gate_up_proj", "down_proj"), layer.mlp.gate: ("weight", _BIAS)}
    for module, names in owners.items():
        for name in names:
            tensor = getattr(module, name).detach()
            for row, expert in enumerate(kept):
                tensor[row] = tensor[expert]  # never overwrites one that is still wanted: row <= expert
            part = tensor[: len(kept)]
            setattr(module, name, part if name == _BIAS else torch.nn.Parameter(part, requires_grad=False))
        module.num_experts = len(kept)


def run_layer(layer: Step3p7DecoderLayer, number: int, hidden: Tensor, cache: Any = None) -> Tensor:
    """Run a layer over whole sequences, as transformers does when nothing is cached.

    Sequences of unequal length are padded on the right, with anything finite, and need no padding mask: attention is
    causal, so a real token sees only what stands before it, which is real, and all else in a layer works on tokens one
    by one. The padded positions' results mean nothing; the caller drops them.

    Args:
        layer: from :func:`load_layer`.
        number: the layer's.
        hidden: ``[B, T, H]`` of the layer's dtype and device.
        cache: has ``update(k, v, layer_number) -> (k, v)``; k and v are ``[B, KV heads, T, head_dim]``, k after norm
            and RoPE, as a KV cache stores them. What it returns takes part in attention.

    Returns:
        ``[B, T, H]``: the next layer's input.
    """
    config, kind = layer.self_attn.config, layer.attention_type
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    make_mask = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
    mask = make_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
    )
    with torch.no_grad():
        output: Tensor = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=layer.rotary_emb(hidden, positions, kind),
            past_key_values=cache,
        )
    return output


def _load(
    checkpoint: Checkpoint, prefix: str, name: str, meta: Tensor, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """One parameter or buffer of the module, by the module's name for it; ``meta`` has its shape."""
    sources = [prefix + _RENAMED.get(name, name)]
    if name == _GATE_UP:
        sources = [f"{prefix}moe.{part}_proj.weight" for part in ("gate", "up")]
    needed = list(meta.shape)
    if name == _GATE_UP:
        needed[1] //= 2
    for source in sources:
        _check_shape(checkpoint, source, needed)
    if name == _ROUTER_BIAS:
        return load_weight(checkpoint, sources[0], torch.float32, device)
    target = torch.empty(meta.shape, dtype=dtype, device=device)
    if len(sources) == 1:
        copy_rows(checkpoint, sources[0], target)
        return target
    for expert in range(meta.shape[0]):
        for source, part in zip(sources, target[expert].chunk(len(sources)), strict=True):
            copy_rows(checkpoint, source, part, expert * part.shape[:-1].numel())
    return target


def _check_shape(checkpoint: Checkpoint, source: str, needed: list[int]) -> None:
    shape = list(weight_shape(checkpoint, source))
    if shape != needed:
        raise CheckpointError(f"{checkpoint.folder}: weight {source} has shape {shape}; config.json makes it {needed}")

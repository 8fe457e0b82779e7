"""Step-3.7's multi-token-prediction (MTP) drafter for vLLM: loads what 0.32 cannot.

vLLM's ``Step3p5MTP.load_weights`` stops at KV-cache scales (KeyError) and at a quantized token embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.models import step3p5_mtp

from step128_kernels.torch_codebook import dequantize
from step128_kernels.vllm_plugin.names import KV_SCALE_NAME
from step128_kernels.vllm_plugin.strict import check_tensors, recorded

_EMBEDDING = "model.embed_tokens.weight"


class Step3p5MTP(step3p5_mtp.Step3p5MTP):
    """vLLM's drafter; KV-cache scales go straight to the attention layers."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load ``(hub tensor name, tensor)`` pairs; returns the names of the parameters loaded.

        Raises:
            CheckpointMismatchError: a tensor is missing, unknown, or of a wrong dtype.
        """
        dtypes: dict[str, str] = {}
        loaded_scales: set[str] = set()
        loaded: set[str] = super().load_weights(self._plain_weights(recorded(weights, dtypes), loaded_scales))
        check_tensors(self, True, dtypes, "the checkpoint")
        return loaded | loaded_scales

    def _plain_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], loaded_scales: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the KV-cache scales, expand a quantized embedding, pass everything else on."""
        embedding: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            scale = KV_SCALE_NAME.match(name)
            if scale:
                if scale["layer"] in self.model.layers:
                    loaded_scales.add(self._load_kv_scale(scale["layer"], f"{scale['which']}_scale", tensor))
            elif name.startswith(f"{_EMBEDDING}_"):
                embedding[name.removeprefix(f"{_EMBEDDING}_")] = tensor
            else:
                yield name, tensor
        if embedding:
            # vLLM puts the target's embedding in this one's place right after loading; only its loader needs it.
            dtype = self.model.embed_tokens.weight.dtype
            yield _EMBEDDING, dequantize(embedding["packed"], embedding["scale"], dtype)

    def _load_kv_scale(self, layer: str, name: str, tensor: torch.Tensor) -> str:
        attention = self.model.layers[layer].mtp_block.self_attn.attn
        parameter = getattr(attention, name, None)
        if parameter is not None:  # absent without a quantization config: vLLM then knows no scales at all
            parameter.weight_loader(parameter, tensor)
        return f"model.layers.{layer}.mtp_block.self_attn.attn.{name}"

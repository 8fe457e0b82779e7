"""Step-3.7 for vLLM: its own class, plus what 0.32 lacks.

The class keeps vLLM's name because vLLM's speculative decoding finds the image token by class name.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import step3p7
from vllm.model_executor.models.utils import maybe_prefix

from step128_kernels.vllm_plugin.quantization import NL4Config
from step128_kernels.vllm_plugin.strict import check_tensors, recorded, refuse_pipeline_parallelism


class Step3p7ForConditionalGeneration(step3p7.Step3p7ForConditionalGeneration):
    """vLLM's class with a quantizable token embedding and a CPU-safe vision projector."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse_pipeline_parallelism(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        quant_config = vllm_config.quant_config
        if isinstance(quant_config, NL4Config) and "embed_tokens" in quant_config.quantized_components:
            # vLLM builds the embedding without the quantization config, so it is built again with it.
            text_config = vllm_config.model_config.hf_config.text_config
            self.language_model.model.embed_tokens = VocabParallelEmbedding(
                text_config.vocab_size,
                text_config.hidden_size,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "language_model.model.embed_tokens"),
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load ``(hub tensor name, tensor)`` pairs; returns the names of the parameters loaded.

        Raises:
            CheckpointMismatchError: a tensor is missing, unknown, or of a wrong dtype.
        """
        dtypes: dict[str, str] = {}
        loaded: set[str] = super().load_weights(recorded(weights, dtypes))
        check_tensors(self, False, dtypes, "the checkpoint")
        return loaded

    def _process_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        # The tower returns a transposed view, on which the CPU's matrix product (oneDNN) stops the engine.
        return super()._process_image_features(image_features.contiguous())  # type: ignore[no-any-return]

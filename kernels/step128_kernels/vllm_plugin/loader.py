"""The ``step128`` load format: vLLM's loader, with every tensor name and dtype checked first, and a report after.

Because the launcher always asks for this format, a server whose plugin did not load cannot start.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from step128_kernels.vllm_plugin import LOAD_FORMAT, load_report
from step128_kernels.vllm_plugin.strict import check_tensors

_ROLES = {"Step3p7ForConditionalGeneration": "target", "Step3p5MTP": "draft"}


@register_model_loader(LOAD_FORMAT)
class Step128ModelLoader(DefaultModelLoader):
    """vLLM's safetensors loader, strict."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))
        self.enable_weights_track = True  # vLLM then refuses a parameter that nothing was loaded into

    def load_model(self, vllm_config: VllmConfig, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """Load, then write the load report."""
        start = time.monotonic()
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        role = _ROLES.get(type(model).__name__, "target")
        load_report.write(load_report.build(model, vllm_config, role, time.monotonic() - start))
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Check the checkpoint's names and dtypes against the model's parameters, then load.

        Raises:
            CheckpointMismatchError: a tensor is missing, unknown, or of a wrong dtype.
        """
        role = _ROLES.get(type(model).__name__)
        if role is not None:
            check_tensors(model, role == "draft", self._tensor_dtypes(model_config), str(model_config.model))
        super().load_weights(model, model_config)

    def _tensor_dtypes(self, model_config: Any) -> dict[str, str]:
        """Name and safetensors dtype of every tensor, from the shards' headers."""
        _, files, _, _ = self._prepare_weights(model_config.model, None, model_config.revision, False, None)
        dtypes: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                    dtypes[name] = shard.get_slice(name).get_dtype()
        return dtypes

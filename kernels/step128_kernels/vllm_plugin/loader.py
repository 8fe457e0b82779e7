"""The ``step128`` load format: vLLM's loader, with every tensor name and dtype checked first, and a report after.

Because the launcher always asks for this format, a server whose plugin did not load cannot start.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from step128_kernels.vllm_plugin import LOAD_FORMAT, load_report
from step128_kernels.vllm_plugin.names import checkpoint_names, describe_mismatch

logger = init_logger(f"vllm.{__name__}")

_STEP_CLASSES = ("Step3p7ForConditionalGeneration", "Step3p5MTP")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_FLOAT_DTYPES = frozenset({"F16", "BF16", "F32"})


class CheckpointMismatchError(ValueError):
    """The checkpoint does not hold what the model needs; the message starts with ``step128:`` for the launcher."""


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
        role = "draft" if type(model).__name__ == "Step3p5MTP" else "target"
        load_report.write(load_report.build(model, vllm_config, role, time.monotonic() - start))
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Check the checkpoint's names and dtypes against the model's parameters, then load.

        Raises:
            CheckpointMismatchError: a tensor is missing, unknown, or of the wrong dtype.
        """
        if type(model).__name__ in _STEP_CLASSES:
            self._check_tensors(model, model_config)
        super().load_weights(model, model_config)

    def _check_tensors(self, model: torch.nn.Module, model_config: Any) -> None:
        needed = {name for parameter, _ in model.named_parameters() for name in checkpoint_names(parameter)}
        if type(model).__name__ == "Step3p5MTP":
            # The drafter shares the target's embedding, in whatever form the target has it.
            needed = {name for name in needed if _LAYER.match(name)}
        parts = {_part(name) for name in needed}
        present = {name: dtype for name, dtype in self._tensor_dtypes(model_config).items() if _part(name) in parts}
        problem = describe_mismatch(needed, present)
        if problem is None:
            problem = _wrong_dtype(present)
        if problem is not None:
            raise CheckpointMismatchError(f"step128: {model_config.model}: {problem}")

    def _tensor_dtypes(self, model_config: Any) -> dict[str, str]:
        """Name and safetensors dtype of every tensor, from the shards' headers."""
        _, files, _, _ = self._prepare_weights(model_config.model, None, model_config.revision, False, None)
        dtypes: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                    dtypes[name] = shard.get_slice(name).get_dtype()
        return dtypes


def _part(name: str) -> str:
    """Part of the model a tensor belongs to: a decoder layer, the vision tower, or the rest."""
    layer = _LAYER.match(name)
    if layer:
        return f"layer {layer[1]}"
    return "vision" if name.startswith(("vision_model.", "vit_large_projector.")) else "rest"


def _wrong_dtype(present: dict[str, str]) -> str | None:
    """One sentence about the first tensor whose dtype cannot be right, or None."""
    for name, dtype in sorted(present.items()):
        wanted = {"_packed": frozenset({"U8"}), "weight_scale": frozenset({"F16"})}
        allowed = next((value for suffix, value in wanted.items() if name.endswith(suffix)), _FLOAT_DTYPES)
        if dtype not in allowed:
            return f"tensor {name} is {dtype}, it must be {' or '.join(sorted(allowed))}"
    return None

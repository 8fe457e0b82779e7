"""Out-of-tree vLLM plugin (entry point group ``vllm.general_plugins``); no file of vLLM is edited or copied.

vLLM calls :func:`register` in the API server, the engine core and every worker, possibly more than once. It only
fills vLLM's own registries, imports no model code and touches no device.
"""

from __future__ import annotations

LOAD_FORMAT = "step128"
QUANT_METHOD = "nl4"

_MODEL_CLASSES = {
    "Step3p7ForConditionalGeneration": "step128_kernels.vllm_plugin.models:Step3p7ForConditionalGeneration",
    "Step3p5MTP": "step128_kernels.vllm_plugin.mtp:Step3p5MTP",
}


def register() -> None:
    """Register the ``nl4`` quantization, the ``step128`` load format, the attention backend, the Step-3.7 classes and
    the config class.
    """

    from vllm import ModelRegistry

    # Importing these two registers: their decorators fill vLLM's registries, once a process.
    from step128_kernels.vllm_plugin import attention, hf_config, loader, quantization  # noqa: F401

    attention.register()
    hf_config.register()
    for architecture, location in _MODEL_CLASSES.items():
        ModelRegistry.register_model(architecture, location)
    _register_cpu_experts()


def _register_cpu_experts() -> None:
    """On a CPU, give unquantized Step-3.7 experts a path: vLLM 0.32 has none for its router and clamp."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from step128_kernels.vllm_plugin import cpu_experts

        cpu_experts.register()

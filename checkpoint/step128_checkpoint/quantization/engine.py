"""Which code quantizes a block of rows: numba's where it is installed, numpy's reference, or torch on a GPU.

All make the same bytes. numba and torch are imported when first needed: starting a command stays quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from step128_checkpoint.dtypes import Float32Array
from step128_checkpoint.quantization import search
from step128_checkpoint.quantization.quality import ErrorSums
from step128_kernels import codebook
from step128_kernels.codebook import Float16Array, Uint8Array

_GPU_DEVICES = (Path("/dev/kfd"), Path("/dev/nvidiactl"))


def device_name(wanted: str) -> str:
    """``cpu``, or torch's name of a GPU; ``auto`` looks for torch only if the machine has a GPU.

    Raises:
        ConfigurationError: the wanted device cannot be used.
    """
    has_gpu = any(path.exists() for path in _GPU_DEVICES)
    if wanted == "cpu" or (wanted == "auto" and not (has_gpu and find_spec("torch"))):
        return "cpu"
    from step128_checkpoint.devices import find_device

    return str(find_device(wanted))


def load(feedback: bool) -> None:
    """Import what the method needs now, so that its memory counts as used when the rest is divided."""
    if search.available():
        import_module("step128_checkpoint.quantization.search_compiled")
    if feedback:
        import_module("step128_checkpoint.quantization.gptq")


def quantize(
    weight: Float32Array, importance: Float32Array | None, scale_search: codebook.ScaleSearch, device: str
) -> tuple[Uint8Array, Float16Array]:
    """As :func:`step128_kernels.codebook.quantize`, on the fastest engine: float32 [rows, K], importance [K]."""
    if device != "cpu":
        from step128_checkpoint.quantization import search_torch

        return search_torch.quantize_array(weight, importance, scale_search, device)
    if search.available():
        return search.quantize(weight, importance, scale_search)
    return codebook.quantize(weight, importance, scale_search)


def quantize_with_feedback(
    weight: Float32Array, factor: Float32Array, importance: Float32Array | None
) -> tuple[Uint8Array, Float16Array]:
    """GPTQ: see :mod:`step128_checkpoint.quantization.gptq`."""
    from step128_checkpoint.quantization import gptq

    return gptq.quantize(weight, factor, importance)


def error_sums(
    weight: Float32Array, packed: Uint8Array, scale: Float16Array, importance: Float32Array | None
) -> ErrorSums:
    """Squares of a block's weights and errors: see :mod:`step128_checkpoint.quantization.quality`."""
    from step128_checkpoint.quantization import quality

    return quality.error_sums(weight, packed, scale, importance)

"""Which module knows a kernel's candidates: ours for our kernels, the plugin, which may import vLLM, for vLLM's."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import cast

from step128_kernels.launch import KernelCase
from step128_kernels.offline.inspect import Report
from step128_kernels.tune.search import Shape, Space
from step128_kernels.tuned.names import VLLM_FUSED_MOE

_OURS = "step128_kernels.cases"
_ATTENTION = "step128_kernels.attention.cases"
_INSPECT = "step128_kernels.offline.inspect"
_VLLMS = "step128_kernels.vllm_plugin.fused_moe_tuning"


def space_of(kernel: str) -> Space:
    """Return the module with the candidates of a kernel; it loads torch and Triton, or vLLM."""
    if kernel.startswith("attention_"):
        return cast(Space, import_module(_ATTENTION))
    return cast(Space, import_module(_VLLMS if kernel == VLLM_FUSED_MOE else _OURS))


def inspector_of(kernel: str) -> Callable[[KernelCase], Report]:
    """Return what compiles and counts a case of a kernel."""
    module = _VLLMS if kernel == VLLM_FUSED_MOE else _INSPECT
    return cast(Callable[[KernelCase], Report], import_module(module).inspect_case)


def shipped_shapes() -> Mapping[str, Sequence[Shape]]:
    """Return the shapes that we ship configurations for, by kernel; vLLM's kernel is among them if vLLM is here."""
    shapes = dict(space_of("").SHAPES) | dict(import_module(_ATTENTION).SHAPES)
    if find_spec("vllm") is not None:
        shapes |= space_of(VLLM_FUSED_MOE).SHAPES
    return shapes

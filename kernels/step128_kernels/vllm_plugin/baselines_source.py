"""vLLM's Triton kernels and the code that launches them, wherever vLLM runs and whatever GPU is asked about.

A vLLM without a GPU switches Triton off: its kernels are then plain functions that no compiler takes, and its launch
code asks the platform it is on. Both are taken here as they are, and given other globals: a new function of the same
code object, whose ``tl`` is Triton's, whose platform is the one asked about and whose kernel may be one that only
writes down what it would be launched with. Nothing of vLLM's, of Triton's or of the process is changed, so this may
happen beside anything else that vLLM does, before or after.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from step128_kernels.launch import Launch, Pointer

_ELEMENTS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Platform:
    """What vLLM's launch code asks of a platform. ``arch`` is empty for a GPU that is not AMD's."""

    arch: str

    def is_rocm(self) -> bool:
        """Whether it is AMD's."""
        return bool(self.arch)

    def is_cuda(self) -> bool:
        """False also on an NVIDIA GPU: asked only to prefer CUDA C++ kernels, which are not the ones compared here."""
        return False


def relinked(function: Any, platform: Platform, **replaced: Any) -> Any:
    """The same function with other globals: ``platform``, Triton, and those named.

    ``from vllm.platforms.rocm import on_gfx1x`` inside it finds the platform asked about too; that module itself can
    only be imported where torch is AMD's.
    """
    families = answers("on_", platform.arch)

    def importing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "vllm.platforms.rocm":
            return SimpleNamespace(**families)
        return builtins.__import__(name, *arguments, **keywords)

    own = dict(vars(builtins)) | {"__import__": importing}
    linked = {"triton": triton, "tl": tl, "current_platform": platform, "__builtins__": own}
    return _copied(function, linked | replaced)


def answers(prefix: str, arch: str) -> dict[str, Callable[[], bool]]:
    """vLLM's functions ``on_gfx12x`` and so on (``vllm/platforms/rocm.py``), as far as its W4A16 kernels ask them.

    Args:
        prefix: of the names, such as "on_".
        arch: the architecture that they answer for.
    """
    rdna = arch.startswith(("gfx11", "gfx12")) and arch != "gfx1250"
    found = {"gfx1x": rdna, "gfx12x": rdna and arch.startswith("gfx12"), "gfx1151": arch == "gfx1151"}
    return {prefix + name: partial(bool, held) for name, held in found.items()}


@cache
def as_triton(kernel: Any) -> Any:
    """A kernel of vLLM as Triton's compiler (or interpreter) takes it: itself where vLLM has Triton, else made anew.

    Args:
        kernel: a function that vLLM decorated with ``triton.jit``.
    """
    if not isinstance(kernel, FunctionType):
        return kernel
    linked: dict[str, Any] = {"triton": triton, "tl": tl}
    for name in kernel.__code__.co_names:
        helper = kernel.__globals__.get(name)
        if isinstance(helper, FunctionType):
            linked[name] = as_triton(helper)
    return triton.jit(_copied(kernel, linked))


def _copied(function: FunctionType, linked: Mapping[str, Any]) -> FunctionType:
    """A function of the same code whose globals, and the marks of compile-time arguments, are the given ones."""
    copy = FunctionType(
        function.__code__, {**function.__globals__, **linked}, function.__name__, function.__defaults__, None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    # A vLLM without Triton marks them with a stand-in of its own.
    stand_in = getattr(function.__globals__.get("tl"), "constexpr", None)
    copy.__annotations__ = {
        name: tl.constexpr if stand_in is not None and mark is stand_in else mark
        for name, mark in function.__annotations__.items()
    }
    return copy


class Recorder:
    """Stands in the place of a kernel and writes down the launch, which then does not happen."""

    def __init__(self, name: str, kernel: Any, loads: Mapping[str, int | tuple[int, ...]] | None = None) -> None:
        self.launches: list[Launch] = []
        self._name, self._kernel, self._loads = name, kernel, dict(loads or {})

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **keywords: self.launches.append(self._launch(grid, arguments, keywords))

    def _launch(self, grid: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
        parameters = inspect.signature(self._kernel.fn).parameters
        options = {name: keywords.pop(name, default) for name, default in _default_options().items()}
        left_out = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
        given = left_out | dict(zip(parameters, arguments, strict=False)) | keywords
        compile_time = {name for name, one in parameters.items() if "constexpr" in str(one.annotation)}
        tensors = {name: one for name, one in given.items() if isinstance(one, torch.Tensor)}
        constants = {name: one for name, one in given.items() if one is None or name in compile_time}
        sizes = grid(given) if callable(grid) else grid
        return Launch(
            name=self._name,
            function=self._kernel,
            pointers={
                name: Pointer(_ELEMENTS[one.dtype], one.numel() * one.element_size()) for name, one in tensors.items()
            },
            scalars={
                name: one if isinstance(one, float) else int(one)
                for name, one in given.items()
                if name not in {*tensors, *constants}
            },
            constants={name: int(one) if isinstance(one, IntEnum) else one for name, one in constants.items()},
            grid=(*sizes, 1, 1)[:3],
            loads=self._loads,
            **options,
        )


def _default_options() -> dict[str, int]:
    """What Triton's AMD backend takes where the launch names nothing."""
    from triton.backends.amd.compiler import HIPOptions

    return {"num_warps": int(HIPOptions.num_warps), "num_stages": int(HIPOptions.num_stages), "waves_per_eu": 0}

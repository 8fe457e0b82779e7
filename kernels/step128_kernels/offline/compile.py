"""A launch compiled to AMD machine code, exactly as Triton's just-in-time compiler would do it on that GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from step128_kernels.errors import CompilationError, ToolEnvironmentError
from step128_kernels.launch import Launch, Pointer

WAVE_LANES = 32
_TORCH_NAMES = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp64": "float64",
    "fp8e4nv": "float8_e4m3fn",
    "fp8e5": "float8_e5m2",
    "i1": "bool",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
}


@dataclass(frozen=True)
class Specialization:
    """What Triton makes of a launch's arguments before it compiles; two launches with equal ones share the code."""

    signature: dict[str, str]
    """Triton type by argument, in order; an integer equal to 1 has become "constexpr", as the declared ones."""
    constants: dict[tuple[int, ...], Any]
    """Value of each constexpr, by the argument's position."""
    attributes: dict[tuple[int, ...], list[list[Any]]]
    """``tt.divisibility`` and ``tt.pointer_range``, by the argument's position."""
    options: Any
    """The backend's options."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel."""

    arch: str
    assembly: str
    """AMD assembly text, the code object's metadata included."""
    hsaco: bytes
    lds_bytes: int
    """Shared memory of a work-group."""
    arguments: tuple[str, ...]
    """Names of the run-time arguments, in the order of the kernel argument segment."""


class _Tensor:
    """Stands for a tensor in Triton's specialization: aligned to 16 bytes, as every torch allocation is."""

    def __init__(self, pointer: Pointer) -> None:
        import torch

        if pointer.dtype not in _TORCH_NAMES:
            raise CompilationError(f"element type {pointer.dtype!r} is unknown; known: {', '.join(_TORCH_NAMES)}")
        self.dtype = getattr(torch, _TORCH_NAMES[pointer.dtype])
        self._size_bytes = pointer.size_bytes

    @staticmethod
    def data_ptr() -> int:
        return 0

    def ptr_range(self) -> int:
        return self._size_bytes


def require_triton() -> None:
    """Check that kernels can be compiled here.

    Raises:
        ToolEnvironmentError: Triton or torch is missing, or the interpreter is switched on.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"):
        raise ToolEnvironmentError("TRITON_INTERPRET is set, so Triton does not compile. Unset it and run this again.")
    try:
        import torch  # noqa: F401
        import triton
    except ModuleNotFoundError as error:
        raise ToolEnvironmentError(
            f"compiling kernels needs the package {error.name}. "
            "Install torch and Triton without a GPU: pip install 'step128[cpu]' triton==3.9.0"
        ) from error
    from triton.backends import backends

    if "amd" not in backends:
        raise ToolEnvironmentError(
            f"this Triton ({triton.__version__}) has no AMD backend. Install a complete one: pip install triton==3.9.0"
        )


@cache
def _backend(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("hip", arch, WAVE_LANES))


def specialize(launch: Launch, arch: str) -> Specialization:
    """Specialize a launch's arguments with Triton's own code, which needs the target but no driver.

    Raises:
        CompilationError: the launch does not name exactly the function's arguments.
        ToolEnvironmentError: the kernel was imported for the interpreter.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction, create_function_from_signature

    function = launch.function
    if not isinstance(function, JITFunction):
        raise ToolEnvironmentError(
            f"the kernel of launch {launch.name} is a {type(function).__name__}, not a JITFunction: "
            "was it imported while TRITON_INTERPRET was set?"
        )
    given = [*launch.pointers, *launch.scalars, *launch.constants]
    wanted = [parameter.name for parameter in function.params]
    if sorted(given) != sorted(wanted):
        missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        raise CompilationError(f"launch {launch.name}: arguments missing {missing}, unknown {extra}, or given twice")
    backend = _backend(arch)
    binder = create_function_from_signature(function.signature, function.params, backend)
    tensors = {name: _Tensor(pointer) for name, pointer in launch.pointers.items()}
    bound, specialization, keywords = binder(
        **tensors,
        **launch.scalars,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        waves_per_eu=launch.waves_per_eu,
        # Triton's default of this release, spelled out because leaving it out prints a warning in every process.
        enable_fp_fusion=knobs.language.default_fp_fusion,
    )
    options, signature, constants, attributes = function._pack_args(backend, keywords, bound, specialization, None)
    return Specialization(signature, constants, attributes, options)


def compile_key(launch: Launch, arch: str) -> str:
    """Say which compiled code a launch runs: equal keys, equal code."""
    found = specialize(launch, arch)
    return f"{launch.function.cache_key} {found.signature} {found.constants} {found.attributes} {found.options}"


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one launch for ``arch``, through Triton's own cache.

    Raises:
        ToolEnvironmentError: Triton is missing or interprets.
        CompilationError: the arguments do not fit, or Triton refuses the kernel.
    """
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    found = specialize(launch, arch)
    language = GluonASTSource if launch.function.is_gluon() else ASTSource
    source = language(launch.function, found.signature, found.constants, found.attributes)
    try:
        kernel = triton.compile(source, target=GPUTarget("hip", arch, WAVE_LANES), options=dict(found.options.__dict__))
    except Exception as error:  # Triton and LLVM raise a dozen types; each means the same to the reader
        raise CompilationError(f"{launch.name} does not compile for {arch}: {error}") from error
    arguments = tuple(name for name, kind in found.signature.items() if kind != "constexpr")
    return Compiled(
        arch=arch,
        assembly=kernel.asm["amdgcn"],
        hsaco=kernel.asm["hsaco"],
        lds_bytes=int(kernel.metadata.shared),
        arguments=arguments,
    )

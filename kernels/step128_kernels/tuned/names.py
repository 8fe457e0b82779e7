"""Names of the files of `configs/tuned`, in vLLM's grammar, and the ways in which one GPU's name is spelled."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

SUPPORTED_ARCHS = ("gfx1201", "gfx1151")

# The first spelling of each is what vLLM 0.32 derives from the PCI id (platforms/rocm.py) and what we write; the
# second is the product's name as drivers report it, and the one of files that older versions of vLLM ship.
_SPELLINGS = (
    ("AMD_Radeon_R9700", "AMD_Radeon_AI_PRO_R9700"),
    ("AMD_Radeon_8060S", "Radeon_8060S_Graphics"),
)
DEVICE_OF_ARCH = {"gfx1201": "AMD_Radeon_R9700", "gfx1151": "AMD_Radeon_8060S"}
"""The GPU that `tune` writes for where none is named."""


@dataclass(frozen=True)
class _Grammar:
    """What a kernel's file names hold: dimensions of the shape in order, then the device, then perhaps the dtype."""

    dimensions: tuple[str, ...]
    dtype: str | None


VLLM_FUSED_MOE = "vllm_fused_moe"
"""vLLM's own kernel for unquantized experts, whose files vLLM itself reads."""

_GRAMMARS = {
    "nl4_gemm": _Grammar(("N", "K"), "nl4"),
    "nl4_moe": _Grammar(("E", "N"), "nl4"),
    "attention_fp8": _Grammar(("Hq", "Hkv", "D", "W", "C"), "fp8"),
    "attention_bf16": _Grammar(("Hq", "Hkv", "D", "W", "C"), "bf16"),
    VLLM_FUSED_MOE: _Grammar(("E", "N"), None),
}


def file_name(kernel: str, shape: Mapping[str, int], device_name: str) -> str:
    """Return the name in vLLM's grammar: `E=240,N=320,device_name=AMD_Radeon_R9700,dtype=nl4.json` for `nl4_moe`.

    As vLLM counts them: E is the number of experts on this rank, N of experts their intermediate size on this rank. Of
    attention: query heads and KV heads on this rank, head size, window (0: none) and context.

    Raises:
        ValueError: for a kernel without a grammar, or a shape without a dimension that the name holds.

    """
    grammar = _grammar(kernel)
    missing = [name for name in grammar.dimensions if name not in shape]
    if missing:
        raise ValueError(f"A shape of {kernel} needs {' and '.join(missing)}; it is {format_shape(shape)!r}.")
    dimensions = ",".join(f"{name}={shape[name]}" for name in grammar.dimensions)
    return f"{dimensions},device_name={normalized(device_name)}{_dtype_part(grammar)}.json"


def parse_file_name(kernel: str, name: str) -> tuple[dict[str, int], str] | None:
    """Return dimensions and device of a file name of that kernel; None if it is a name of something else."""
    grammar = _grammar(kernel)
    dimensions = ",".join(rf"{dimension}=(\d+)" for dimension in grammar.dimensions)
    match = re.fullmatch(rf"{dimensions},device_name=([^,]+){re.escape(_dtype_part(grammar))}\.json", name)
    if match is None:
        return None
    *sizes, device = match.groups()
    return dict(zip(grammar.dimensions, map(int, sizes), strict=True)), device


def normalized(device_name: str) -> str:
    """Return a GPU's name as vLLM puts it into file names: white space and slashes become underscores."""
    return re.sub(r"[\s/]+", "_", device_name.strip())


def spellings(device_name: str) -> tuple[str, ...]:
    """Return all spellings of a GPU's name, the one that vLLM uses first; one not known to us has one spelling."""
    name = normalized(device_name)
    return next((known for known in _SPELLINGS if name in known), (name,))


def format_shape(shape: Mapping[str, int]) -> str:
    """Return a shape as `tune --shape` takes it: `N=2560,K=4096`."""
    return ",".join(f"{name}={size}" for name, size in shape.items())


def tune_command(kernel: str, shape: Mapping[str, int], device_name: str, arch: str) -> str:
    """Return the command that makes the file of this kernel, shape and GPU, wherever it is run.

    It measures on a GPU of that arch, and models without one. The GPU is named only if `tune` would not choose it.
    """
    command = f"step128-kernels tune --kernel {kernel} --shape {format_shape(shape)} --arch {arch}"
    device = spellings(device_name)[0]
    return command if device == DEVICE_OF_ARCH[arch] else f"{command} --device-name {shlex.quote(device)}"


def _grammar(kernel: str) -> _Grammar:
    if kernel not in _GRAMMARS:
        raise ValueError(f"No kernel {kernel!r} has tuned configurations; known are {', '.join(_GRAMMARS)}.")
    return _GRAMMARS[kernel]


def expanded(kernels: list[str]) -> list[str]:
    """Kernel names as given, with "attention" for the kernels of every KV-cache dtype."""
    attention = [name for name in _GRAMMARS if name.startswith("attention_")]
    return [one for name in kernels for one in (attention if name == "attention" else [name])]


def _dtype_part(grammar: _Grammar) -> str:
    return f",dtype={grammar.dtype}" if grammar.dtype else ""

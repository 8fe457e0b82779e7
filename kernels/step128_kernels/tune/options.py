"""From the command line of `tune` and this machine to what is to be tuned, and how."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from step128_kernels.codebook import GROUP_SIZE
from step128_kernels.command_options import check_kernels
from step128_kernels.errors import KernelToolError
from step128_kernels.gpu import Gpu
from step128_kernels.tune.search import Shape, Target
from step128_kernels.tuned.load import CONFIGS_DIR_VARIABLE, TUNED_DIR_VARIABLE, shipped_folder
from step128_kernels.tuned.names import DEVICE_OF_ARCH, SUPPORTED_ARCHS, expanded, spellings

# Dimensions that some weight is summed over: whole groups of weights share a scale along them.
_GROUPED = {"nl4_gemm": ("K",), "nl4_moe": ("K", "N")}


class UsageError(KernelToolError):
    """Options that do not go together."""

    exit_code = 2


class UnsupportedGpuError(KernelToolError):
    """A GPU that nothing is tuned for."""

    exit_code = 4


class NoOutputError(KernelToolError):
    """Nowhere to write to."""

    exit_code = 73


@dataclass(frozen=True)
class Plan:
    """What to tune; `gpu` is the one to measure on, None to rank by the cost model."""

    targets: tuple[Target, ...]
    gpu: Gpu | None


def plan(options: argparse.Namespace, shapes: Mapping[str, Sequence[Shape]], gpu: Gpu | None) -> Plan:
    """Decide what to tune: a supported GPU is measured on, unless --arch names another one.

    Raises:
        NoSuchKernelError: for an unknown kernel, whatever the GPU.
        UnsupportedGpuError: for an NVIDIA GPU, or one of AMD's that the kernels are not tuned for, without --arch.
        UsageError: for options that do not go together.

    """
    kernels = _kernels(options, shapes)
    wanted = {kernel: _shapes(options, kernel, shapes[kernel]) for kernel in kernels}
    if gpu is not None and options.arch is None and gpu.arch not in SUPPORTED_ARCHS:
        kind = f"AMD {gpu.arch}" if gpu.arch else "not an AMD GPU"
        raise UnsupportedGpuError(
            f"This GPU is {gpu.name} ({kind}); configurations are tuned for {' and '.join(SUPPORTED_ARCHS)} only, and "
            "never for or on another GPU. To rank by the cost model instead, which needs no GPU, add --arch gfx1201."
        )
    measuring = gpu is not None and options.arch in (None, gpu.arch)
    if gpu is not None and measuring:
        devices = {gpu.arch: _measured_device(options, gpu)}
    else:
        devices = _modelled_devices(options)
    targets = tuple(
        Target(kernel, shape, device, arch)
        for arch, device in devices.items()
        for kernel in kernels
        for shape in wanted[kernel]
    )
    return Plan(targets, gpu if measuring else None)


def _kernels(options: argparse.Namespace, shapes: Mapping[str, Sequence[Shape]]) -> list[str]:
    wanted = [*(options.kernel or ()), *(("attention",) if options.attention else ())]
    kernels = list(dict.fromkeys(expanded(wanted) or shapes))
    check_kernels(kernels, shapes)
    if options.shape and len(kernels) != 1:
        raise UsageError("--shape needs one --kernel, whose shape it is.")
    return kernels


def _shapes(options: argparse.Namespace, kernel: str, shipped: Sequence[Shape]) -> list[Shape]:
    dimensions = list(shipped[0])
    for shape in options.shape or ():
        if sorted(shape) != sorted(dimensions):
            example = ",".join(f"{name}={size}" for name, size in shipped[0].items())
            raise UsageError(f"--shape: a shape of {kernel} has {', '.join(dimensions)}, as in {example}.")
        check_shape(kernel, shape)
    return [{name: shape[name] for name in dimensions} for shape in options.shape or shipped]


def check_shape(kernel: str, shape: Shape) -> None:
    """Refuse a shape that no layer can have.

    Args:
        kernel: one of ours; the shapes of others are not looked at.
        shape: all dimensions that the kernel is tuned by, each above 0.

    Raises:
        UsageError: if it is cut off within a group of weights, chooses more experts than there are, or has heads that
            the attention kernels do not serve.

    """
    if kernel.startswith("attention_"):
        from step128_kernels.attention.configs import shape_of  # loads torch

        try:
            shape_of(shape, kernel)
        except ValueError as error:
            raise UsageError(f"--shape: {error}.") from error
    for name in _GROUPED.get(kernel, ()):
        if shape[name] % GROUP_SIZE:
            raise UsageError(
                f"--shape: {name}={shape[name]} of {kernel} is no multiple of {GROUP_SIZE}, and a group of "
                f"{GROUP_SIZE} weights along {name} has one scale. Give the shape of a layer on one rank."
            )
    if kernel in _GROUPED and shape.get("top_k", 0) > shape.get("E", 0):
        raise UsageError(f"--shape: top_k={shape['top_k']} experts cannot be chosen from E={shape['E']}.")


def _measured_device(options: argparse.Namespace, gpu: Gpu) -> str:
    if options.device_name is not None and spellings(options.device_name) != spellings(gpu.name):
        raise UsageError(
            f"--device-name {options.device_name}: this GPU is {gpu.name}, and what is measured on it is true of it "
            "only. Leave the option out."
        )
    return spellings(gpu.name)[0]


def _modelled_devices(options: argparse.Namespace) -> dict[str, str]:
    if options.device_name is not None and options.arch is None:
        raise UsageError("--device-name needs --arch, without a GPU of that name here.")
    archs = SUPPORTED_ARCHS if options.arch is None else (options.arch,)
    return {arch: spellings(options.device_name or DEVICE_OF_ARCH[arch])[0] for arch in archs}


def output_folder(given: Path | None) -> Path:
    """Return the folder to write to: as given, else the user's own, else the one with the shipped files.

    Raises:
        NoOutputError: if there is none of them.
        TuningFileError: if $STEP128_CONFIGS_DIR names no folder.

    """
    own = os.environ.get(TUNED_DIR_VARIABLE)
    if given is None and own:
        given = Path(own).expanduser()
    folder = given or shipped_folder(os.environ.get(CONFIGS_DIR_VARIABLE))
    if folder is None:
        raise NoOutputError(f"No folder to write to was found: give one with --output, or set {TUNED_DIR_VARIABLE}.")
    return folder


def parsed_shape(text: str) -> dict[str, int]:
    """Parse `N=2560,K=4096`.

    Raises:
        argparse.ArgumentTypeError: if it is not of that form.

    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        is_number = size.isascii() and size.isdecimal() and (int(size) > 0 or name == "W")  # W=0: no window
        if not name or name in shape or not is_number:
            raise argparse.ArgumentTypeError(f"{text!r} is no shape; one looks like N=2560,K=4096")
        shape[name] = int(size)
    return shape

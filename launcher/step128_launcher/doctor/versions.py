"""Kernel, firmware and virtualization that are known not to work with these GPUs."""

import re
from importlib.util import find_spec
from pathlib import Path

from step128_launcher.doctor.context import Context, why_no_cards
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned

_STRIX = "gfx1151"
# From AMD's and users' reports on gfx1151: mainline from here on, and two Ubuntu kernels with the fixes carried back.
_GOOD_KERNEL = (6, 18, 4)
_BACKPORTS = {(6, 17, 0): 19, (6, 14, 0): 1018}  # version -> first good build: HWE 6.17.0-19, OEM 6.14.0-1018
_BAD_FIRMWARE = "20251125"


def check_kernel(context: Context) -> Finding:
    """Compute on gfx1151 hangs or faults with older kernels."""
    name = "kernel"
    release = context.hardware.kernel_release
    if _STRIX not in context.targets("gfx"):
        return skipped(name, f"kernel {release or 'unknown'}; no minimum is known for these GPUs")
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-(\d+))?", release or "")
    if match is None:
        return skipped(name, "the kernel's release cannot be read")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    backported = version in _BACKPORTS and int(match[4] or 0) >= _BACKPORTS[version]
    if version >= _GOOD_KERNEL or backported:
        return passed(name, f"kernel {release}")
    return warned(
        name,
        f"kernel {release}; {_STRIX} needs 6.18.4 or later (Ubuntu 24.04: HWE 6.17.0-19, OEM 6.14.0-1018)",
        "Install a newer kernel, for example `sudo apt install linux-generic-hwe-24.04`, then reboot.",
    )


def check_firmware(context: Context) -> Finding:
    """The release 20251125 of linux-firmware breaks ROCm on gfx1151."""
    name = "linux-firmware"
    if _STRIX not in context.targets("gfx"):
        return skipped(name, "no release is known to break these GPUs")
    if context.hardware.container:
        return skipped(name, "the firmware is the host's; a container does not see its package")
    version = _package_version(context)
    loaded = [f"{key} {value}" for key, value in context.hardware.firmware.items() if key.endswith(" mes")]
    if version is None:
        return skipped(name, "no Debian or Ubuntu package; loaded: " + (", ".join(loaded) or "unknown"))
    if _BAD_FIRMWARE in version:
        remedy = "Install another release (`sudo apt install --only-upgrade linux-firmware`), then reboot."
        return failed(name, f"linux-firmware {version} breaks ROCm on {_STRIX}", remedy)
    return passed(name, f"linux-firmware {version}")


def check_image_target(context: Context) -> Finding:
    """ROCm's libraries hold kernels for a list of targets; an image without the GPU's fails at its first product."""
    name = "image-target"
    targets = context.targets("gfx")
    if not targets:
        return skipped(name, "no usable AMD GPU of a known target")
    files = [path.name for folder in _kernel_folders(context) for path in folder.glob("*gfx*")]
    if not files:
        return skipped(name, "no rocBLAS library folder here; look in the serving container")
    # Not followed by a digit or letter: gfx110 must not count for gfx1100.
    missing = [one for one in targets if not any(re.search(rf"{one}(?![0-9a-z])", file) for file in files)]
    if not missing:
        return passed(name, f"rocBLAS has kernels for {', '.join(targets)}")
    held = sorted({found for file in files for found in re.findall(r"gfx[0-9a-f]+", file)})
    remedy = "Use an image built for it; HSA_OVERRIDE_GFX_VERSION is no way out."
    return failed(name, f"rocBLAS has no kernels for {', '.join(missing)}, only for {', '.join(held)}", remedy)


def check_virtual_machine(context: Context) -> Finding:
    """Cards passed through to a virtual machine show timeouts of their scheduler (MES) that bare metal does not."""
    name = "virtual-machine"
    if not context.cards:
        return skipped(name, why_no_cards(context))
    try:
        text = (context.root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return skipped(name, "/proc/cpuinfo cannot be read")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    if "hypervisor" not in flags.split():
        return passed(name, "bare metal")
    return warned(
        name,
        "this is a virtual machine: cards passed through have shown MES timeouts",
        "If requests hang and `sudo dmesg` tells of MES, run on the host itself.",
    )


def _kernel_folders(context: Context) -> list[Path]:
    """Return where rocBLAS keeps its kernels: ROCm's folder, and that of a torch that brings its own."""
    folders = [context.root / "opt/rocm/lib/rocblas/library"]
    torch = find_spec("torch") if context.is_live else None
    if torch is not None and torch.origin is not None:
        folders.append(Path(torch.origin).parent / "lib/rocblas/library")
    return folders


def _package_version(context: Context) -> str | None:
    try:
        status = (context.root / "var/lib/dpkg/status").read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"^Package: linux-firmware\n(?:(?!Version:).+\n)*Version: (.+)$", status, re.MULTILINE)
    return match[1] if match else None

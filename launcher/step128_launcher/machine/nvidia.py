"""NVIDIA GPUs, by one bounded call of nvidia-smi; a recorded tree holds its output in commands/nvidia-smi.csv.

Sources: nvidia-smi(1) and `nvidia-smi --help-query-gpu`. Boxes whose GPU shares the CPU's memory report [N/A] for it:
GB10 (DGX Spark, sm_121), Thor (sm_110), Orin (sm_87).
"""

from pathlib import Path

from step128_launcher.machine.reader import Reader, whole_number
from step128_launcher.machine.types import NVIDIA, Gpu, PcieLink

QUERY = (
    "pci.bus_id,pci.device_id,name,uuid,compute_cap,memory.total,memory.used,power.limit,"
    "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,driver_version,vbios_version"
)
RECORDED = "commands/nvidia-smi.csv"
_FIELDS = QUERY.split(",")
_TIMEOUT_SECONDS = 10
_ABSENT = ("[N/A]", "[Not Supported]", "N/A", "")
_UNIFIED_CAPABILITIES = ("12.1", "11.0", "8.7", "7.2")
_MIB = 2**20
_LANE_GTS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}  # PCIe generation -> GT/s


def read_nvidia_gpus(reader: Reader, has_driver: bool) -> tuple[tuple[Gpu, ...], dict[str, str]]:
    """Return the GPUs by PCI address, and driver and VBIOS versions; nothing is run on a machine with no driver."""
    output = _run(reader, has_driver) if reader.root == Path("/") else reader.text(reader.root / RECORDED)
    gpus: list[Gpu] = []
    firmware: dict[str, str] = {}
    for line in (output or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_FIELDS):
            reader.notes.append(f"nvidia-smi: {line[:60]!r} is not the answer to --query-gpu={QUERY}")
            continue
        values = dict(zip(_FIELDS, fields, strict=True))
        gpu = _gpu(reader, values, len(gpus))
        gpus.append(gpu)
        if values["driver_version"] not in _ABSENT:
            firmware["nvidia"] = values["driver_version"]
        if values["vbios_version"] not in _ABSENT:
            firmware[f"{gpu.pci_address} vbios"] = values["vbios_version"]
    return tuple(sorted(gpus, key=lambda gpu: gpu.pci_address)), firmware


def _run(reader: Reader, has_driver: bool) -> str | None:
    if not has_driver:
        return None
    import subprocess  # only here: importing it costs more than reading a whole machine without NVIDIA

    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        reader.notes.append(f"nvidia-smi: {error}")
        return None
    if done.returncode != 0:
        reader.notes.append(f"nvidia-smi: exit {done.returncode}: {(done.stdout + done.stderr).strip()[:120]}")
        return None
    return done.stdout


def _gpu(reader: Reader, values: dict[str, str], index: int) -> Gpu:
    total, used = _mib(reader, values, "memory.total"), _mib(reader, values, "memory.used")
    capability = values["compute_cap"]
    known = capability not in _ABSENT and capability.replace(".", "", 1).isdigit()
    if not known and capability not in _ABSENT:
        _complain(reader, values, "compute_cap")
    unified = capability in _UNIFIED_CAPABILITIES or values["memory.total"] in _ABSENT
    return Gpu(
        vendor=NVIDIA,
        pci_address=_pci_address(values["pci.bus_id"]) or f"nvidia{index}",
        pci_id=_pci_id(values["pci.device_id"]),
        name=values["name"] if values["name"] not in _ABSENT else "NVIDIA GPU",
        target=f"sm_{capability.replace('.', '')}" if known else None,
        compute_units=None,
        integrated=unified,
        vram_total_bytes=None if unified else total,
        vram_used_bytes=None if unified or total is None or used is None or used > total else used,
        link=None if unified else _link(reader, values),
        power_cap_watts=_watts(reader, values),
        unique_id=values["uuid"] if values["uuid"] not in _ABSENT else None,
    )


def _complain(reader: Reader, values: dict[str, str], name: str) -> None:
    reader.notes.append(f"nvidia-smi: {name} of {values['pci.bus_id']} is {values[name][:40]!r}")


def _whole(reader: Reader, values: dict[str, str], name: str, maximum: int) -> int | None:
    if values[name] in _ABSENT:
        return None
    value = whole_number(values[name])
    if value is None or not 0 <= value <= maximum:
        _complain(reader, values, name)
        return None
    return value


def _mib(reader: Reader, values: dict[str, str], name: str) -> int | None:
    value = _whole(reader, values, name, maximum=2**26)
    return None if value is None else value * _MIB


def _watts(reader: Reader, values: dict[str, str]) -> float | None:
    if values["power.limit"] in _ABSENT:
        return None
    try:
        watts = float(values["power.limit"])
    except ValueError:
        watts = -1.0
    if not 1 <= watts <= 5000:
        _complain(reader, values, "power.limit")
        return None
    return watts


def _link(reader: Reader, values: dict[str, str]) -> PcieLink | None:
    generation, width = (_whole(reader, values, f"pcie.link.{name}.current", 64) for name in ("gen", "width"))
    most, widest = (_whole(reader, values, f"pcie.link.{name}.max", 64) for name in ("gen", "width"))
    speed = _LANE_GTS.get(generation or 0)
    if speed is None or not width:
        return None
    return PcieLink(speed, width, _LANE_GTS.get(most or 0), widest or None)


def _pci_address(bus_id: str) -> str | None:
    """Return "0000000F:01:00.0" as the kernel writes it, 000f:01:00.0."""
    domain, _, rest = bus_id.lower().partition(":")
    if not rest or any(letter not in "0123456789abcdef" for letter in domain):
        return None
    return f"{int(domain or '0', 16):04x}:{rest}"


def _pci_id(device_id: str) -> str:
    """Return vendor:device of nvidia-smi's 0xDDDDVVVV."""
    text = device_id.lower().removeprefix("0x")
    return f"{text[4:]}:{text[:4]}" if len(text) == 8 else "10de:????"

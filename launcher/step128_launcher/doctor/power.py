"""Power and heat: what the cards may draw together, cards unlike the others, clocks held low, a GPU that runs hot."""

import re
from pathlib import Path

from step128_launcher.doctor.context import Context, addresses, why_no_cards
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.sizes import format_bytes

_TRANSIENT_FACTOR = 1.35  # short peaks over the cap, about 500 W on a cap of 374 W as others measured on gfx1201
_SPREAD_CELSIUS = 15.0
_HOT_CELSIUS = {"edge": 95.0, "junction": 105.0, "mem": 100.0}
# power_dpm_force_performance_level (the kernel's amdgpu documentation): the driver decides; or all clocks at their top.
# The other values fix some clock, mostly low.
_FREE, _FAST = "auto", ("high", "profile_peak")
_BUSY_PERCENT = 90


def check_power_caps(context: Context) -> Finding:
    """All cards at their cap, with short peaks above it, must be within what the power supply gives."""
    name = "power-caps"
    if not context.discrete:
        return skipped(name, why_no_cards(context))
    caps = {gpu.pci_address: gpu.power_cap_watts for gpu in context.discrete}
    known = [cap for cap in caps.values() if cap is not None]
    if len(known) < len(caps):
        return skipped(name, "the power cap of some card cannot be read")
    total = sum(known)
    shown = f"cards: {len(known)}, together {total:.0f} W; peaks may reach {total * _TRANSIENT_FACTOR:.0f} W"
    if len(set(known)) > 1:
        each = ", ".join(f"{address} {cap:.0f} W" for address, cap in caps.items())
        remedy = "Give all the same cap: `sudo rocm-smi --setpoweroverdrive WATTS`; the weakest sets the pace."
        return warned(name, f"the cards have different caps: {each}", remedy)
    return passed(name, shown)


def check_equal_memory(context: Context) -> Finding:
    """The card with the least memory sets what all get; ECC on one card, or another model, lowers it."""
    name = "equal-memory"
    if len(context.discrete) < 2:
        return skipped(name, "fewer than two cards with memory of their own")
    sizes = {gpu.pci_address: gpu.vram_total_bytes for gpu in context.discrete}
    if None in sizes.values():
        return skipped(name, "the memory of some card cannot be read")
    used = {gpu.pci_address: gpu.vram_used_bytes or 0 for gpu in context.discrete}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{address} {format_bytes(size or 0)}" for address, size in sizes.items())
        remedy = "Same cards? Then switch ECC alike on all (`rocm-smi --showrasinfo`); else choose equal cards."
        return warned(name, f"the cards have different memory: {shown}", remedy)
    busy = [address for address, count in used.items() if count > 2**30]
    if busy:
        shown = ", ".join(f"{address} {format_bytes(used[address])}" for address in busy)
        remedy = "Stop what holds it (`rocm-smi --showpids`); a desktop belongs on another GPU."
        return warned(name, f"in use before any server runs: {shown}", remedy)
    return passed(name, f"{len(sizes)} cards of {format_bytes(next(iter(sizes.values())) or 0)}")


def check_clocks(context: Context) -> Finding:
    """A clock that was fixed, or stays at its lowest while the GPU is busy, makes every token slow."""
    name = "clocks"
    if not context.amd:
        return skipped(name, "no usable AMD GPU; others' clocks are not read")
    levels: dict[str, str] = {}
    for gpu in context.amd:
        device = _device(context.root, gpu.pci_address)
        level = _text(device / "power_dpm_force_performance_level") if device else None
        if device is None or level is None:
            continue
        levels[gpu.pci_address] = level
        if level == _FREE and _is_stuck(device):
            return warned(
                name,
                f"{gpu.pci_address} is busy, and its shader clock is at the lowest step ({_lowest(device)})",
                "See the temperatures and `sudo dmesg | grep amdgpu`; if it stays so, reset the GPU or reboot.",
            )
    fixed = {address: level for address, level in levels.items() if level != _FREE}
    if not levels:
        return skipped(name, "the driver does not tell how the clocks are chosen")
    if not fixed:
        return passed(name, f"{addresses(context.amd)}: chosen by the driver")
    shown = ", ".join(f"{address} {level}" for address, level in fixed.items())
    if set(fixed.values()) <= set(_FAST):
        evidence = f"held at the top, idle or not, at the cost of heat: {shown}"
    else:
        evidence = f"held by hand, mostly low: {shown}"
    return warned(name, evidence, "`sudo rocm-smi --setperflevel auto`")


def check_temperatures(context: Context) -> Finding:
    """A card hotter than its neighbours throttles, and with tensor parallelism all wait for it."""
    name = "temperatures"
    gpus = context.cards or (context.amd if context.is_unified else ())
    if not gpus:
        return skipped(name, "no usable AMD GPU; others' sensors are not read")
    readings = {gpu.pci_address: _temperatures(context.root, gpu.pci_address) for gpu in gpus}
    labels = sorted({label for found in readings.values() for label in found})
    if not labels:
        return skipped(name, "no temperature can be read")
    lines = []
    for label in labels:
        degrees = {address: found[label] for address, found in readings.items() if label in found}
        shown = f"{label}: " + ", ".join(f"{address} {value:.0f} °C" for address, value in degrees.items())
        if max(degrees.values()) >= _HOT_CELSIUS.get(label, 105.0):
            return failed(name, shown, "Improve the airflow, or lower the power cap, before serving.")
        if max(degrees.values()) - min(degrees.values()) > _SPREAD_CELSIUS:
            remedy = "Check the airflow and cooler of the hottest card; compare again with all of them busy."
            return warned(name, shown, remedy)
        lines.append(shown)
    silent = [address for address, found in readings.items() if not found]
    lines += [f"not readable: {', '.join(silent)}"] if silent else []
    return passed(name, "; ".join(lines))


def _device(root: Path, address: str) -> Path | None:
    """Return the folder of an amdgpu card's PCI device."""
    cards = (card for card in sorted((root / "sys/class/drm").glob("card*")) if re.fullmatch(r"card\d+", card.name))
    return next((card / "device" for card in cards if (card / "device").resolve().name == address), None)


def _temperatures(root: Path, address: str) -> dict[str, float]:
    """Return sensor -> °C of one card, from the hwmon folder of its PCI device."""
    found: dict[str, float] = {}
    device = _device(root, address)
    for path in sorted(device.glob("hwmon/hwmon*/temp*_input")) if device else ():
        try:
            celsius = int(path.read_text()) / 1000
            label = path.with_name(path.name.replace("_input", "_label"))
            name = label.read_text().strip() if label.exists() else "edge"
        except (OSError, ValueError):
            continue  # a suspended card answers with an error; a missing sensor is no finding
        if -50 < celsius < 200:
            found[name] = celsius
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None  # a suspended card answers with an error


def _is_stuck(device: Path) -> bool:
    """Whether the GPU is busy and its shader clock at the lowest of several steps ("0: 500Mhz *")."""
    busy = _text(device / "gpu_busy_percent") or ""
    steps = (_text(device / "pp_dpm_sclk") or "").splitlines()
    return busy.isdigit() and int(busy) >= _BUSY_PERCENT and len(steps) > 1 and steps[0].rstrip().endswith("*")


def _lowest(device: Path) -> str:
    return (_text(device / "pp_dpm_sclk") or "").splitlines()[0].strip(" *")

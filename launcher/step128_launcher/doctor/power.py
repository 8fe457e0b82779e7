"""Power and heat: what the cards may draw together, cards unlike the others, a card that runs hot."""

import re
from pathlib import Path

from step128_launcher.doctor.context import Context, addresses
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.sizes import format_bytes

_TRANSIENT_FACTOR = 1.35  # short peaks over the cap, about 500 W on a cap of 374 W as others measured on gfx1201
_SPREAD_CELSIUS = 15.0
_HOT_CELSIUS = {"edge": 95.0, "junction": 105.0, "mem": 100.0}
_NO_CARD = "no usable card with memory of its own"


def check_power_caps(context: Context) -> Finding:
    """All cards at their cap, with short peaks above it, must be within what the power supply gives."""
    name = "power-caps"
    if not context.cards:
        return skipped(name, _NO_CARD)
    caps = {gpu.pci_address: gpu.power_cap_watts for gpu in context.cards}
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
    if len(context.cards) < 2:
        return skipped(name, "fewer than two cards")
    sizes = {gpu.pci_address: gpu.vram_total_bytes for gpu in context.cards}
    if None in sizes.values():
        return skipped(name, "the memory of some card cannot be read")
    used = {gpu.pci_address: gpu.vram_used_bytes or 0 for gpu in context.cards}
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


def check_temperatures(context: Context) -> Finding:
    """A card hotter than its neighbours throttles, and with tensor parallelism all wait for it."""
    name = "temperatures"
    if not context.cards:
        return skipped(name, _NO_CARD)
    readings = {gpu.pci_address: _temperatures(context.root, gpu.pci_address) for gpu in context.cards}
    labels = sorted({label for found in readings.values() for label in found})
    if not labels:
        return skipped(name, "no temperature can be read")
    for label in labels:
        degrees = {address: found[label] for address, found in readings.items() if label in found}
        shown = f"{label}: " + ", ".join(f"{address} {value:.0f} °C" for address, value in degrees.items())
        if max(degrees.values()) >= _HOT_CELSIUS.get(label, 105.0):
            return failed(name, shown, "Improve the airflow, or lower the power cap, before serving.")
        if max(degrees.values()) - min(degrees.values()) > _SPREAD_CELSIUS:
            remedy = "Check the airflow and cooler of the hottest card; compare again with all of them busy."
            return warned(name, shown, remedy)
    return passed(name, "; ".join(f"{addresses(context.cards)}: {label} alike" for label in labels))


def _temperatures(root: Path, address: str) -> dict[str, float]:
    """Return sensor -> °C of one card, from the hwmon folder of its PCI device."""
    found: dict[str, float] = {}
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        if not re.fullmatch(r"card\d+", card.name) or (card / "device").resolve().name != address:
            continue
        for path in sorted((card / "device/hwmon").glob("hwmon*/temp*_input")):
            try:
                celsius = int(path.read_text()) / 1000
                label = path.with_name(path.name.replace("_input", "_label"))
                name = label.read_text().strip() if label.exists() else "edge"
            except (OSError, ValueError):
                continue  # a suspended card answers with an error; a missing sensor is no finding
            if -50 < celsius < 200:
                found[name] = celsius
    return found

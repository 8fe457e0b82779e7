"""Collectives between cards: the protocol that hangs, the transfers that reset hosts, the links they run on."""

from step128_launcher.doctor.context import Context, addresses, is_on, why_no_cards
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned


def check_protocol(context: Context) -> Finding:
    """RCCL chooses its LL protocol by itself on gfx12 and can deadlock (vllm#40980, rocm-systems#5480)."""
    name = "rccl-protocol"
    if len(context.cards) < 2:
        return skipped(name, why_no_cards(context))
    targets = context.targets("gfx12")
    if not targets:
        return skipped(name, "no gfx12 card; the deadlock was reported for those only")
    value, origin = context.setting("NCCL_PROTO")
    library = context.hardware.firmware.get("librccl", "of unknown version")
    if value is not None and value.strip().lower() == "simple":
        return passed(name, f"NCCL_PROTO={value}, set by {origin}; librccl {library}")
    found = "NCCL_PROTO is not set" if value is None else f"NCCL_PROTO={value} (set by {origin})"
    return failed(
        name,
        f"{found} with {len(context.cards)} cards of {', '.join(targets)}, librccl {library}: the LL protocol, which "
        "RCCL may choose, can deadlock on them",
        "export NCCL_PROTO=Simple, or serve with a profile that sets it; then `step128 doctor --all-reduce`",
    )


def check_peer_to_peer(context: Context) -> Finding:
    """Direct transfers between PCIe cards can reset the whole host (rocm-systems#11348), so they are off by default."""
    name = "peer-to-peer"
    if len(context.cards) < 2:
        return skipped(name, why_no_cards(context))
    value, origin = context.setting("NCCL_P2P_DISABLE")
    if is_on(value):
        return passed(name, f"NCCL_P2P_DISABLE={value}, set by {origin}: the cards exchange data through host memory")
    remedy = (
        "export NCCL_P2P_DISABLE=1. To try P2P all the same, first save your work, then see that no bridge redirects "
        "it: `sudo lspci -vvv | grep -i acsctl` should show ReqRedir- and CmpltRedir-"
    )
    if value is None:
        cards = addresses(context.cards)
        evidence = f"NCCL_P2P_DISABLE is not set: RCCL would use direct transfers between {cards}"
        return failed(name, f"{evidence}; on some boards these hang or reset the host", remedy)
    return warned(
        name, f"NCCL_P2P_DISABLE={value} (set by {origin}): direct transfers are on; some boards reset on them", remedy
    )


def check_resizable_bar(context: Context) -> Finding:
    """A card whose memory the host reaches only in part (no resizable BAR) cannot exchange data directly."""
    name = "resizable-bar"
    if not context.cards:
        return skipped(name, why_no_cards(context))
    known = [gpu for gpu in context.cards if gpu.visible_vram_bytes is not None and gpu.vram_total_bytes is not None]
    if len(known) < len(context.cards):
        return skipped(name, "the driver does not tell how much of each card's memory the host can reach")
    small = tuple(gpu for gpu in known if (gpu.visible_vram_bytes or 0) < (gpu.vram_total_bytes or 0))
    if not small:
        return passed(name, f"cards: {len(known)}, all of their memory is reachable")
    least = min(gpu.visible_vram_bytes or 0 for gpu in small) // 2**20
    return warned(
        name,
        f"only {least} MiB of the memory of {addresses(small)} are reachable from the host",
        "In the firmware setup turn on 'Above 4G decoding' and 'Resizable BAR'.",
    )


def check_links(context: Context) -> Finding:
    """Every token crosses the PCIe links twice a layer: a card on few lanes slows all of them."""
    name = "pcie-links"
    cards = context.discrete  # nvidia-smi tells the links too
    if not cards:
        return skipped(name, why_no_cards(context))
    links = {gpu.pci_address: gpu.link for gpu in cards if gpu.link is not None}
    if len(links) < len(cards):
        return skipped(name, "the PCIe link of some card cannot be read")
    shown = ", ".join(f"{address} x{link.width} of x{link.max_width or '?'}" for address, link in links.items())
    lowered = [address for address, link in links.items() if link.max_width and link.width < link.max_width]
    if lowered:
        remedy = "Reseat the card or its riser, and check the slot's lanes in the board's manual and firmware setup."
        return warned(name, f"{', '.join(lowered)} runs on fewer lanes than both ends can do: {shown}", remedy)
    widths = {link.width for link in links.values()}
    if len(cards) > 1 and (len(widths) > 1 or min(widths) < 8):
        remedy = "Put the cards into slots of equal width, 8 lanes or more; the slowest link sets every step's pace."
        return warned(name, f"uneven or narrow links: {shown}", remedy)
    return passed(name, shown)


def check_numa(context: Context) -> Finding:
    """Cards on different NUMA nodes exchange data through the link between the CPUs."""
    name = "numa"
    if len(context.cards) < 2:
        return skipped(name, why_no_cards(context))
    nodes = {gpu.pci_address: gpu.numa_node for gpu in context.cards}
    if None in nodes.values():
        return skipped(name, "the machine does not tell the cards' NUMA nodes")
    shown = ", ".join(f"{address} on node {node}" for address, node in nodes.items())
    if len(set(nodes.values())) == 1:
        return passed(name, shown)
    remedy = "If there are free slots, put all cards on one node; in an EPYC's firmware setup, NPS1 makes one of four."
    return warned(name, f"the cards are on different NUMA nodes: {shown}", remedy)


def check_iommu(context: Context) -> Finding:
    """RCCL asks for iommu=pt with several cards; on Strix Halo others measured 5-12 % more speed with amd_iommu=off."""
    name = "iommu"
    command_line = context.hardware.kernel_command_line or ""
    if context.is_unified and context.amd:
        if "amd_iommu=off" in command_line.split():
            return passed(name, "amd_iommu=off")
        return passed(name, "on, which is safe; others measured 5-12 % more speed on Strix Halo with amd_iommu=off")
    if len(context.cards) < 2:
        return skipped(name, why_no_cards(context))
    domains = {gpu.pci_address: gpu.iommu_domain for gpu in context.cards}
    translated = [address for address, domain in domains.items() if domain is not None and domain != "identity"]
    if translated:
        return warned(
            name,
            f"the IOMMU translates the transfers of {', '.join(translated)} (domain {domains[translated[0]]})",
            "Add iommu=pt to the kernel's command line (GRUB_CMDLINE_LINUX in /etc/default/grub), then reboot.",
        )
    if all(domains.values()):
        return passed(name, "pass-through (identity) for every card")
    if "iommu=pt" in command_line.split():
        return passed(name, "iommu=pt on the kernel's command line")
    return skipped(name, "the cards have no IOMMU group: it is off, or hidden from this container")

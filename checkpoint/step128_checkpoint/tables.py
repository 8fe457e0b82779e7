"""Tables for people: what a checkpoint holds, and what a conversion changes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from step128_checkpoint.details import Details
from step128_checkpoint.files import size_text
from step128_checkpoint.inspect import ComponentSize, Inspection


def before_and_after(before: Sequence[ComponentSize], after: Sequence[ComponentSize]) -> Table:
    """Bytes of each component before and after a conversion."""
    table = Table(title="bytes by component")
    for heading in ("component", "parameters", "before MB", "after MB", "bits/weight"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    old = {row.component: row.size_bytes for row in before}
    for row in after:
        table.add_row(
            row.component,
            f"{row.parameters:,}",
            f"{old.get(row.component, 0) / 1e6:,.3f}",
            f"{row.size_bytes / 1e6:,.3f}",
            f"{row.bits_per_weight:.2f}",
        )
    return table


def print_inspection(found: Inspection) -> None:
    """Print an inspection to standard output."""
    title = f"{found.folder}: {found.architecture}, {found.shards} files, policy {found.policy or 'none'}"
    table = Table(title=escape(title))
    for heading in ("component", "tensors", "parameters", "MB", "bits/weight"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    for row in (*found.components, found.total):
        cells = (row.component, str(row.tensors), f"{row.parameters:,}", f"{row.size_bytes / 1e6:,.3f}")
        table.add_row(*cells, f"{row.bits_per_weight:.2f}", style="bold" if row is found.total else None)
    console = Console(soft_wrap=True)
    console.print(table)
    if found.details:
        for line in describe(found.details):
            console.print(escape(line))
    if scales := found.kv_scales:
        console.print(
            f"KV scales: {scales.layers} layers, K {scales.k_min:.4g} to {scales.k_max:.4g}, "
            f"V {scales.v_min:.4g} to {scales.v_max:.4g}"
        )
    else:
        console.print("KV scales: none")
    for problem in found.problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")


def describe(details: Details) -> list[str]:
    """Say a checkpoint's details in lines for people."""
    each = f", {details.experts_per_token} of them for each token" if details.experts_per_token else ""
    lines = [
        f"layers: {details.layers}, {details.moe_layers} of them with {details.experts} routed experts{each}",
        f"MTP layers: {details.mtp_layers} of {details.mtp_layers_stated}",
        f"files: {size_text(details.file_bytes)} of safetensors",
    ]
    if details.method:
        lines.append(f"NL4 method: {details.method}")
    if pruning := details.pruning:
        protected = ", ".join(f"{layer}/{expert}" for layer, expert in pruning.super_experts) or "none"
        before = f" of {pruning.before}" if pruning.before else ""
        lines.append(f"pruned: {pruning.keep}{before} experts kept by {pruning.criterion}; super-experts: {protected}")
    else:
        lines.append("pruned: no report of it")
    lines.append(f"manifest: {' -> '.join(details.commands)}" if details.commands else "manifest: none")
    return lines

"""The plan for people: an itemised table, the settings with their reasons, and the result."""

import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from step128_launcher.checkpoint import ModelFootprint
from step128_launcher.command import API_KEY_VARIABLE, UNSET_VARIABLES
from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.memory import MemoryPlan
from step128_launcher.plan import Plan
from step128_launcher.sizes import format_bytes


def print_plan(console: Console, plan: Plan, footprint: ModelFootprint, hardware: Hardware) -> None:
    """Print the whole plan."""
    quantization = footprint.quantization
    weights = f"{quantization.method} ({quantization.policy})" if quantization else footprint.config.dtype
    _say(console, f"Model    {footprint.path}")
    _say(
        console,
        f"         {weights}, {format_bytes(footprint.stored_bytes)} in {footprint.tensors} tensors, "
        f"{footprint.config.num_hidden_layers} layers + {footprint.mtp_layers} MTP, "
        f"KV scales: {_scaled(footprint)}",
    )
    _say(
        console,
        f"Machine  {len(hardware.cpu_ids)} CPUs, {format_bytes(hardware.memory_available_bytes)} of "
        f"{format_bytes(hardware.memory_total_bytes)} available; profile {plan.profile}",
    )
    print_memory(console, plan.memory)
    for warning in plan.warnings:
        _say(console, f"WARNING  {warning}")
    for reason in plan.reasons:
        _say(console, f"  + {reason}")
    for alternative in plan.rejected:
        _say(console, f"  - {alternative.wish}: {alternative.reason}.")
    requests, free = plan.prediction.kv_cache_max_concurrency, format_bytes(plan.memory.free_bytes)
    _say(
        console,
        f"RESULT   fits: context {plan.max_model_len}, MTP {plan.num_speculative_tokens}, KV {plan.kv_cache_dtype}, "
        f"{plan.dtype}, tensor parallel {plan.tensor_parallel_size}; "
        f"{requests:.1f} requests of full length, {free} of the budget free",
    )


def print_memory(console: Console, memory: MemoryPlan) -> None:
    """Print every memory item with its evidence, and the sum against the budget."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Memory")
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Evidence", no_wrap=True)
    table.add_column("What it is")
    for line in memory.lines:
        table.add_row(line.name, format_bytes(line.total_bytes), line.evidence, Text(line.explanation))
    table.add_section()
    table.add_row("sum", format_bytes(memory.total_bytes))
    available = f"of {format_bytes(memory.available_bytes)} available"
    table.add_row("budget", format_bytes(memory.budget_bytes), "", available, style="bold")
    console.print(table)


def print_error(console: Console, error: LauncherError) -> None:
    """Print what was found and what to do next."""
    console.print("error: ", style="bold red", end="")
    _say(console, error.message)
    if error.hint:
        _say(console, error.hint)


def print_command(console: Console, argv: Sequence[str], environment: Mapping[str, str], key: str) -> None:
    """Print the environment and argv as one line a shell understands; `key` is the shell's word for the API key."""
    unset = [part for name in UNSET_VARIABLES for part in ("-u", name)]
    assignments = [f"{name}={value}" for name, value in environment.items()]
    words = [shlex.join(["env", *unset, *assignments]), f"{API_KEY_VARIABLE}={key}", shlex.join(argv)]
    _say(console, " ".join(words))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _scaled(footprint: ModelFootprint) -> str:
    if footprint.kv_scales is None:
        return "no"
    return "trunk only" if footprint.unscaled_layers else "yes"

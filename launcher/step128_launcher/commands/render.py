"""The plan for people: an itemised table for each memory pool with a bar, the decisions with their reasons."""

import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from step128_launcher.command import UNSET_VARIABLES
from step128_launcher.commands.refusal import RefusedError
from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Gpu, Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.explain import RANKS_BELOW
from step128_launcher.planning.items import MemoryPlan
from step128_launcher.planning.plan import Alternative, Plan
from step128_launcher.planning.profiles import matching_gpus
from step128_launcher.sizes import format_bytes

_BAR_CELLS = 60
# What each part of the bar stands for: mark, name, and the lines it adds up (by the start of their names).
_BAR_PARTS = (
    ("█", "weights", ("weights:",)),
    ("▓", "draft", ("draft",)),
    ("▒", "KV cache", ("KV cache",)),
    ("░", "rest", ("",)),
)
_SHOWN_REJECTED = 12


def print_plan(console: Console, plan: Plan, footprint: ModelFootprint, hardware: Hardware) -> None:
    """Print the whole plan."""
    gpus = [gpu for gpu in hardware.gpus if gpu.pci_address in plan.gpu_addresses]
    _print_subject(console, plan.profile, gpus, footprint, hardware)
    print_memory(console, plan.memory)
    if plan.host_memory is not None:
        print_memory(console, plan.host_memory)
    _print_speed(console, plan)
    for warning in plan.warnings:
        _say(console, f"WARNING  {warning}")
    for reason in plan.reasons:
        _say(console, f"  + {reason}")
    print_rejected(console, plan.rejected)
    for wish in plan.wish:
        _say(console, f"TRY      {wish}")
    requests, tightest = plan.prediction.kv_cache_max_concurrency, plan.binding_memory
    _say(
        console,
        f"RESULT   fits: context {plan.max_model_len}, MTP {plan.num_speculative_tokens}, KV {plan.kv_cache_dtype}, "
        f"{plan.dtype}, tensor parallel {plan.tensor_parallel_size}, {'images' if plan.vision else 'text only'}; "
        f"{requests:.1f} requests of full length, {format_bytes(tightest.free_bytes)} of the budget free "
        f"({tightest.where})",
    )


def print_rejected(console: Console, rejected: Sequence[Alternative]) -> None:
    """Print what was not chosen, the first dozen of those that tell something; --json has all."""
    telling = [alternative for alternative in rejected if not _is_plain(alternative)]
    for alternative in telling[:_SHOWN_REJECTED]:
        _say(console, f"  - {alternative.wish}: {alternative.reason}.")
    if len(telling) > _SHOWN_REJECTED:
        _say(console, f"  - … {len(telling) - _SHOWN_REJECTED} more in --json.")


def _is_plain(alternative: Alternative) -> bool:
    """Whether nobody would ask for it: less of something that costs nothing, or just ranked below."""
    lesser = alternative.wish.startswith(("max_num_seqs", "max_num_batched_tokens"))
    return alternative.reason == RANKS_BELOW or (lesser and alternative.reason.startswith("fits"))


def print_memory(console: Console, memory: MemoryPlan) -> None:
    """Print every item of one pool with its evidence, the sum against the budget, and a bar."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"Memory: {memory.where}")
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Evidence", no_wrap=True)
    table.add_column("What it is")
    for line in memory.lines:
        table.add_row(line.name, format_bytes(line.total_bytes), line.evidence, Text(line.explanation))
    table.add_section()
    table.add_row("sum", format_bytes(memory.total_bytes), "", Text(_share(memory)))
    available = f"of {format_bytes(memory.available_bytes)} available, {format_bytes(memory.total_memory_bytes)} in all"
    table.add_row("budget", format_bytes(memory.budget_bytes), "", available, style="bold")
    console.print(table)
    _say(console, bar(memory))


def bar(memory: MemoryPlan) -> str:
    """Return the pool as a row of marks: what is planned, what the budget leaves, and what is not to be used."""
    scale = max(memory.total_memory_bytes, memory.total_bytes, 1)
    rest = list(memory.lines)
    cells, legend = "", []
    used = 0
    for mark, name, starts in _BAR_PARTS:
        mine = [line for line in rest if line.name.startswith(starts)]
        rest = [line for line in rest if line not in mine]
        used += sum(line.total_bytes for line in mine)
        if mine:
            cells += mark * (round(used / scale * _BAR_CELLS) - len(cells))
            legend.append(f"{mark} {name}")
    edge = min(_BAR_CELLS, round(memory.budget_bytes / scale * _BAR_CELLS))
    cells = cells.ljust(edge, "·") if len(cells) <= edge else cells
    return f"[{cells.ljust(_BAR_CELLS)}] {'  '.join(legend)}  · free"


def print_refusal(console: Console, error: RefusedError) -> None:
    """Print why nothing fits, as a plan that fits is printed: its subject, the memory, what was tried, the result."""
    subject = error.subject
    gpus = matching_gpus(subject.profile, subject.hardware)
    _print_subject(console, subject.profile.name, gpus, subject.footprint, subject.hardware)
    for memory in filter(None, (error.memory, error.host_memory)):
        print_memory(console, memory)
    print_rejected(console, error.rejected)
    _say(console, f"RESULT   does not fit: {error.reason}")
    for remedy in error.remedies:
        _say(console, f"TRY      {remedy}")


def print_error(console: Console, error: LauncherError) -> None:
    """Print what was found and what to do next."""
    console.print("error: ", style="bold red", end="")
    _say(console, error.message)
    if error.hint:
        _say(console, error.hint)


def print_command(
    console: Console, argv: Sequence[str], environment: Mapping[str, str], keys: Mapping[str, str]
) -> None:
    """Print the environment and argv as one line a shell understands; `keys` are variables and the shell's words."""
    unset = [part for name in UNSET_VARIABLES for part in ("-u", name)]
    assignments = [f"{name}={value}" for name, value in environment.items()]
    secret = [f"{name}={word}" for name, word in keys.items()]
    words = [shlex.join(["env", *unset, *assignments]), *secret, shlex.join(argv)]
    _say(console, " ".join(words))


def print_explanation(console: Console, found: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print items as `explain_item` found them: a title, and its sentences."""
    for title, sentences in found:
        console.print(title, style="bold", markup=False, highlight=False)
        for sentence in sentences:
            _say(console, f"  {sentence}")


def _print_subject(
    console: Console, profile: str, gpus: Sequence[Gpu], footprint: ModelFootprint, hardware: Hardware
) -> None:
    quantization = footprint.quantization
    weights = f"{quantization.method} ({quantization.policy})" if quantization else footprint.config.dtype
    stored = "assumed from config.json" if footprint.assumed else f"in {footprint.tensors} tensors"
    _say(console, f"Model    {footprint.path}")
    _say(
        console,
        f"         {weights}, {format_bytes(footprint.stored_bytes)} {stored}, "
        f"{footprint.config.num_hidden_layers} layers + {footprint.mtp_layers} MTP, "
        f"KV scales: {_scaled(footprint)}",
    )
    names = f"{len(gpus)} x {gpus[0].name} ({gpus[0].target}), " if gpus else ""
    _say(
        console,
        f"Machine  {names}{len(hardware.cpu_ids)} CPUs, {format_bytes(hardware.memory_available_bytes)} of "
        f"{format_bytes(hardware.memory_total_bytes)} host memory available; profile {profile}",
    )


def _print_speed(console: Console, plan: Plan) -> None:
    """Print the modelled speed of each MTP depth."""
    if not plan.speed:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("MTP depth", "context", "tokens a step", "(unconditional)", "experts read", "GiB read", "ms", "tokens/s")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in plan.speed:
        chosen = row.num_speculative_tokens == plan.num_speculative_tokens
        table.add_row(
            f"{'> ' if chosen else ''}{row.num_speculative_tokens}",
            f"{row.context_tokens}",
            f"{row.tokens_per_step:.2f}",
            f"{row.tokens_per_step_unconditional:.2f}",
            f"{row.distinct_experts:.1f}",
            f"{row.read_bytes / 2**30:.2f}",
            f"{1000 * row.step_seconds:.1f}",
            f"{row.tokens_per_second:.0f}",
            style="bold" if chosen else "",
        )
    console.print(table)
    _say(console, "         a model of memory traffic, not a measurement: one request, GiB read on each rank")
    for name, source in plan.speed_sources:
        _say(console, f"         {name}: {source}")


def _share(memory: MemoryPlan) -> str:
    return f"{100 * memory.total_bytes / max(1, memory.total_memory_bytes):.1f} % of all"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _scaled(footprint: ModelFootprint) -> str:
    if footprint.kv_scales is None:
        return "no"
    if footprint.assumed:
        return "assumed"
    return "trunk only" if footprint.unscaled_layers else "yes"

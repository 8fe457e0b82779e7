"""Whether this model fits, by the planner itself; and how close to the memory's end the plan goes."""

from collections.abc import Mapping
from dataclasses import replace

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.doctor.memory import why_not_shared
from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.quantization import Format
from step128_launcher.planning.calibration import (
    Measurement,
    calibration_folder,
    machine_key,
    model_fingerprint,
    read_calibration,
)
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.pools import device_memory
from step128_launcher.sizes import format_bytes

_GIB = 2**30
_MOST_SHARE = 0.95
_LARGE_CACHE_BYTES = 8 * _GIB


def with_plan(context: Context, form: Format) -> Context:
    """Return the context with the plan that `step128 plan` makes without options, or with its refusal."""
    if context.profile is None or context.footprint is None:
        return context
    measurements = _measurements(context.hardware, context.footprint, context.environment) if context.is_live else ()
    try:
        plan = make_plan(
            context.hardware, context.footprint, context.profile, Limits(), measurements=measurements, form=form
        )
    except LauncherError as error:
        return replace(context, refusal=error)
    return replace(context, plan=plan)


def check_model_fits(context: Context) -> Finding:
    """Whether there is a plan at all: weights, KV cache, activations and graphs in what is free now."""
    name = "weights-fit"
    if context.footprint is None:
        return skipped(name, "no checkpoint was given, or it cannot be read")
    if context.refusal is not None:
        return failed(name, context.refusal.message, context.refusal.hint or "`step128 plan` shows every line of it.")
    plan = context.plan
    if plan is None:
        return skipped(name, "no profile is chosen, so there is no plan")
    ranks = f"{plan.tensor_parallel_size} rank{'s' if plan.tensor_parallel_size > 1 else ''}"
    return passed(
        name,
        f"profile {plan.profile}: {ranks}, {plan.max_model_len} tokens, {plan.num_speculative_tokens} drafts a step; "
        f"{format_bytes(plan.memory.total_bytes)} of {format_bytes(plan.memory.available_bytes)} free",
    )


def check_utilization(context: Context) -> Finding:
    """Near the memory's end, servers started and then ran out of it under concurrent requests."""
    name = "memory-share"
    profile, plan = context.profile, context.plan
    if profile is None:
        return skipped(name, "no profile is chosen; the profile sets the share")
    shares = [(profile.usable_fraction, f"profile {profile.name} uses", "memory.usable_fraction")]
    if context.is_unified:
        what = f"profile {profile.name} lets the model and vLLM's processes together take"
        shares.append((profile.host_usable_fraction, what, "memory.host_usable_fraction"))
    shown = "; ".join(_share_text(share, what, key) for share, what, key in shares)
    too_high = [key for share, _, key in shares if share > _MOST_SHARE]
    if plan is not None and plan.gpu_memory_utilization is not None:
        shown += f"; planned --gpu-memory-utilization {plan.gpu_memory_utilization:.2f}"
        too_high += ["memory.usable_fraction"] if plan.gpu_memory_utilization > _MOST_SHARE else []
    if not too_high:
        return passed(name, shown)
    if "memory.host_usable_fraction" in too_high:
        shown += (
            "; the rest is all that is left for every other program and for the page cache, and when it is gone "
            "the kernel kills a process"
        )
    return warned(
        name,
        shown,
        f"Set {' and '.join(dict.fromkeys(too_high))} to {_MOST_SHARE} or less in the profile, or plan with --memory; "
        "verify with requests of full length, several at once.",
    )


def check_host_memory(context: Context) -> Finding:
    """On shared memory other programs take from the model, and so may the page cache: a large allocation can fail.

    Linux counts the page cache as available, but gives it up while it is asked; CUDA's figure of free memory on such
    a machine (DGX Spark) leaves it out.
    """
    name = "host-memory"
    gpus = context.hardware.usable_gpus
    if not context.is_unified:
        return skipped(name, why_not_shared(context))
    if not device_memory(context.hardware, gpus[0]).unified:
        return skipped(name, "the GPU allocates from its carve-out")
    total, available = context.hardware.memory_total_bytes, context.hardware.memory_available_bytes
    need, who = _need(context)
    shown = f"{format_bytes(available)} of {format_bytes(total)} are available"
    if need > available:
        remedy = "Close other programs (`ps aux --sort=-rss | head`), a desktop included, and run this again."
        report = failed if context.footprint is not None else warned
        return report(name, f"{shown}, {who} {format_bytes(need)}", remedy)
    free = _free_bytes(context)
    if free is None:
        return passed(name, f"{shown}, {who} {format_bytes(need)}; how much of it is page cache cannot be read")
    cache = max(0, available - free)
    if cache > _LARGE_CACHE_BYTES and free < need:
        return warned(
            name,
            f"{shown}, but {format_bytes(cache)} of it is page cache and only {format_bytes(free)} is free; {who} "
            + format_bytes(need),
            "Before the start: `sync; echo 3 | sudo tee /proc/sys/vm/drop_caches`.",
        )
    return passed(name, f"{shown}, {format_bytes(free)} free; {who} {format_bytes(need)}")


def _need(context: Context) -> tuple[int, str]:
    """Return the bytes of shared memory that serving takes, and whose figure that is."""
    if context.plan is not None:
        return (context.plan.host_memory or context.plan.memory).total_bytes, "the plan needs"
    if context.footprint is not None:
        return context.footprint.stored_bytes, "the weights alone need"
    return context.hardware.memory_total_bytes * 3 // 4, "without a checkpoint to count, expected are"


def _free_bytes(context: Context) -> int | None:
    """Return MemFree, which unlike MemAvailable counts no page cache; None if it cannot be read."""
    try:
        lines = (context.root / "proc/meminfo").read_text(errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _share_text(share: float, what: str, key: str) -> str:
    return f"{what} {share:.0%} of the memory ({key})"


def _measurements(
    hardware: Hardware, footprint: ModelFootprint, environment: Mapping[str, str]
) -> tuple[Measurement, ...]:
    """Return what earlier starts of this model on this machine measured."""
    found = read_calibration(calibration_folder(environment) / f"{machine_key(hardware)}.json")
    if not found.measurements:
        return ()
    model = model_fingerprint(footprint.path)
    return tuple(measurement for measurement in found.measurements if measurement.settings.model == model)

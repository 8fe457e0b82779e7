"""`step128 doctor`: one check for each thing known to make a start fail, hang or crawl, with evidence and remedy."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from step128_launcher.doctor import (
    attention,
    caches,
    checkpoint,
    containers,
    fit,
    kernel_compiler,
    memory,
    power,
    rccl,
    server_log,
    tuned_files,
    versions,
    visibility,
)
from step128_launcher.doctor.all_reduce import check_all_reduce
from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import FAIL, PASS, SKIP, WARN, Finding, failed, passed
from step128_launcher.doctor.report import any_failed, findings_document, print_findings
from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.quantization import read_format
from step128_launcher.planning.profiles import Profile, choose_profile, load_profile, load_profiles, user_profiles_dir

__all__ = [
    "FAIL",
    "PASS",
    "SKIP",
    "WARN",
    "Finding",
    "any_failed",
    "findings_document",
    "print_findings",
    "run_doctor",
]

CHECKS: tuple[Callable[[Context], Finding], ...] = (
    visibility.check_unreadable,
    visibility.check_gpus,
    visibility.check_variables,
    visibility.check_integrated,
    visibility.check_order,
    visibility.check_rank_count,
    containers.check_devices,
    containers.check_shared_memory,
    containers.check_leftovers,
    rccl.check_protocol,
    rccl.check_peer_to_peer,
    rccl.check_resizable_bar,
    rccl.check_links,
    rccl.check_numa,
    rccl.check_iommu,
    attention.check_backend,
    attention.check_vision_backend,
    attention.check_aiter,
    attention.check_override,
    server_log.check_logged_attention,
    server_log.check_logged_vision,
    server_log.check_logged_experts,
    fit.check_utilization,
    memory.check_carve_out,
    memory.check_gtt,
    memory.check_ttm,
    memory.check_container_limit,
    memory.check_swap,
    fit.check_host_memory,
    versions.check_kernel,
    versions.check_firmware,
    versions.check_image_target,
    versions.check_virtual_machine,
    power.check_power_caps,
    power.check_equal_memory,
    power.check_clocks,
    power.check_temperatures,
    caches.check_caches,
    caches.check_stale_caches,
    kernel_compiler.check_triton,
    checkpoint.check_checkpoint,
    checkpoint.check_chat_template,
    checkpoint.check_kv_scales,
    checkpoint.check_mtp,
    tuned_files.check_tuned_config,
    fit.check_model_fits,
)


def run_doctor(
    hardware: Hardware,
    profile_name: str | None,
    environment: Mapping[str, str],
    *,
    configs_dir: Path,
    model: Path | None,
    all_reduce: bool,
    all_reduce_on_cpu: bool = False,
    root: Path = Path("/"),
    log: Path | None = None,
) -> list[Finding]:
    """Run every check on the machine `hardware` was read from, below `root`.

    `environment` is what a server started here would inherit. Without a name the profile is the one `plan` would
    choose. `log` is what a server wrote at its start; by default the newest in the state folders of this machine, and
    none for a recorded one. Nothing is raised for a bad profile or checkpoint: each is a finding.
    """
    profile, profile_finding = _read_profile(hardware, profile_name, environment, configs_dir)
    if log is None and root == Path("/"):
        log = server_log.find_log(environment)
    context = Context(hardware, environment, profile, root, configs_dir, model, log=log)
    findings = [profile_finding]
    checks = CHECKS
    if model is not None:
        try:
            form = read_format(configs_dir)
            context = fit.with_plan(replace(context, footprint=read_footprint(model, form)), form)
        except LauncherError as error:
            findings.append(failed("checkpoint", error.message, error.hint or "Fetch or make the checkpoint again."))
            checks = tuple(check for check in CHECKS if check is not checkpoint.check_checkpoint)
    findings += [check(context) for check in checks]
    findings.append(check_all_reduce(context, wanted=all_reduce or all_reduce_on_cpu, on_cpu=all_reduce_on_cpu))
    return findings


def _read_profile(
    hardware: Hardware, name: str | None, environment: Mapping[str, str], configs_dir: Path
) -> tuple[Profile | None, Finding]:
    user_dir = user_profiles_dir(environment)
    try:
        if not name or name == "auto":
            name = choose_profile(load_profiles(configs_dir, user_dir)[0], hardware)
        profile = load_profile(configs_dir, name, user_dir)
    except LauncherError as error:
        return None, failed("profile", error.message, error.hint)
    return profile, passed("profile", f"{profile.name}: {profile.description}")

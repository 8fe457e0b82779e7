"""From the command line to a plan: read the machine, the profile and the checkpoint, then decide."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from step128_launcher.access import AccessLimits
from step128_launcher.command import Server
from step128_launcher.commands.refusal import RefusedError, Subject, refused
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.hardware import probe
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import assume_footprint, read_footprint
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.quantization import Format, read_format
from step128_launcher.planning.budget import make_budget, memory_shortage
from step128_launcher.planning.calibration import Calibration, Measurement, load_calibration, model_fingerprint
from step128_launcher.planning.plan import DoesNotFitError, Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import (
    AUTO,
    Profile,
    choose_profile,
    load_profile,
    load_profiles,
    user_profiles_dir,
)
from step128_launcher.tuned_configs import vllm_folder
from step128_launcher.user_folders import user_folder


@dataclass(frozen=True)
class Planned:
    """A plan with all it was made from.

    `base` is the environment that the server's is added to: of a recorded machine nothing is known of it.
    """

    plan: Plan
    footprint: ModelFootprint
    hardware: Hardware
    profile: Profile
    server: Server
    limits: Limits
    measurements: tuple[Measurement, ...] = ()
    base: Mapping[str, str] = field(default_factory=lambda: os.environ)


def make_planned(options: argparse.Namespace, with_fallbacks: bool = False) -> Planned:
    """Read what the options name, and plan.

    Raises:
        RefusedError: 3, if it does not fit, or --memory is more than there is.
        LauncherError: whatever of it cannot be read or is broken.

    """
    configs_dir = find_configs_dir()
    hardware = read_machine(options)
    form = read_format(configs_dir)
    profile, skipped = find_profile(options.profile, configs_dir, hardware)
    footprint = read_model(options.model, getattr(options, "policy", None), form)
    limits = limits_of(options)
    subject = Subject(profile, footprint, hardware)
    _check_memory(subject, limits)
    recorded = getattr(options, "machine", None) is not None
    # What this machine measured says nothing about a recorded one.
    calibration = Calibration(()) if recorded else read_measurements(hardware, footprint)
    try:
        plan = make_plan(
            hardware,
            footprint,
            profile,
            limits,
            measurements=calibration.measurements,
            form=form,
            with_fallbacks=with_fallbacks,
        )
    except DoesNotFitError as error:
        raise refused(error, subject) from error
    warnings = [*skipped, calibration.warning] if calibration.warning else skipped
    plan = replace(plan, warnings=(*plan.warnings, *warnings))
    template = footprint.path / "chat_template.jinja"
    base = {} if recorded else os.environ
    tuned = vllm_folder(base, configs_dir).absolute()
    server = Server(
        model=footprint.path,
        served_model_name=options.served_model_name or footprint.path.resolve().name,
        host=options.host,
        port=options.port,
        load_report_dir=state_dir(options) / "load-reports",
        shutdown_timeout_seconds=profile.shutdown_timeout_seconds,
        measure_memory=_measures(options, profile),
        chat_template=template if template.is_file() else None,
        tuned_configs=tuned if tuned.is_dir() else None,
        access=_access_limits(options),
    )
    return Planned(plan, footprint, hardware, profile, server, limits, calibration.measurements, base)


def _check_memory(subject: Subject, limits: Limits) -> None:
    """Refuse a budget (--memory) that the machine cannot give: a plan for it could not be started."""
    shortage = memory_shortage(make_budget(subject.hardware, subject.profile, limits), limits.memory_bytes)
    if shortage:
        remedy = "lower --memory, or leave it out for the profile's share"
        raise RefusedError(subject, shortage, f"Try: {remedy}.", (remedy,))


def _measures(options: argparse.Namespace, profile: Profile) -> bool:
    asked = bool(getattr(options, "measure", False))
    if asked and profile.device == "cpu":
        raise LauncherError(
            ExitCode.USAGE,
            f"--measure needs a GPU: on a CPU (profile {profile.name}) vLLM does not measure its memory at the start.",
        )
    return asked


def read_machine(options: argparse.Namespace) -> Hardware:
    """Return this machine, or the recorded one of --machine.

    Raises:
        LauncherError: 66, if that folder is not there; 4, if the machine does not tell its memory.

    """
    recorded: Path | None = getattr(options, "machine", None)
    if recorded is None:
        return probe()
    if not recorded.is_dir():
        raise LauncherError(
            ExitCode.INPUT_NOT_FOUND,
            f"The recorded machine {recorded} is no folder.",
            "--machine takes a folder with the machine's /proc, /sys and /dev below it, as in tests/machines.",
        )
    return probe(recorded, {})


def read_model(model: Path, policy: str | None, form: Format) -> ModelFootprint:
    """Return the checkpoint, or what it would be under a policy.

    Raises:
        LauncherError: 66 or 65, if the checkpoint is not there or broken; 78, if there is no such policy.

    """
    folder = model.absolute()
    if policy is not None:
        return assume_footprint(folder, form, policy)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*")):
        raise LauncherError(
            ExitCode.BAD_CHECKPOINT,
            f"{folder} holds a config.json and no *.safetensors file.",
            "Download or make the checkpoint. To plan from config.json alone: --policy "
            + " | ".join(form.policies)
            + ".",
        )
    return read_footprint(folder, form)


def find_profile(asked: str | None, configs_dir: Path, hardware: Hardware) -> tuple[Profile, list[str]]:
    """Return the profile asked for (--profile, else STEP128_PROFILE), or the one for this machine, and warnings.

    Raises:
        LauncherError: 78, if there is no such profile, it or a shipped one is broken; 4, if none is for this machine.

    """
    user_dir = user_profiles_dir()
    name = asked or os.environ.get("STEP128_PROFILE") or AUTO
    if name != AUTO:
        return load_profile(configs_dir, name, user_dir), []
    if not hardware.has_gpu and not hardware.usable_gpus:
        # Nothing to choose between: the other files need not be read.
        profiles, broken = load_profiles(configs_dir, user_dir, only="cpu")
        return profiles["cpu"], [_skipped(reason) for reason in broken.values()]
    profiles, broken = load_profiles(configs_dir, user_dir)
    return profiles[choose_profile(profiles, hardware)], [_skipped(reason) for reason in broken.values()]


def _skipped(reason: str) -> str:
    return f"Not considered, because it is broken: {reason}"


def read_measurements(hardware: Hardware, footprint: ModelFootprint) -> Calibration:
    """Return what earlier starts of this model on this machine measured, and what is wrong with their file."""
    found = load_calibration(hardware)
    if not found.measurements:
        return found
    model = model_fingerprint(footprint.path)
    mine = tuple(measurement for measurement in found.measurements if measurement.settings.model == model)
    return replace(found, measurements=mine)


def limits_of(options: argparse.Namespace) -> Limits:
    """Return what the user fixed."""
    return Limits(
        max_model_len=options.max_model_len,
        num_speculative_tokens=options.num_speculative_tokens,
        kv_cache_dtype=options.kv_cache_dtype,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        tensor_parallel_size=options.tensor_parallel_size,
        dtype=options.dtype,
        block_size=options.block_size,
        enforce_eager=options.enforce_eager,
        memory_bytes=options.memory,
        vision=options.vision,
        attention_backend=options.attention_backend,
        enable_expert_parallel=options.enable_expert_parallel,
        pipeline_parallel_size=options.pipeline_parallel_size,
        objective=options.objective,
        acceptance=options.acceptance,
        acceptance_unconditional=options.acceptance_unconditional,
    )


def _access_limits(options: argparse.Namespace) -> AccessLimits:
    return AccessLimits(
        max_body_bytes=options.max_body_size,
        max_tokens=options.max_tokens_per_request,
        max_images=options.max_images,
        max_image_bytes=options.max_image_size,
        max_image_pixels=options.max_image_pixels,
        media_domains=options.allow_media_domains,
    )


def state_dir(options: argparse.Namespace) -> Path:
    """Return the folder for log, key and status of the server on this port."""
    if options.state_dir is not None:
        folder: Path = options.state_dir
        return folder.absolute()
    return user_folder("XDG_STATE_HOME") / str(options.port)

"""`step128`: plan a server, start and watch it, list the hardware profiles."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from step128_launcher import consoles
from step128_launcher.api_key import find_api_key
from step128_launcher.checkpoint import ModelFootprint, read_footprint
from step128_launcher.choices import memory_shortage
from step128_launcher.command import (
    Server,
    check_plugin_allowed,
    environment_changes,
    server_argv,
    server_environment,
)
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.errors import INTERRUPTED, ExitCode, LauncherError
from step128_launcher.exporter import Exporter
from step128_launcher.files import make_private_folder
from step128_launcher.hardware import probe
from step128_launcher.lock import hold_lock
from step128_launcher.machine.types import Hardware
from step128_launcher.options import parse
from step128_launcher.plan import DoesNotFitError, Limits, Plan
from step128_launcher.plan_json import error_document, plan_document
from step128_launcher.planner import make_plan
from step128_launcher.profiles import Profile, list_profiles, load_profile
from step128_launcher.progress import Progress
from step128_launcher.quantization import read_format
from step128_launcher.render import print_command, print_error, print_memory, print_plan
from step128_launcher.serve import Job, Supervisor
from step128_launcher.status import ServerStatus


@dataclass(frozen=True)
class Planned:
    """A plan with all it was made from."""

    plan: Plan
    footprint: ModelFootprint
    hardware: Hardware
    profile: Profile
    server: Server


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see the --help epilog."""
    options = parse({"plan": _plan, "serve": _serve, "profiles": _profiles}, arguments)
    try:
        code: ExitCode = options.run(options)
    except LauncherError as error:
        code = error.exit_code
        _show(error, as_json=getattr(options, "json", False))
    except KeyboardInterrupt:
        return INTERRUPTED
    _print("", end="")
    return int(code)


def _show(error: LauncherError, as_json: bool) -> None:
    if as_json:
        _print(json.dumps(error_document(error), indent=1))
    elif isinstance(error, DoesNotFitError):
        print_memory(consoles.stderr(), error.memory)
    print_error(consoles.stderr(), error)


def _print(text: str, end: str = "\n") -> None:
    """Print and flush; a reader that went away (such as `head`) has seen all it wanted."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        consoles.silence(sys.stdout.fileno())


def _plan(options: argparse.Namespace) -> ExitCode:
    planned = _make(options)
    if options.json:
        document = plan_document(planned.plan, planned.footprint, planned.hardware, planned.server)
        _print(json.dumps(document, indent=1))
    else:
        print_plan(consoles.stdout(), planned.plan, planned.footprint, planned.hardware)
    return ExitCode.OK


def _serve(options: argparse.Namespace) -> ExitCode:
    check_plugin_allowed(os.environ)
    planned = _make(options)
    plan, server, state_dir = planned.plan, planned.server, _state_dir(options)
    shortage = memory_shortage(planned.hardware, options.memory)
    if shortage:
        raise LauncherError(ExitCode.DOES_NOT_FIT, shortage, "Lower it, or leave it out for the profile's share.")
    if options.dry_run:
        api_key = find_api_key(options.api_key_file, os.environ, state_dir, generate=False)
        changes = environment_changes(plan, server)
        print_command(consoles.stdout(), server_argv(plan, server), changes, api_key.shell_word)
        return ExitCode.OK
    print_plan(consoles.stderr(), plan, planned.footprint, planned.hardware)
    make_private_folder(state_dir)
    with hold_lock(state_dir):
        return _run(options, planned, state_dir)


def _run(options: argparse.Namespace, planned: Planned, state_dir: Path) -> ExitCode:
    """Serve until the end, the plan's metrics beside it."""
    plan, server, console = planned.plan, planned.server, consoles.stderr()
    api_key = find_api_key(options.api_key_file, os.environ, state_dir)
    console.print(f"The API key is in {api_key.source}.", markup=False, highlight=False, soft_wrap=True)
    job = Job(
        plan=plan,
        footprint=planned.footprint,
        server=server,
        api_key=api_key.value,
        argv=server_argv(plan, server),
        environment=server_environment(os.environ, plan, server, api_key.value),
        state_dir=state_dir,
        start_timeout_seconds=planned.profile.start_timeout_seconds,
    )
    status = ServerStatus()
    supervisor = Supervisor(job, status, Progress(console))
    if not options.metrics_port:
        return supervisor.run()
    exporter = Exporter(plan, status, "127.0.0.1", options.metrics_port)
    try:
        return supervisor.run()
    finally:
        exporter.close()


def _profiles(options: argparse.Namespace) -> ExitCode:
    configs_dir = find_configs_dir()
    profiles = [load_profile(configs_dir, name) for name in list_profiles(configs_dir)]
    if options.json:
        _print(json.dumps({"schema": 1, "profiles": [asdict(profile) for profile in profiles]}, indent=1))
        return ExitCode.OK
    for profile in profiles:
        _print(f"{profile.name:12} {profile.description}")
    return ExitCode.OK


def _make(options: argparse.Namespace) -> Planned:
    """Read the machine, the profile and the checkpoint, and plan."""
    configs_dir = find_configs_dir()
    hardware = probe()
    profile = load_profile(configs_dir, _profile_name(options.profile, hardware))
    footprint = read_footprint(options.model.absolute(), read_format(configs_dir))
    limits = Limits(
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
    )
    server = Server(
        model=footprint.path,
        served_model_name=options.served_model_name or footprint.path.resolve().name,
        host=options.host,
        port=options.port,
        load_report_dir=_state_dir(options) / "load-reports",
        shutdown_timeout_seconds=profile.shutdown_timeout_seconds,
    )
    return Planned(make_plan(hardware, footprint, profile, limits), footprint, hardware, profile, server)


def _profile_name(asked: str, hardware: Hardware) -> str:
    if asked != "auto":
        return asked
    if hardware.has_gpu:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            "This machine has a GPU, and this release has no GPU profiles yet.",
            "To serve on the CPU all the same: --profile cpu.",
        )
    return "cpu"


def _state_dir(options: argparse.Namespace) -> Path:
    if options.state_dir is not None:
        folder: Path = options.state_dir
        return folder.absolute()
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "step128" / str(options.port)


if __name__ == "__main__":
    sys.exit(main())

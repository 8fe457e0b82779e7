"""`step128 serve`: from a plan to a supervised server, its metrics beside it."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from step128_launcher import consoles
from step128_launcher.access import METRICS_TOKEN_VARIABLE
from step128_launcher.api_key import find_api_key, find_metrics_token
from step128_launcher.command import (
    API_KEY_VARIABLE,
    check_plugin_allowed,
    environment_changes,
    server_argv,
    server_environment,
)
from step128_launcher.commands.calibrate import calibration_document
from step128_launcher.commands.plan_json import plan_document
from step128_launcher.commands.planned import Planned, make_planned, state_dir
from step128_launcher.commands.preconditions import check_machine
from step128_launcher.commands.render import print_command, print_plan
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.doctor import run_doctor
from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.files import make_private_folder
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.job import Job, Patience
from step128_launcher.supervisor.lock import hold_lock
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.serve import Supervisor
from step128_launcher.supervisor.service import run_service
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.status import ServerStatus
from step128_launcher.telemetry.collector import TelemetryCollector

_SERVED_METHODS = ("nl4",)
_TELEMETRY_ROOT = "STEP128_TELEMETRY_ROOT"  # where /sys and /proc are for the telemetry alone


def print_dry_run(options: argparse.Namespace, planned: Planned) -> None:
    """Print the environment and argv that `serve` would start vLLM with."""
    api_key = find_api_key(getattr(options, "api_key_file", None), os.environ, state_dir(options), generate=False)
    keys = {API_KEY_VARIABLE: api_key.shell_word}
    token = find_metrics_token(getattr(options, "metrics_token_file", None), os.environ, api_key)
    if token is not None:
        keys[METRICS_TOKEN_VARIABLE] = token.shell_word
    changes = environment_changes(planned.plan, planned.server, planned.base)
    print_command(consoles.stdout(), server_argv(planned.plan, planned.server), changes, keys)


def run_serve(options: argparse.Namespace) -> ExitCode:
    """Plan and serve until the end. As a service, what a restart cannot cure is held: up, unhealthy, with the reason.

    Raises:
        LauncherError: see ExitCode; as a service only 2, if there is no metrics port.

    """
    if options.dry_run:
        check_plugin_allowed(os.environ)
        planned = make_planned(options)
        _check_servable(planned)
        print_dry_run(options, planned)
        return ExitCode.OK
    service = _is_service(options)
    status, progress, stop = ServerStatus(), Progress(consoles.stderr()), StopSignals()

    def work() -> ExitCode:
        # The port opens before there is a plan: what goes wrong while planning is to be seen there too.
        with contextlib.ExitStack() as stack:
            if options.metrics_port:
                exporter = Exporter(status, options.metrics_host, options.metrics_port, [_telemetry()])
                stack.callback(exporter.close)
            return run_service(
                lambda: _serve(options, status, progress, stop, service), status, progress.say, stop, service
            )

    with stop:
        # A metrics port that cannot be opened is held like the rest, though nobody can ask it.
        return run_service(work, status, progress.say, stop, service)


def _telemetry() -> TelemetryCollector:
    """Return the collector of this machine; the proof of the container stack gives it a recorded one.

    Raises:
        LauncherError: 78, if STEP128_TELEMETRY_ROOT names no folder.

    """
    root = Path(os.environ.get(_TELEMETRY_ROOT) or "/")
    if not root.is_dir():
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"{_TELEMETRY_ROOT} is {root}, which is not a folder.",
            "It needs one with /sys and /proc below it, as tests/machines has; unset it for this machine's own.",
        )
    return TelemetryCollector(root, _say)


def _say(text: str) -> None:
    """Print a line from any thread; where stderr is gone there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _is_service(options: argparse.Namespace) -> bool:
    asked = options.service
    service = os.environ.get("STEP128_SERVICE", "") not in ("", "0") if asked is None else bool(asked)
    if service and not options.metrics_port:
        raise LauncherError(
            ExitCode.USAGE, "--service needs --metrics-port: /health there is where a failure is to be seen."
        )
    return service


def _serve(
    options: argparse.Namespace, status: ServerStatus, progress: Progress, stop: StopSignals, service: bool
) -> ExitCode:
    check_plugin_allowed(os.environ)
    planned = make_planned(options, with_fallbacks=True)
    _check_servable(planned)
    if stop:
        return ExitCode.OK
    if planned.plan.device != "cpu":
        findings = run_doctor(
            planned.hardware,
            planned.profile.name,
            os.environ,
            configs_dir=find_configs_dir(),
            model=None,
            all_reduce=False,
        )
        check_machine(findings, progress.say)
    if stop:
        return ExitCode.OK
    folder = state_dir(options)
    print_plan(consoles.stderr(), planned.plan, planned.footprint, planned.hardware)
    make_private_folder(folder)
    with hold_lock(folder):
        return _run(options, planned, folder, status, progress, stop, service)


def _check_servable(planned: Planned) -> None:
    quantization = planned.footprint.quantization
    if quantization is not None and quantization.method not in _SERVED_METHODS:
        raise CheckpointError(
            f"{planned.footprint.path} is quantized with {quantization.method}; step128 plans such a checkpoint but "
            "serves NL4 and unquantized ones only: nothing would check that its weights and scales took effect.",
            "Start vLLM with it by hand (`step128 plan --dry-run` prints the flags), or quantize the bf16 checkpoint.",
        )


def _run(
    options: argparse.Namespace,
    planned: Planned,
    folder: Path,
    status: ServerStatus,
    progress: Progress,
    stop: StopSignals,
    service: bool,
) -> ExitCode:
    server = planned.server
    api_key = find_api_key(options.api_key_file, os.environ, folder)
    progress.say(f"The API key is in {api_key.source}.")
    token = find_metrics_token(options.metrics_token_file, os.environ, api_key)
    token_value = None if token is None else token.value

    def make_job(plan: Plan) -> Job:
        return Job(
            plan=plan,
            footprint=planned.footprint,
            server=server,
            api_key=api_key.value,
            argv=server_argv(plan, server),
            environment=server_environment(os.environ, plan, server, api_key.value, token_value),
            state_dir=folder,
            start_timeout_seconds=planned.profile.start_timeout_seconds,
            plan_document=plan_document(plan, planned.footprint, planned.hardware, server)
            | {"calibration": calibration_document(plan, planned.footprint.path, planned.hardware)},
        )

    patience = Patience(
        max_step_downs=options.max_step_downs,
        max_restarts=options.max_restarts,
        hang_seconds=options.hang_seconds,
        service=service,
    )
    return Supervisor(make_job, planned.plan, status, progress, stop, patience).run()

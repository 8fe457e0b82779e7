"""`step128 serve`: from a plan to a supervised server, its metrics beside it."""

import argparse
import os
from pathlib import Path

from step128_launcher import consoles
from step128_launcher.api_key import find_api_key
from step128_launcher.budget import make_budget, memory_shortage
from step128_launcher.command import check_plugin_allowed, environment_changes, server_argv, server_environment
from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.exporter import Exporter
from step128_launcher.files import make_private_folder
from step128_launcher.job import Job, Patience
from step128_launcher.lock import hold_lock
from step128_launcher.plan import Plan
from step128_launcher.plan_json import plan_document
from step128_launcher.planning import Planned, make_planned, state_dir
from step128_launcher.progress import Progress
from step128_launcher.render import print_command, print_plan
from step128_launcher.serve import Supervisor
from step128_launcher.status import ServerStatus

_SERVED_METHODS = ("nl4",)


def print_dry_run(options: argparse.Namespace, planned: Planned) -> None:
    """Print the environment and argv that `serve` would start vLLM with."""
    api_key = find_api_key(getattr(options, "api_key_file", None), os.environ, state_dir(options), generate=False)
    changes = environment_changes(planned.plan, planned.server)
    print_command(consoles.stdout(), server_argv(planned.plan, planned.server), changes, api_key.shell_word)


def run_serve(options: argparse.Namespace) -> ExitCode:
    """Plan and serve until the end.

    Raises:
        LauncherError: see ExitCode.

    """
    check_plugin_allowed(os.environ)
    planned = make_planned(options, with_fallbacks=True)
    _check_servable(options, planned)
    if options.dry_run:
        print_dry_run(options, planned)
        return ExitCode.OK
    folder = state_dir(options)
    print_plan(consoles.stderr(), planned.plan, planned.footprint, planned.hardware)
    make_private_folder(folder)
    with hold_lock(folder):
        return _run(options, planned, folder)


def _check_servable(options: argparse.Namespace, planned: Planned) -> None:
    quantization = planned.footprint.quantization
    if quantization is not None and quantization.method not in _SERVED_METHODS:
        raise CheckpointError(
            f"{planned.footprint.path} is quantized with {quantization.method}; step128 plans such a checkpoint but "
            "serves NL4 and unquantized ones only: nothing would check that its weights and scales took effect.",
            "Start vLLM with it by hand (`step128 plan --dry-run` prints the flags), or quantize the bf16 checkpoint.",
        )
    shortage = memory_shortage(make_budget(planned.hardware, planned.profile, planned.limits), options.memory)
    if shortage:
        raise LauncherError(ExitCode.DOES_NOT_FIT, shortage, "Lower it, or leave it out for the profile's share.")


def _run(options: argparse.Namespace, planned: Planned, folder: Path) -> ExitCode:
    """Serve until the end, the plan's metrics beside it."""
    console, server = consoles.stderr(), planned.server
    api_key = find_api_key(options.api_key_file, os.environ, folder)
    console.print(f"The API key is in {api_key.source}.", markup=False, highlight=False, soft_wrap=True)

    def make_job(plan: Plan) -> Job:
        return Job(
            plan=plan,
            footprint=planned.footprint,
            server=server,
            api_key=api_key.value,
            argv=server_argv(plan, server),
            environment=server_environment(os.environ, plan, server, api_key.value),
            state_dir=folder,
            start_timeout_seconds=planned.profile.start_timeout_seconds,
            plan_document=plan_document(plan, planned.footprint, planned.hardware, server),
        )

    status = ServerStatus()
    patience = Patience(max_step_downs=options.max_step_downs, max_restarts=options.max_restarts)
    supervisor = Supervisor(make_job, planned.plan, status, Progress(console), patience)
    if not options.metrics_port:
        return supervisor.run()
    exporter = Exporter(status, options.metrics_host, options.metrics_port)
    try:
        return supervisor.run()
    finally:
        exporter.close()

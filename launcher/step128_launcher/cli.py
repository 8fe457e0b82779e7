"""The `step128` command: plan, serve, profiles, doctor, calibrate, status; for containers secrets, up, logs, down."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from step128_launcher.commands.options import parse
from step128_launcher.errors import INTERRUPTED, ExitCode, LauncherError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see the --help epilog."""
    commands = {
        "plan": _plan,
        "serve": _serve,
        "profiles": _profiles,
        "doctor": _doctor,
        "calibrate": _calibrate,
        "status": _status,
        "secrets": _secrets,
        "up": _up,
        "logs": _logs,
        "down": _down,
    }
    options = parse(commands, arguments)
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
    # Only what a command needs is imported: a plan should be there in a fraction of a second.
    from step128_launcher import consoles
    from step128_launcher.commands import render
    from step128_launcher.commands.plan_json import error_document
    from step128_launcher.commands.refusal import RefusedError

    if as_json:
        _print(json.dumps(error_document(error), indent=1))
    if isinstance(error, RefusedError) and not as_json:
        render.print_refusal(consoles.stderr(), error)
    else:
        render.print_error(consoles.stderr(), error)


def _print(text: str, end: str = "\n") -> None:
    """Print and flush; a reader that went away (such as `head`) has seen all it wanted."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plan(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.plan_json import plan_document
    from step128_launcher.commands.planned import make_planned

    planned = make_planned(options)
    plan = planned.plan
    if options.json:
        document = plan_document(plan, planned.footprint, planned.hardware, planned.server, planned.base)
        if options.candidates:
            from step128_launcher.planning.planner import all_candidates

            document["candidates"] = all_candidates(
                planned.hardware, planned.footprint, planned.profile, planned.limits, planned.measurements
            )
        _print(json.dumps(document, indent=1))
        return ExitCode.OK
    from step128_launcher import consoles
    from step128_launcher.commands import render

    if options.explain:
        from step128_launcher.commands.explanation import explain_item

        found = explain_item(plan, options.explain)
        if not found:
            names = ", ".join(line.name for line in plan.memory.lines)
            raise LauncherError(
                ExitCode.USAGE,
                f"The plan has no item {options.explain!r}.",
                f"Memory items: {names}; or a setting, such as max_model_len or num_speculative_tokens.",
            )
        render.print_explanation(consoles.stdout(), found)
    elif options.dry_run:
        from step128_launcher.commands.serving import print_dry_run

        print_dry_run(options, planned)
    else:
        render.print_plan(consoles.stdout(), plan, planned.footprint, planned.hardware)
    return ExitCode.OK


def _serve(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.serving import run_serve

    return run_serve(options)


def _profiles(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.listing import as_text, list_entries
    from step128_launcher.commands.planned import read_machine, read_model
    from step128_launcher.configs_dir import find_configs_dir
    from step128_launcher.model.quantization import read_format
    from step128_launcher.planning.profiles import load_profiles, user_profiles_dir

    configs_dir = find_configs_dir()
    profiles, broken = load_profiles(configs_dir, user_profiles_dir())
    form = read_format(configs_dir)
    footprint = None if options.model is None else read_model(options.model, options.policy, form)
    asked = os.environ.get("STEP128_PROFILE")
    entries = list_entries(profiles, read_machine(options), footprint, form, broken, asked)
    if options.json:
        listed = [asdict(entry) if entry.broken else asdict(profiles[entry.name]) | asdict(entry) for entry in entries]
        _print(json.dumps({"schema": 2, "profiles": listed}, indent=1))
    else:
        _print(as_text(entries, None if options.model is None else str(options.model)))
    return ExitCode.OK


def _doctor(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.doctor_command import run_doctor_command

    return run_doctor_command(options)


def _calibrate(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.calibrate import run_calibrate
    from step128_launcher.commands.planned import state_dir

    return run_calibrate(options, state_dir(options))


def _status(options: argparse.Namespace) -> ExitCode:
    if options.stack:
        from step128_launcher.commands.stack_status_command import run_stack_status

        return run_stack_status(options)
    from step128_launcher.commands.planned import state_dir
    from step128_launcher.commands.status_command import run_status

    return run_status(options, state_dir(options))


def _secrets(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.secrets_command import run_secrets

    return run_secrets(options)


def _up(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.up_command import run_up

    return run_up(options)


def _logs(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.logs_command import run_logs

    return run_logs(options)


def _down(options: argparse.Namespace) -> ExitCode:
    from step128_launcher.commands.down_command import run_down

    return run_down(options)


if __name__ == "__main__":
    sys.exit(main())

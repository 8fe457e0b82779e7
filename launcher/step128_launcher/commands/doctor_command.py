"""`step128 doctor` from the command line: read the machine, run the checks, print them, and say how it went."""

import argparse
import json
import os
from pathlib import Path

from step128_launcher import consoles
from step128_launcher.commands.planned import read_machine
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.doctor import any_failed, findings_document, print_findings, run_doctor
from step128_launcher.errors import ExitCode, LauncherError


def run_doctor_command(options: argparse.Namespace) -> ExitCode:
    """Print all findings; return 0, or 1 if one of them is FAIL.

    Raises:
        LauncherError: 2, if a collective is asked for on a recorded machine; others as `read_machine`.

    """
    recorded: Path | None = options.machine
    collective = options.all_reduce or options.all_reduce_on_cpu
    if recorded is not None and collective:
        raise LauncherError(
            ExitCode.USAGE, "--all-reduce runs on this machine, so it cannot be combined with --machine."
        )
    findings = run_doctor(
        read_machine(options),
        options.profile or os.environ.get("STEP128_PROFILE"),
        os.environ if recorded is None else {},
        configs_dir=find_configs_dir(),
        model=None if options.model is None else options.model.absolute(),
        all_reduce=options.all_reduce,
        all_reduce_on_cpu=options.all_reduce_on_cpu,
        root=recorded or Path("/"),
    )
    if options.json:
        print(json.dumps(findings_document(findings), indent=1))
    else:
        print_findings(consoles.stdout(), findings)
    return ExitCode.INTERNAL if any_failed(findings) else ExitCode.OK

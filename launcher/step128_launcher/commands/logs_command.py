"""`step128 logs`: what the stack's services print, by compose."""

import argparse

from step128_launcher.errors import INTERRUPTED, ExitCode, LauncherError
from step128_launcher.stack.compose import Compose, project_name
from step128_launcher.stack.engine import check_versions, connect, engine_errors, find_docker
from step128_launcher.stack.services import read_states


@engine_errors()
def run_logs(options: argparse.Namespace) -> ExitCode:
    """Print them. Arguments (argparse names): service, follow, tail, project_directory, project_name.

    Raises:
        LauncherError: 66, if nothing of the stack is there; 2, if it has no such service; and as `connect`.

    """
    command = find_docker()
    client = connect(command)
    check_versions(client, command)
    project = project_name(options.project_name, options.project_directory)
    services = [state.service for state in read_states(client, project)]
    if not services:
        raise nothing_there(project)
    if options.service is not None and options.service not in services:
        raise LauncherError(
            ExitCode.USAGE, f"{project} has no service {options.service!r} now.", f"It has: {', '.join(services)}."
        )
    compose = Compose(command, options.project_directory.resolve(), project=project)
    arguments = ["logs", "--tail", str(options.tail), *(["--follow"] if options.follow else [])]
    arguments += [] if options.service is None else [options.service]
    code = compose.run(*arguments, to_stdout=True)
    if code not in (0, INTERRUPTED):
        raise LauncherError(ExitCode.SERVER_FAILED, f"`docker compose logs` failed (exit status {code}).")
    return ExitCode.OK


def nothing_there(project: str) -> LauncherError:
    """Return the error of a stack that has no container."""
    return LauncherError(
        ExitCode.INPUT_NOT_FOUND,
        f"There is no container of {project}.",
        "`step128 up` starts the stack; --project-name names another.",
    )

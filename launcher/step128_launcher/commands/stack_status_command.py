"""`step128 status --stack`: each service's state, health, restarts, ports, image and uptime."""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from step128_launcher import consoles
from step128_launcher.commands.logs_command import nothing_there
from step128_launcher.errors import ExitCode
from step128_launcher.stack.compose import project_name
from step128_launcher.stack.engine import connect, engine_errors, find_docker
from step128_launcher.stack.project import SERVER
from step128_launcher.stack.services import ServiceState, launcher_health, read_states

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@engine_errors()
def run_stack_status(options: argparse.Namespace) -> ExitCode:
    """Print it; return 0 if every service is up, else 69. Arguments: json, project_directory, project_name.

    Raises:
        LauncherError: 66, if there is no container of the stack; and as `connect`.

    """
    client = connect(find_docker())
    project = project_name(options.project_name, options.project_directory)
    states = read_states(client, project)
    if not states:
        raise nothing_there(project)
    server = {}
    if any(state.service == SERVER and state.state == "running" for state in states):
        server = launcher_health(client, project, SERVER)
    now = datetime.now(UTC)
    console = consoles.stdout()
    if options.json:
        services = [asdict(state) | {"up": state.up, "uptime_seconds": state.uptime_seconds(now)} for state in states]
        lines = [json.dumps({"schema": 1, "project": project, "server": server, "services": services}, indent=1)]
    else:
        console.print(_table(states, now))
        lines = _words(states, server)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return ExitCode.OK if all(state.up for state in states) else ExitCode.SERVER_FAILED


def _table(states: list[ServiceState], now: datetime) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Service", "State", "Health", "Restarts", "Up for", "Ports", "Image"):
        table.add_column(heading, justify="right" if heading == "Restarts" else "left", overflow="fold")
    for state in states:
        shown = state.state if state.state == "running" else f"{state.state} ({state.exit_code})"
        uptime = state.uptime_seconds(now)
        table.add_row(
            state.service,
            shown,
            state.health or "-",
            str(state.restarts),
            "-" if uptime is None else _duration(uptime),
            "\n".join(state.ports) or "-",
            state.image,
        )
    return table


def _words(states: list[ServiceState], server: dict[str, Any]) -> list[str]:
    """Return a line for each service that is not well, and one for what the launcher says."""
    lines = []
    if server:
        said = [server.get("state"), server.get("reason"), server.get("hint")]
        lines.append("Launcher: " + " ".join(str(word) for word in said if word))
    for state in states:
        if not state.up and state.says and not (state.service == SERVER and server):
            lines.append(f"{state.service}: {state.says}")
    return lines


def _duration(seconds: float) -> str:
    size, unit = next((each for each in _UNITS if seconds >= 2 * each[0]), _UNITS[-1])
    return f"{seconds / size:.0f} {unit}"

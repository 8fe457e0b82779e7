"""How the stack's containers are doing, as the engine sees them, and what the launcher inside of one says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from docker.errors import APIError, NotFound

_LABEL = "com.docker.compose"
# A line that the launcher prints of its progress: seconds since its start, and what it does.
_PROGRESS = re.compile(r"^\[ *[\d.]+ s\] (.+)$")
# The engine notes a start a moment after the program has begun to print.
_HEAD_START_SECONDS = 2.0
_ASK_LAUNCHER = """\
import urllib.error, urllib.request
try:
    answer = urllib.request.urlopen("http://127.0.0.1:9128/health", timeout=4)
except urllib.error.HTTPError as error:
    answer = error
print(answer.read().decode())
"""


@dataclass(frozen=True)
class ServiceState:
    """One container of the stack. `health` is None where its image and compose ask for no check of it.

    `says` is what its last health check printed.
    """

    service: str
    container: str
    state: str
    health: str | None
    exit_code: int
    restarts: int
    image: str
    ports: tuple[str, ...]
    started_at: str
    says: str

    @property
    def up(self) -> bool:
        """Whether it runs and, where that is checked, is well."""
        return self.state == "running" and self.health in (None, "healthy")

    def uptime_seconds(self, now: datetime) -> float | None:
        """Return how long it has been running, or None."""
        if self.state != "running":
            return None
        # The engine writes nanoseconds, Python reads microseconds.
        started = datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", self.started_at))
        return max(0.0, (now - started.astimezone(UTC)).total_seconds())


def find_containers(client: Any, project: str) -> dict[str, Any]:
    """Return service -> container of the project, stopped ones included, those of `docker compose run` not."""
    listed = client.containers.list(all=True, filters={"label": f"{_LABEL}.project={project}"}, ignore_removed=True)
    return {
        each.labels[f"{_LABEL}.service"]: each
        for each in sorted(listed, key=lambda each: str(each.name))
        if each.labels.get(f"{_LABEL}.oneoff") != "True" and f"{_LABEL}.service" in each.labels
    }


def read_states(client: Any, project: str) -> list[ServiceState]:
    """Return the state of each of the project's containers, by service."""
    return [_state(name, container) for name, container in sorted(find_containers(client, project).items())]


def own_ports(client: Any, project: str) -> set[int]:
    """Return the ports of this machine that the project's running containers hold."""
    return {
        int(port)
        for state in read_states(client, project)
        if state.state == "running"
        for port in (shown.rpartition("->")[0].rpartition(":")[2] for shown in state.ports)
    }


def last_lines(client: Any, project: str, service: str, count: int, since: str | None = None) -> list[str]:
    """Return the last lines that a service printed, none where there are none; `since` is a ServiceState's start."""
    container = find_containers(client, project).get(service)
    if container is None:
        return []
    options = {} if since is None else {"since": _moment(since) - _HEAD_START_SECONDS}
    try:
        text = container.logs(tail=count, **options)
    except (APIError, OSError):
        return []
    return [line.rstrip() for line in text.decode(errors="replace").splitlines() if line.strip()]


def launcher_progress(lines: list[str]) -> str | None:
    """Return what the launcher's last line of progress says, such as how far the weights are."""
    return next((match[1] for line in reversed(lines) if (match := _PROGRESS.match(line))), None)


def launcher_health(client: Any, project: str, service: str) -> dict[str, Any]:
    """Return what the launcher in a running container answers to /health; empty where it does not."""
    container = find_containers(client, project).get(service)
    if container is None:
        return {}
    try:
        code, output = container.exec_run(["python3", "-I", "-c", _ASK_LAUNCHER], stderr=False)
        document = json.loads(output) if code == 0 else {}
    except (APIError, OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def volume_names(client: Any, project: str) -> list[str]:
    """Return the names of the project's volumes."""
    return sorted(volume.name for volume in client.volumes.list(filters={"label": f"{_LABEL}.project={project}"}))


def _state(service: str, container: Any) -> ServiceState:
    try:
        container.reload()
    except NotFound:
        return ServiceState(service, str(container.name), "removed", None, 0, 0, "", (), "", "")
    found, state = container.attrs, container.attrs["State"]
    health = state.get("Health") or {}
    log = health.get("Log") or [{}]
    return ServiceState(
        service=service,
        container=str(container.name),
        state=str(state["Status"]),
        health=None if health.get("Status") in (None, "none") else str(health["Status"]),
        exit_code=int(state.get("ExitCode") or 0),
        restarts=int(found.get("RestartCount") or 0),
        image=str(found["Config"]["Image"]),
        ports=tuple(_ports(found)),
        started_at=str(state.get("StartedAt") or ""),
        says=str(log[-1].get("Output") or "").strip(),
    )


def _ports(found: Any) -> list[str]:
    listed = (found.get("NetworkSettings") or {}).get("Ports") or {}
    return [
        f"{binding['HostIp']}:{binding['HostPort']}->{inside}"
        for inside, bindings in sorted(listed.items())
        for binding in bindings or []
    ]


def _moment(text: str) -> float:
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text)).timestamp()

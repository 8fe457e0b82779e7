"""Waits until every service is up, and says meanwhile how far each is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.stack.project import SERVER
from step128_launcher.stack.services import (
    ServiceState,
    last_lines,
    launcher_health,
    launcher_progress,
    read_states,
)

POLL_SECONDS = 2.0
_RESTARTS_TO_FAIL = 3
_GIVEN_UP = "failed"  # as the launcher calls it
_LOG_LINES = 40
SHOWN_LINES = 20


def wait_until_up(
    client: Any, project: str, services: Sequence[str], show: Callable[[str], None], limit_seconds: float
) -> None:
    """Return once all `services` are up; `show` is given one line again and again.

    Raises:
        LauncherError: of the service that failed (see `failure`); 69, if it takes longer than `limit_seconds`.

    """
    began = time.monotonic()
    before = {state.service: state.restarts for state in read_states(client, project)}
    while True:
        states = {state.service: state for state in read_states(client, project)}
        server = states.get(SERVER)
        health = {} if server is None or server.state != "running" else launcher_health(client, project, SERVER)
        # What the launcher gave up on, the engine's checks find out half a minute later.
        bad = server if health.get("state") == _GIVEN_UP else find_failed(states, services, before)
        if bad is not None:
            raise failure(client, project, bad)
        if all(name in states and states[name].up for name in services):
            return
        show("; ".join(f"{name}: {_doing(client, project, states.get(name), health)}" for name in services))
        if time.monotonic() - began > limit_seconds:
            late = [name for name in services if name not in states or not states[name].up]
            raise LauncherError(
                ExitCode.SERVER_FAILED,
                f"Not up after {limit_seconds:.0f} s: {', '.join(late)}. What was started goes on by itself.",
                "`step128 status --stack` says how it is, `step128 logs -f` what it prints; --timeout waits longer.",
            )
        time.sleep(POLL_SECONDS)


def find_failed(
    states: Mapping[str, ServiceState], services: Sequence[str], restarts_before: Mapping[str, int]
) -> ServiceState | None:
    """Return a service that will not come up by itself, or None."""
    for name in services:
        state = states.get(name)
        if state is None or state.up:
            continue
        again = state.restarts - restarts_before.get(name, 0) >= _RESTARTS_TO_FAIL
        if state.health == "unhealthy" or state.state in ("exited", "dead", "removed") or again:
            return state
    return None


def failure(client: Any, project: str, state: ServiceState) -> LauncherError:
    """Return the error of a service that failed: the launcher's own reason and exit code, where it gives them."""
    health = launcher_health(client, project, state.service) if state.service == SERVER else {}
    lines = last_lines(client, project, state.service, SHOWN_LINES)
    what = "failed" if health.get("state") == _GIVEN_UP else f"is {state.health or state.state}"
    if state.state != "running":
        what = f"is {state.state} (exit code {state.exit_code}, {state.restarts} restarts)"
    reason = str(health.get("reason") or state.says)
    said = "".join(f"\n  {line}" for line in lines) or " nothing"
    return LauncherError(
        _exit_code(health),
        f"{state.service} {what}{': ' if reason else '.'}{reason}\nThe last it printed:{said}",
        str(health.get("hint") or "")
        or f"`step128 logs {state.service}` shows all of it. Correct it, then `step128 up`; or `step128 down`.",
    )


def _doing(client: Any, project: str, state: ServiceState | None, health: Mapping[str, Any]) -> str:
    if state is None:
        return "not created yet"
    if state.up:
        return state.health or state.state
    if state.state != "running":
        return f"{state.state}, {state.restarts} restarts" if state.restarts else state.state
    if state.service != SERVER:
        return state.health or state.state
    progress = launcher_progress(last_lines(client, project, state.service, _LOG_LINES, state.started_at))
    words = [str(health.get("state") or "its launcher does not answer yet"), progress, health.get("reason")]
    return ", ".join(str(word) for word in words if word)


def _exit_code(health: Mapping[str, Any]) -> ExitCode:
    try:
        return ExitCode(health["exit_code"])
    except (KeyError, ValueError):
        return ExitCode.SERVER_FAILED

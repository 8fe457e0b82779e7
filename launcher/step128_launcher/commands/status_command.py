"""`step128 status`: how a server is, from status.json in its state folder and its own /health, asked now."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.client import ServerClient
from step128_launcher.supervisor.lock import is_held
from step128_launcher.supervisor.state_files import STATUS

_GONE = "gone"  # the launcher that wrote the file no longer runs
_PREPARING = "preparing"  # a launcher runs that has written none yet
_OVER = ("stopped", "failed")
_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def read_status(state_dir: Path) -> dict[str, Any]:
    """Return status.json with what is found out now.

    `launcher_alive`: a launcher holds the state folder's lock; `answers`: vLLM's /health does; `written_state` and
    `written_seconds_ago`: of the file; `earlier_run`: a later launcher took the lock, and has written none yet or ended
    before it could. `state` is "gone" for a launcher that was killed, whatever it wrote last, and "preparing" for one
    that has yet to write.

    Raises:
        LauncherError: 66, if there is no status.json; 5, if it may not be read; 65, if it is not one.

    """
    path = state_dir / STATUS
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        base_url, state = str(document["base_url"]), str(document["state"])
        int(document["launcher_pid"])
        written = path.stat().st_mtime
    except FileNotFoundError as error:
        raise LauncherError(
            ExitCode.INPUT_NOT_FOUND, f"No server was started with {state_dir}.", "Name its --state-dir or --port."
        ) from error
    except PermissionError as error:
        raise LauncherError(ExitCode.PERMISSION, f"{path} cannot be read: permission denied.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LauncherError(ExitCode.BAD_CHECKPOINT, f"{path} is no status of a server: {error!r}.") from error
    alive, earlier = is_held(state_dir), written < _locked_at(state_dir)
    found = {
        "written_state": state,
        "launcher_alive": alive,
        "answers": alive and not earlier and ServerClient(base_url, "").healthy(),
        "earlier_run": earlier,
        "written_seconds_ago": max(0.0, time.time() - written),
    }
    if alive and earlier:
        state = _PREPARING
    elif not alive and state not in _OVER:
        state = _GONE
    return {**document, "state": state, **found}


def run_status(options: argparse.Namespace, state_dir: Path) -> ExitCode:
    """Print it; return 0 if the server is ready and answers, else 69. Arguments (argparse names): json (bool)."""
    document = read_status(state_dir)
    serves = document["state"] == "ready" and document["answers"]
    print(json.dumps(document, indent=1) if options.json else _words(document))
    return ExitCode.OK if serves else ExitCode.SERVER_FAILED


def _words(document: dict[str, Any]) -> str:
    answers = "answers" if document["answers"] else "does not answer"
    lines = [
        f"State     {document['state']}; /health {answers}",
        f"Written   {_age(document['written_seconds_ago'])} ago{_note(document)}",
        f"URL       {document['base_url']}/v1, model {document.get('served_model_name')}, "
        f"context {document.get('max_model_len')}",
        f"Launcher  {_launcher(document)}",
    ]
    if document.get("start_seconds") is not None:
        lines.append(f"Start     {document['start_seconds']:.0f} s")
    if document.get("restarts"):
        counts = ", ".join(f"{count} ({reason})" for reason, count in document["restarts"].items())
        lines.append(f"Restarts  {counts}")
    if document.get("step_downs"):
        lines.append(f"Leaner    {document['step_downs']} steps down after out-of-memory")
    if document.get("failure"):
        failure = document["failure"]
        lines.append(f"Failed    {failure['reason']} {failure['hint']} (exit code {failure['exit_code']})")
    lines.append(f"Log       {document.get('log')}")
    return "\n".join(lines)


def _note(document: dict[str, Any]) -> str:
    """Return what to know about the file before it is believed."""
    if document["earlier_run"]:
        later = "has written none yet" if document["launcher_alive"] else "ended before it wrote one (see its output)"
        return f" by an earlier run, which was {document['written_state']}; a later launcher {later}"
    if document["state"] == _GONE:
        return f": {document['written_state']}, but its launcher is gone"
    return ""


def _launcher(document: dict[str, Any]) -> str:
    if not document["launcher_alive"]:
        return "not running"
    return "running" if document["earlier_run"] else f"process {document['launcher_pid']}, running"


def _age(seconds: float) -> str:
    size, unit = next((size, unit) for least, size, unit in _UNITS if seconds >= least)
    return f"{seconds / size:.0f} {unit}"


def _locked_at(state_dir: Path) -> float:
    """Return when a launcher took the lock last, in seconds since 1970; 0 if none did."""
    try:
        return (state_dir / "lock").stat().st_mtime
    except OSError:
        return 0.0

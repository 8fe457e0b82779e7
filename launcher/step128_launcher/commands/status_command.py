"""`step128 status`: how a server is, from status.json in its state folder and its own /health, asked now."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.client import ServerClient
from step128_launcher.supervisor.state_files import STATUS

_GONE = "gone"  # the launcher that wrote the file no longer runs
_OVER = ("stopped", "failed")


def read_status(state_dir: Path) -> dict[str, Any]:
    """Return status.json with `launcher_alive` and `answers` (whether vLLM's /health does), both found out now.

    The state of a launcher that was killed is "gone", whatever it wrote last.

    Raises:
        LauncherError: 66, if there is no status.json; 5, if it may not be read; 65, if it is not one.

    """
    path = state_dir / STATUS
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        base_url, launcher = str(document["base_url"]), int(document["launcher_pid"])
        state = str(document["state"])
    except FileNotFoundError as error:
        raise LauncherError(
            ExitCode.INPUT_NOT_FOUND, f"No server was started with {state_dir}.", "Name its --state-dir or --port."
        ) from error
    except PermissionError as error:
        raise LauncherError(ExitCode.PERMISSION, f"{path} cannot be read: permission denied.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LauncherError(ExitCode.BAD_CHECKPOINT, f"{path} is no status of a server: {error!r}.") from error
    alive = _runs(launcher)
    answers = alive and ServerClient(base_url, "").healthy()
    if not alive and state not in _OVER:
        state = _GONE
    return {**document, "state": state, "launcher_alive": alive, "answers": answers}


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
        f"URL       {document['base_url']}/v1, model {document.get('served_model_name')}, "
        f"context {document.get('max_model_len')}",
        f"Launcher  process {document['launcher_pid']}, {'running' if document['launcher_alive'] else 'not running'}",
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


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, but there
        return True
    return True

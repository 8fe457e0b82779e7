"""What a run leaves in the state folder for other programs: status.json and plan.json."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step128_launcher.errors import LauncherError
from step128_launcher.files import write_atomically
from step128_launcher.supervisor.job import Job
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.reality import Reality
from step128_launcher.supervisor.status import ServerStatus

STATUS, PLAN = "status.json", "plan.json"
_FAILURE = ("exit_code", "reason", "hint")


class StateFiles:
    """Writes them; unless `required`, a failure is only reported.

    A disk that fills up later must not leave vLLM unattended.
    """

    def __init__(self, job: Job, status: ServerStatus, progress: Progress) -> None:
        self._job, self._status, self._progress = job, status, progress
        self._vllm_pid: int | None = None

    def write_status(self, required: bool = False, vllm_pid: int | None = None) -> None:
        """Write what other programs need to find this server, and how it is.

        Raises:
            LauncherError: 5 or 73, if it is `required` and cannot be written.

        """
        self._vllm_pid = vllm_pid or self._vllm_pid
        now = self._status.snapshot()
        document = {
            "schema": 1,
            "state": now.state.value,
            "base_url": self._job.server.base_url,
            "served_model_name": self._job.server.served_model_name,
            "launcher_pid": os.getpid(),
            "vllm_pid": self._vllm_pid,
            "log": str(self._job.log),
            "start_seconds": now.start_seconds,
            "max_model_len": self._job.plan.max_model_len,
            "restarts": dict(now.restarts),
            "step_downs": now.step_downs,
            # The folder is private, so here the reason may quote the log, as it does on stderr.
            "failure": {name: asdict(now.failure)[name] for name in _FAILURE} if now.failure else None,
        }
        self._write(STATUS, document, required)

    def write_plan(self, reality: Reality | None = None) -> None:
        """Write the plan, once the server is ready with what it reports: its log may be cut later (log_cap.py)."""
        if self._job.plan_document:
            measured = {"reality": asdict(reality)} if reality else {}
            self._write(PLAN, {**self._job.plan_document, **measured}, required=False)

    def _write(self, name: str, document: Mapping[str, Any], required: bool) -> None:
        path: Path = self._job.state_dir / name
        try:
            write_atomically(path, json.dumps(document, indent=1) + "\n")
        except LauncherError as error:
            if required:
                raise
            self._progress.say(f"warning: {error.message}")

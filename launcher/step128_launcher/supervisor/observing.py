"""Asking a server that has just become ready what it runs: its load reports, /metrics and /v1/models."""

import http.client
import time
from collections.abc import Callable

from step128_launcher.supervisor.client import ServerClient
from step128_launcher.supervisor.failures import Reason, ServerFailedError
from step128_launcher.supervisor.job import Job
from step128_launcher.supervisor.load_report import read_load_reports
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.verify import Observation

_RETRY_SECONDS, _PAUSE_SECONDS = 30.0, 0.5


def observe(job: Job, client: ServerClient, stop: StopSignals, require_alive: Callable[[], None]) -> Observation | None:
    """Return what the server says; None if a signal came first. One answer that fails does not waste a long load.

    Raises:
        ServerFailedError: its answers stay unreadable; `require_alive` raises the error for a server that ended.

    """
    deadline = time.monotonic() + _RETRY_SECONDS
    reports, problems = read_load_reports(job.server.load_report_dir)
    while not stop:
        try:
            return Observation(reports, problems, client.metrics(), client.model())
        except (OSError, ValueError, http.client.HTTPException) as error:
            failure = error
        pause = time.monotonic() + _PAUSE_SECONDS
        while not stop and time.monotonic() < pause:
            require_alive()
            time.sleep(_PAUSE_SECONDS / 5)
        if time.monotonic() > deadline:
            raise ServerFailedError(
                Reason.CRASH,
                f"The server's /metrics or /v1/models could not be read for {_RETRY_SECONDS:.0f} s: "
                f"{type(failure).__name__}: {failure}.",
                f"vLLM's log: {job.log}.",
            ) from failure
    return None

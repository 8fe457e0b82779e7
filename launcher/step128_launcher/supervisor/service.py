"""Service mode: what a restart cannot cure leaves the process up but unhealthy, so nothing restarts it in a loop."""

import time
from collections.abc import Callable

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.status import ServerStatus

_POLL_SECONDS = 0.1


def hold_unhealthy(error: LauncherError, status: ServerStatus, say: Callable[[str], None]) -> ExitCode:
    """Tell the reason once, keep it in `status` for /health and /metrics, and wait for a signal; then return 0.

    For any error, also one from before there was a plan. It is called from the main thread, with the exporter running.
    """
    status.failed(error)
    hint = f" {error.hint}" if error.hint else ""
    say(
        f"{error.message}{hint}\n"
        f"Up but unhealthy (exit code {int(error.exit_code)}, {error.exit_code.name}): a restart would not help. "
        "Correct it, then restart this service."
    )
    with StopSignals() as stop:
        while not stop:
            time.sleep(_POLL_SECONDS)
    return ExitCode.OK


def run_service(
    work: Callable[[], ExitCode], status: ServerStatus, say: Callable[[str], None], service: bool
) -> ExitCode:
    """Return what `work` returns; as a service hold any LauncherError it raises, else let it pass.

    Raises:
        LauncherError: that of `work`, if this is no service.

    """
    try:
        return work()
    except LauncherError as error:
        if not service:
            raise
        return hold_unhealthy(error, status, say)

"""Service mode: what a restart cannot cure leaves the process up but unhealthy, so nothing restarts it in a loop."""

import sys
import time
import traceback
from collections.abc import Callable

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.status import ServerStatus

_POLL_SECONDS = 0.1
# What to do, by what happened; for all else a restart changes nothing.
_ADVICE = {
    ExitCode.SERVER_FAILED: "it is not started again by itself. See its log, then restart this service.",
    ExitCode.PORT_IN_USE: "it was waited for. Free the port, then restart this service.",
    ExitCode.INTERNAL: "an error of step128 itself. Report it; restarting this service may help.",
}
_OTHERWISE = "a restart would not help. Correct it, then restart this service."


def hold_unhealthy(
    error: LauncherError, status: ServerStatus, say: Callable[[str], None], stop: StopSignals
) -> ExitCode:
    """Tell the reason once, keep it in `status` for /health and /metrics, and wait for a signal; then return 0.

    For any error, also one from before there was a plan. A signal that came before counts. It is called from the main
    thread, with the exporter running and `stop` entered.
    """
    status.failed(error)
    hint = f" {error.hint}" if error.hint else ""
    say(
        f"{error.message}{hint}\n"
        f"Up but unhealthy (exit code {int(error.exit_code)}, {error.exit_code.name}): "
        + _ADVICE.get(error.exit_code, _OTHERWISE)
    )
    while not stop:
        time.sleep(_POLL_SECONDS)
    return ExitCode.OK


def run_service(
    work: Callable[[], ExitCode], status: ServerStatus, say: Callable[[str], None], stop: StopSignals, service: bool
) -> ExitCode:
    """Return what `work` returns; as a service hold whatever error it raises, else let it pass.

    Raises:
        LauncherError: that of `work`, if this is no service.

    """
    try:
        return work()
    except LauncherError as error:
        if not service:
            raise
        return hold_unhealthy(error, status, say, stop)
    except Exception as error:
        # Whoever restarts services would do it without end: the error is shown in full here, and held like the rest.
        if not service:
            raise
        traceback.print_exc(file=sys.stderr)
        kind = type(error).__name__
        internal = LauncherError(
            ExitCode.INTERNAL, f"Unexpected error: {error!r}.", public=f"Unexpected error: {kind}; see stderr."
        )
        return hold_unhealthy(internal, status, say, stop)

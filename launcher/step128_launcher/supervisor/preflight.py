"""What must be true before minutes of loading are spent: a free port and a clean state folder."""

import errno
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import cannot_write, make_private_folder
from step128_launcher.supervisor.log_cap import keep_earlier_logs
from step128_launcher.supervisor.signals import StopSignals

_POLL_SECONDS = 0.1
_LOGS_KEPT = 5  # a start that stepped down three times, and the run before


def check_port_free(host: str, port: int) -> None:
    """Refuse a port that something listens on, before minutes of loading are spent.

    Raises:
        LauncherError: 75 if it is in use; 5 if this user may not open it; 78 if `host` is no address of this machine.

    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server itself does: a port whose last connection is still in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except UnicodeError as error:  # what Python makes of a name longer than DNS allows
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"--host {host!r} is no address and no name.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port) from error
        code = ExitCode.PERMISSION if error.errno == errno.EACCES else ExitCode.BAD_CONFIGURATION
        raise LauncherError(code, f"Port {port} on {host} cannot be opened: {error.strerror}.") from error


def await_port_free(host: str, port: int, seconds: float, stop: StopSignals, say: Callable[[str], None]) -> None:
    """Do as check_port_free, but let a port become free within `seconds`; a signal ends that.

    Raises:
        LauncherError: as check_port_free.

    """
    deadline, said = time.monotonic() + seconds, False
    while not stop:
        try:
            check_port_free(host, port)
            return
        except LauncherError as error:
            if error.exit_code is not ExitCode.PORT_IN_USE or time.monotonic() >= deadline:
                raise
        if not said:
            said = True
            say(f"Port {port} on {host} is in use: waiting at most {seconds:.0f} s for it.")
        time.sleep(_POLL_SECONDS)


def port_in_use(host: str, port: int) -> LauncherError:
    """Return the error for a port that something listens on."""
    return LauncherError(
        ExitCode.PORT_IN_USE, f"Port {port} on {host} is in use.", "Stop what listens there, or choose another --port."
    )


def prepare_state_dir(state_dir: Path, load_report_dir: Path, log: Path) -> None:
    """Make the folders, keep the logs of earlier starts as `log`.1 and so on, and remove the load reports.

    The reports of an earlier start would vouch for this one.

    Raises:
        LauncherError: 5 or 73, if something there cannot be written.

    """
    make_private_folder(state_dir)
    try:
        keep_earlier_logs(log, _LOGS_KEPT)
    except OSError as error:
        raise cannot_write(log, error) from error
    try:
        if load_report_dir.exists():
            shutil.rmtree(load_report_dir)
    except OSError as error:
        raise cannot_write(load_report_dir, error) from error
    make_private_folder(load_report_dir)

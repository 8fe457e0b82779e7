"""What must be true before minutes of loading are spent: a free port and a clean state folder."""

import errno
import shutil
import socket
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import cannot_write, make_private_folder


def check_port_free(host: str, port: int) -> None:
    """Refuse a port that something listens on, before minutes of loading are spent.

    Raises:
        LauncherError: 75 if it is in use; 5 if this user may not open it; 78 if `host` is no address of this machine.

    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server itself does: a port whose last connection is still in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_in_use(host, port) from error
            code = ExitCode.PERMISSION if error.errno == errno.EACCES else ExitCode.BAD_CONFIGURATION
            raise LauncherError(code, f"{host}:{port} cannot be opened: {error.strerror}.") from error


def port_in_use(host: str, port: int) -> LauncherError:
    """Return the error for a port that something listens on."""
    return LauncherError(
        ExitCode.PORT_IN_USE, f"Port {port} on {host} is in use.", "Stop what listens there, or choose another --port."
    )


def prepare_state_dir(state_dir: Path, load_report_dir: Path) -> None:
    """Make the folders and remove the load reports of an earlier run, which would vouch for this one."""
    make_private_folder(state_dir)
    try:
        if load_report_dir.exists():
            shutil.rmtree(load_report_dir)
    except OSError as error:
        raise cannot_write(load_report_dir, error) from error
    make_private_folder(load_report_dir)

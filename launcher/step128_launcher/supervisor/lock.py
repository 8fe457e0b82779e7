"""One launcher a state folder: a lock that the kernel drops when its holder ends, however it ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import cannot_write

# `is_held` takes the lock for an instant; a launcher that starts then must not take it for another launcher.
_TRIES, _PAUSE_SECONDS = 5, 0.05


def is_held(state_dir: Path) -> bool:
    """Return whether a launcher runs with this state folder. A process id would not tell: they are used again.

    Raises:
        LauncherError: 5, if the lock may not be looked at.

    """
    path = state_dir / "lock"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LauncherError(ExitCode.PERMISSION, f"{path} cannot be read: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def hold_lock(state_dir: Path) -> Iterator[None]:
    """Hold `state_dir`/lock, which names the holder's process id, while the block runs.

    Raises:
        LauncherError: 75, if another launcher holds it; 5 or 73, if the file cannot be written.

    """
    path = state_dir / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        try:
            _take(descriptor)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise LauncherError(
                ExitCode.PORT_IN_USE,
                f"The state folder {state_dir} is in use by another launcher (process {holder}).",
                "Stop that one, or choose another --state-dir and another --port.",
            ) from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise cannot_write(path, error) from error
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> None:
    """Raise BlockingIOError if another holds it, and goes on holding it."""
    for tries_left in range(_TRIES - 1, -1, -1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not tries_left:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return

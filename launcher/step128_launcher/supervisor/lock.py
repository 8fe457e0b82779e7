"""One launcher a state folder: a lock that the kernel drops when its holder ends, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import cannot_write


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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

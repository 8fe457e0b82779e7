"""One child process with everything it starts, in its own process group, so that nothing outlives it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import cannot_write
from step128_launcher.supervisor.procfs import group_members

_CHILD = Path(__file__).with_name("child.py")
_POLL_SECONDS = 0.02
_KILL_WAIT_SECONDS = 10.0
_TRACKER_WAIT_SECONDS = 3.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class ProcessGroup:
    """Starts a command as the leader of a new session; its output goes to a log file.

    Should this process die without ending it, it gets SIGTERM, and is killed `orphan_grace_seconds` later (see
    child.py), so it is made from the main thread.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], log: Path, orphan_grace_seconds: float
    ) -> None:
        _adopt_orphans()
        try:
            # The server's own requests and prompts may be in the log, so it is private to the user. O_APPEND: each
            # write goes to the file's end wherever that is, so log_cap.py may cut the file short under the writers.
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        except OSError as error:
            raise cannot_write(log, error) from error
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), str(os.getpid()), str(orphan_grace_seconds), *argv],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            message = f"{sys.executable} cannot be started: {error.strerror}."
            raise LauncherError(ExitCode.SERVER_FAILED, message) from error
        finally:
            os.close(output)

    @property
    def pid(self) -> int:
        """Process id of the leader, and id of the group."""
        return self._process.pid

    def members(self) -> list[int]:
        """Return the ids of its processes that run."""
        return group_members(self.pid)

    def exit_status(self) -> int | None:
        """Return the leader's exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the leader to end; it takes its own children down."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def wait(self, seconds: float) -> bool:
        """Return whether the leader ended within `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> list[int]:
        """Kill whatever is left of the group and wait until it is empty; return the processes that did not end.

        A process that waits in the kernel, for a driver say, does not end when it is killed, and keeps what it holds.
        Python's resource tracker is spared for a moment: it ends by itself once its clients are gone, and only it
        removes the shared memory they leave in /dev/shm.
        """
        self._kill_members(spare_trackers=True, seconds=_TRACKER_WAIT_SECONDS)
        self._kill_members(spare_trackers=False, seconds=_KILL_WAIT_SECONDS)
        return self.members()

    def _kill_members(self, spare_trackers: bool, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._collect_dead()
            members = group_members(self.pid)
            if not members:
                return
            for pid in members:
                if not (spare_trackers and _is_resource_tracker(pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)

    def _collect_dead(self) -> None:
        """Collect the dead of the group, which otherwise stay in it; the leader first, for it keeps its status."""
        if self._process.poll() is not None:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-self.pid, os.WNOHANG) != (0, 0):
                    pass


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _adopt_orphans() -> None:
    """Make this process the parent of orphaned grandchildren, so that it can collect them when they die.

    Else that is left to process 1, which in a container may never do it. A kernel that refuses changes nothing else.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

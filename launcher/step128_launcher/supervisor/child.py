"""Becomes the command it is given, tied to the launcher: when the launcher dies, so does the command.

The launcher starts this file as a program, `python -I child.py LAUNCHER_PID GRACE_SECONDS COMMAND...`, as the leader of
a new session, so it imports nothing of ours. Done between fork and exec in the launcher itself, the same could
deadlock: its other threads may hold locks.

Two ties. The kernel sends SIGTERM when the launcher dies (PR_SET_PDEATHSIG, prctl(2)); it survives execve, and holds
for the thread that started this process, which therefore must be the launcher's main thread. But vLLM acts on SIGTERM
only when it has loaded, which may take a quarter of an hour, and its workers may outlive it: so a process stays behind
that waits for the launcher's death, leaves the command GRACE_SECONDS to end, and then kills the whole group.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CANNOT_START = 127  # as a shell says it
_POLL_SECONDS = 0.1
# Python's resource trackers end by themselves once their clients are gone, and only they remove what those leave in
# /dev/shm; this long they are spared.
_TRACKER_SECONDS = 3.0


def become(launcher_pid: int, grace_seconds: float, command: list[str]) -> int:
    """Replace this process by `command`; return an exit status only if that is impossible."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher_pid:  # it died before the tie was made
        return 1
    leader = os.getpid()
    if os.fork() == 0:
        watch(launcher_pid, leader, grace_seconds)
        os._exit(0)
    try:
        os.execv(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}.", file=sys.stderr)
    return _CANNOT_START


def watch(launcher_pid: int, leader: int, grace_seconds: float) -> None:
    """Wait for the launcher's death, then end the group of `leader`, this process included."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # meant for the command; only the group's end ends this process
    _wait_for_death(launcher_pid)
    deadline = time.monotonic() + grace_seconds
    # The parent of this process changes as soon as the leader ends.
    while os.getppid() == leader and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, group = int(stat.parent.name), int(stat.read_text(errors="replace").rpartition(")")[2].split()[2])
            tracker = b"multiprocessing.resource_tracker" in (stat.parent / "cmdline").read_bytes()
            if group == leader and pid != os.getpid() and not tracker:
                os.kill(pid, signal.SIGKILL)
    time.sleep(_TRACKER_SECONDS)
    os.killpg(leader, signal.SIGKILL)


def _wait_for_death(launcher_pid: int) -> None:
    """Return when the launcher is gone; a kernel without pidfd_open (before 5.3) is asked again and again."""
    try:
        launcher = os.pidfd_open(launcher_pid)
    except ProcessLookupError:
        return
    except OSError:
        while Path(f"/proc/{launcher_pid}").exists():
            time.sleep(1.0)
        return
    select.select([launcher], [], [])
    os.close(launcher)


if __name__ == "__main__":
    sys.exit(become(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))

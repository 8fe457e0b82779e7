"""Becomes the command it is given, tied to the launcher: the kernel sends it SIGTERM when the launcher dies.

The launcher starts this file as a program, `python -I child.py LAUNCHER_PID COMMAND...`, so it imports nothing of ours.
Done between fork and exec in the launcher itself, the same could deadlock: its other threads may hold locks.

The tie (PR_SET_PDEATHSIG, prctl(2)) survives execve, and holds for the thread that started this process, which
therefore must be the launcher's main thread.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CANNOT_START = 127  # as a shell says it


def become(launcher_pid: int, command: list[str]) -> int:
    """Replace this process by `command`; return an exit status only if that is impossible."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher_pid:  # it died before the tie was made
        return 1
    try:
        os.execv(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}.", file=sys.stderr)
    return _CANNOT_START


if __name__ == "__main__":
    sys.exit(become(int(sys.argv[1]), sys.argv[2:]))

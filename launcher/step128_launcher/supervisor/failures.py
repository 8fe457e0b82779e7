"""Why a started server ended: the error for a person, and the reason that decides what is done about it."""

from enum import StrEnum

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.supervisor.job import Job
from step128_launcher.supervisor.out_of_memory import memory_complaint
from step128_launcher.supervisor.preflight import port_in_use
from step128_launcher.supervisor.vllm_log import cause, plugin_error, read_tail, remedy


class Reason(StrEnum):
    """Of a failure that a restart or a leaner plan may cure; also a metric's label."""

    CRASH = "crash"
    KILLED = "killed"
    OUT_OF_MEMORY = "out of memory"
    HUNG = "hung"
    START_TIMEOUT = "start timeout"


class ServerFailedError(LauncherError):
    """The server ended, or had to be ended, for a reason that may pass."""

    def __init__(self, reason: Reason, message: str, hint: str = "") -> None:
        super().__init__(ExitCode.SERVER_FAILED, message, hint)
        self.reason = reason


def ended(job: Job, what: str, status: int, was_ready: bool, killed_for_memory: bool) -> LauncherError:
    """Return the error for a server that ended by itself with `status` (negative: the signal).

    A ServerFailedError, unless the start's log tells of something that only a person can cure: the plugin's complaint
    about the checkpoint, or a port taken meanwhile. Only the start's own lines count for that and for missing memory;
    later the log may hold anything, a request's text included.
    """
    lines = read_tail(job.log)
    if not was_ready:
        complaint = plugin_error(lines)
        if complaint:
            return CheckpointError(f"The plugin refused the checkpoint: {complaint}", f"vLLM's log: {job.log}.")
        if any("address already in use" in line.lower() for line in lines):
            return port_in_use(job.server.host, job.server.port)
        memory = memory_complaint(lines)
        if memory:
            return ServerFailedError(Reason.OUT_OF_MEMORY, f"vLLM {what}: {memory}", f"vLLM's log: {job.log}.")
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    text = "\n  ".join(cause(lines)) or "its log is empty"
    action = remedy(lines)
    hint = f"vLLM's log: {job.log}." + (f"\n{action}" if action else "")
    reason, note = Reason.CRASH, ""
    if killed_for_memory and _was_killed(status, lines):
        reason, note = Reason.OUT_OF_MEMORY, " The kernel killed it: the machine ran out of memory."
    elif status == -9:
        reason, note = Reason.KILLED, " Killed from outside; if nobody did, the machine ran out of memory."
    return ServerFailedError(reason, f"vLLM {what} ({how}).{note}\n  {text}", hint)


def _was_killed(status: int, lines: list[str]) -> bool:
    """Return whether the server, or a process of its own, was killed: vLLM says no signal of a worker that died."""
    return status == -9 or any("died unexpectedly" in line for line in lines)

"""Why a started server ended: the error for a person, and the reason that decides what is done about it."""

import re
import signal
from enum import StrEnum

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.supervisor.job import Job
from step128_launcher.supervisor.out_of_memory import memory_complaint
from step128_launcher.supervisor.preflight import check_port_free, port_in_use
from step128_launcher.supervisor.vllm_log import RECENT_LINES, cause, plugin_error, read_tail, remedy

_ADDRESS_IN_USE = "address already in use"
# How vLLM 0.32 and multiprocessing tell that a process of their own ended by SIGKILL: "Engine core initialization
# failed. … Failed core proc(s): {'EngineCore': -9}".
_CHILD_KILLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -9\b|\bexit ?code:? -9\b")


class Reason(StrEnum):
    """Of a failure that a restart or a leaner plan may cure; also a metric's label."""

    CRASH = "crash"
    KILLED = "killed"
    OUT_OF_MEMORY = "out of memory"
    HUNG = "hung"
    START_TIMEOUT = "start timeout"
    PORT_IN_USE = "port in use"


class ServerFailedError(LauncherError):
    """The server ended, or had to be ended, for a reason that may pass."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        hint: str = "",
        public: str = "",
        exit_code: ExitCode = ExitCode.SERVER_FAILED,
    ) -> None:
        super().__init__(exit_code, message, hint, public)
        self.reason = reason


def ended(job: Job, what: str, status: int, was_ready: bool, killed_for_memory: bool) -> LauncherError:
    """Return the error for a server that ended by itself with `status` (negative: the signal).

    A ServerFailedError, unless the start's log tells of something that only a person can cure: the plugin's complaint
    about the checkpoint. Only the start's own lines count for that, for missing memory and for a port taken meanwhile;
    later the log may hold anything, a request's text included.
    """
    lines = read_tail(job.log)
    if not was_ready:
        complaint = plugin_error(lines)
        if complaint:
            refused = "The plugin refused the checkpoint"
            return CheckpointError(f"{refused}: {complaint}", f"vLLM's log: {job.log}.", f"{refused}.")
        memory = memory_complaint(lines)
        if memory:
            return ServerFailedError(
                Reason.OUT_OF_MEMORY,
                f"vLLM {what}: {memory}",
                f"vLLM's log: {job.log}.",
                f"vLLM {what}: out of memory.",
            )
        busy = _port_taken(job, lines)
        if busy:
            return ServerFailedError(Reason.PORT_IN_USE, busy.message, busy.hint, exit_code=busy.exit_code)
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    text = "\n  ".join(cause(lines, RECENT_LINES if was_ready else None)) or "its log is empty"
    # Of a server that was ready only its last words count: before them, any request may be quoted.
    last = lines[-RECENT_LINES:] if was_ready else lines
    action = remedy(last)
    hint = f"vLLM's log: {job.log}." + (f"\n{action}" if action else "")
    reason, note = Reason.CRASH, ""
    killed = status == -signal.SIGKILL or any(_CHILD_KILLED.search(line) for line in last)
    # Of a worker that died vLLM says no signal: the kernel's count tells.
    if killed_for_memory and (killed or any("died unexpectedly" in line for line in last)):
        reason, note = Reason.OUT_OF_MEMORY, " The kernel killed it: the machine ran out of memory."
    elif killed:
        reason, note = Reason.KILLED, " Killed from outside; if nobody did, the machine ran out of memory."
    public = f"vLLM {what} ({how}).{note}"
    return ServerFailedError(reason, f"{public}\n  {text}", hint, public)


def _port_taken(job: Job, lines: list[str]) -> LauncherError | None:
    """Return the error for the server's own port taken meanwhile, None for a complaint about another one.

    vLLM opens ports of its own choice too, for its ranks, and not every message says which one it was.
    """
    host, port = job.server.host, job.server.port
    complaints = [line for line in lines if _ADDRESS_IN_USE in line.lower()]
    if any(re.search(rf"\b{port}\b", line) for line in complaints):
        return port_in_use(host, port)
    try:
        if complaints:
            check_port_free(host, port)
    except LauncherError as error:
        return error
    return None

"""The supervisor: starts vLLM, waits, verifies, watches, drains, and leaves nothing behind."""

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from step128_launcher.checkpoint import ModelFootprint
from step128_launcher.client import ServerClient
from step128_launcher.command import Server
from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.files import write_atomically
from step128_launcher.health import HealthWatch
from step128_launcher.load_report import read_load_reports
from step128_launcher.plan import Plan
from step128_launcher.preflight import check_port_free, port_in_use, prepare_state_dir
from step128_launcher.process import ProcessGroup
from step128_launcher.progress import Progress
from step128_launcher.status import ServerStatus, State
from step128_launcher.verify import Observation, Outcome, failed, verify
from step128_launcher.vllm_log import LogFollower, cause, phase_of, plugin_error, read_tail, remedy

_POLL_SECONDS = 0.1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# On top of the time vLLM gives to requests in flight: its processes need a while to end. Longer brings nothing: when
# that time is over vLLM kills its engine, and then waits without end for the client of a request that was cut off.
_EXIT_GRACE_SECONDS = 10.0
# While it loads there is nothing to finish, and vLLM does not act on SIGTERM before it has loaded.
_LOADING_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """Everything one run needs; `argv` and `environment` are what is started."""

    plan: Plan
    footprint: ModelFootprint
    server: Server
    api_key: str = field(repr=False)
    argv: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    state_dir: Path
    start_timeout_seconds: float

    @property
    def log(self) -> Path:
        """File that vLLM's output goes to."""
        return self.state_dir / "vllm.log"


class Supervisor:
    """Runs one Job to its end; `run` is called once, from the main thread."""

    def __init__(self, job: Job, status: ServerStatus, progress: Progress) -> None:
        self._job = job
        self._status = status
        self._progress = progress
        self._stop_signals = 0
        self._process: ProcessGroup | None = None
        self._client = ServerClient(job.server.base_url, job.api_key)

    def run(self) -> ExitCode:
        """Return 0 after SIGTERM, SIGINT, SIGQUIT, or SIGHUP where that is not ignored (nohup).

        Raises:
            LauncherError: 75, 73 or 5 before anything is started; 65, 69 or 70 after it was taken down again.

        """
        check_port_free(self._job.server.host, self._job.server.port)
        prepare_state_dir(self._job.state_dir, self._job.server.load_report_dir, self._job.log)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in _STOP_SIGNALS if not (nohup and number is signal.SIGHUP)]
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            self._serve()
            self._status.enter(State.STOPPED)
        except BaseException:
            self._status.enter(State.FAILED)
            raise
        finally:
            if self._process is not None:
                self._process.kill()
            self._progress.close()
            self._write_status()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return ExitCode.OK

    def _serve(self) -> None:
        self._status.enter(State.STARTING)
        self._write_status(required=True)
        self._process = ProcessGroup(self._job.argv, self._job.environment, self._job.log)
        if not self._await_health():
            self._drain(_LOADING_GRACE_SECONDS)
            return
        if self._verify():
            self._enter(State.READY)
            self._progress.say(f"Ready: {self._job.server.base_url}/v1 serves {self._job.server.served_model_name}.")
            self._watch()
        self._drain(self._job.server.shutdown_timeout_seconds + _EXIT_GRACE_SECONDS)

    def _watch(self) -> None:
        """Return when a signal came."""
        with HealthWatch(self._client, self._status) as health:
            while not self._stop_signals:
                self._require_alive("died while serving")
                news = health.news()
                if news:
                    self._progress.say(news)
                time.sleep(_POLL_SECONDS)

    def _await_health(self) -> bool:
        """Wait until /health answers; False if a signal came first."""
        deadline = time.monotonic() + self._job.start_timeout_seconds
        lines = LogFollower(self._job.log)
        self._progress.phase("starting vLLM")
        while not self._stop_signals:
            for line in lines.new_lines():
                phase = phase_of(line)
                if phase:
                    self._progress.phase(phase)
            self._require_alive("ended before it was ready")
            if self._client.healthy():
                return True
            if time.monotonic() > deadline:
                raise LauncherError(
                    ExitCode.SERVER_FAILED,
                    f"vLLM was not ready within {self._job.start_timeout_seconds:.0f} seconds.",
                    f"Its log: {self._job.log}. A slower machine may need a longer start_timeout_seconds (profile).",
                )
            time.sleep(_POLL_SECONDS)
        return False

    def _verify(self) -> bool:
        """Compare what runs with what was planned; False if a signal came first."""
        self._enter(State.VERIFYING)
        self._progress.phase("verifying")
        reports, problems = read_load_reports(self._job.server.load_report_dir)
        try:
            seen = Observation(reports, problems, self._client.metrics(), self._client.model())
        except (OSError, ValueError) as error:
            if self._stop_signals:
                return False
            self._require_alive("died while it was being verified")
            raise LauncherError(
                ExitCode.VERIFICATION_FAILED, f"The server's /metrics or /v1/models cannot be read: {error}."
            ) from error
        checks = verify(self._job.plan, self._job.footprint, self._job.server.served_model_name, seen)
        self._status.verified(checks)
        for check in checks:
            self._progress.check(check)
        failures = failed(checks)
        if failures:
            raise LauncherError(
                ExitCode.VERIFICATION_FAILED,
                f"{len(failures)} of {len(checks)} checks failed, so the server was stopped: "
                + "; ".join(f"{check.name}: {check.detail}" for check in failures)
                + ".",
                f"vLLM's log: {self._job.log}.",
            )
        warned = sum(check.outcome is Outcome.WARN for check in checks)
        self._progress.say(f"Verified: {len(checks)} checks" + (f", {warned} with a warning." if warned else "."))
        return not self._stop_signals

    def _require_alive(self, what: str) -> None:
        status = self._process.exit_status() if self._process else None
        if status is None or self._stop_signals:
            return
        lines = read_tail(self._job.log)
        # Only the start's own lines tell why it failed; later the log may hold anything, a request's text included.
        if self._status.snapshot().state is not State.READY:
            self._require_no_known_failure(lines)
        ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        reason = "\n  ".join(cause(lines)) or "its log is empty"
        action = remedy(lines)
        hint = f"vLLM's log: {self._job.log}." + (f"\n{action}" if action else "")
        killed = " Killed from outside; if nobody did, the machine ran out of memory." if status == -9 else ""
        raise LauncherError(ExitCode.SERVER_FAILED, f"vLLM {what} ({ended}).{killed}\n  {reason}", hint)

    def _require_no_known_failure(self, lines: list[str]) -> None:
        complaint = plugin_error(lines)
        if complaint:
            raise CheckpointError(f"The plugin refused the checkpoint: {complaint}", f"vLLM's log: {self._job.log}.")
        if any("address already in use" in line.lower() for line in lines):
            raise port_in_use(self._job.server.host, self._job.server.port)

    def _drain(self, seconds: float) -> None:
        """End vLLM: ask, wait `seconds` for it to finish, then let it be killed; a second signal does that at once."""
        self._enter(State.DRAINING)
        process = self._process
        if process is None or process.exit_status() is not None:
            return
        self._progress.phase(f"stopping (at most {seconds:.0f} s)")
        process.terminate()
        deadline = time.monotonic() + seconds
        while not process.wait(_POLL_SECONDS):
            if self._stop_signals > 1:
                self._progress.say("Second signal: killed at once.")
                return
            if time.monotonic() > deadline:
                self._progress.say(f"vLLM did not end within {seconds:.0f} s: killed.")
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signals += 1

    def _enter(self, state: State) -> None:
        self._status.enter(state)
        self._write_status()

    def _write_status(self, required: bool = False) -> None:
        """Write status.json: what other programs need to find this server.

        Unless `required` a failure is only reported: a disk that fills up later must not leave vLLM unattended.
        """
        now = self._status.snapshot()
        document = {
            "schema": 1,
            "state": now.state.value,
            "base_url": self._job.server.base_url,
            "served_model_name": self._job.server.served_model_name,
            "launcher_pid": os.getpid(),
            "vllm_pid": self._process.pid if self._process else None,
            "log": str(self._job.log),
            "start_seconds": now.start_seconds,
        }
        try:
            write_atomically(self._job.state_dir / "status.json", json.dumps(document, indent=1) + "\n")
        except LauncherError as error:
            if required:
                raise
            self._progress.say(f"warning: {error.message}")

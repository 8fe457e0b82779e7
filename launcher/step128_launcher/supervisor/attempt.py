"""One start of vLLM: begun, awaited, verified, watched, drained; nothing of it is left behind."""

import time
from types import TracebackType
from typing import Self

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.client import ServerClient
from step128_launcher.supervisor.comparison import compare, planned_figures
from step128_launcher.supervisor.failures import Reason, ServerFailedError, ended
from step128_launcher.supervisor.hang_guard import HangGuard
from step128_launcher.supervisor.health import HealthWatch
from step128_launcher.supervisor.job import Job, Patience
from step128_launcher.supervisor.loading import LoadMeter, shard_sizes
from step128_launcher.supervisor.log_cap import cap_log
from step128_launcher.supervisor.observing import observe
from step128_launcher.supervisor.out_of_memory import killed_for_memory
from step128_launcher.supervisor.process import ProcessGroup
from step128_launcher.supervisor.procfs import oom_kills
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.reality import Reality, read_reality
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.state_files import StateFiles
from step128_launcher.supervisor.status import ServerStatus, State
from step128_launcher.supervisor.verify import Outcome, failed, verify
from step128_launcher.supervisor.vllm_log import LogFollower, phase_of

_POLL_SECONDS = 0.1
_CAP_LOG_EVERY_SECONDS = 60.0
# On top of the time vLLM gives to requests in flight: its processes need a while to end. Longer brings nothing: when
# that time is over vLLM kills its engine, and then waits without end for the client of a request that was cut off.
_EXIT_GRACE_SECONDS = 10.0
# While it loads there is nothing to finish, and vLLM does not act on SIGTERM before it has loaded.
_LOADING_GRACE_SECONDS = 2.0


class Attempt:
    """A context that ends the server with the block; `run` is called once in it, from the main thread.

    The `first` start needs a state folder that can be written; at a restart that would only end what may be saved.
    """

    def __init__(
        self, job: Job, status: ServerStatus, progress: Progress, stop: StopSignals, patience: Patience, first: bool
    ) -> None:
        self._first = first
        self._job, self._status, self._progress, self._stop, self._patience = job, status, progress, stop, patience
        self._files = StateFiles(job, status, progress)
        self._client = ServerClient(job.server.base_url, job.api_key)
        self._proc = patience.root / "proc"
        self._oom_kills = oom_kills(self._proc)
        self._process: ProcessGroup | None = None
        self._ready_at: float | None = None
        self._healthy_at = 0.0
        self.survivors: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.survivors = self._process.kill()
        if self.survivors:
            self._progress.say(f"warning: these processes of vLLM could not be killed: {self.survivors}.")

    @property
    def was_ready(self) -> bool:
        """Whether it got so far."""
        return self._ready_at is not None

    @property
    def healthy_seconds(self) -> float:
        """From ready to the last answer of /health."""
        return max(0.0, self._healthy_at - self._ready_at) if self._ready_at is not None else 0.0

    def run(self) -> None:
        """Serve until a signal comes, then drain.

        Raises:
            ServerFailedError: the server ended, or was given up, for a reason that may pass.
            LauncherError: 65 or 70: only a person can help. 5 or 73: the state folder cannot be written.

        """
        drain_seconds = self._job.server.shutdown_timeout_seconds + _EXIT_GRACE_SECONDS
        self._status.enter(State.STARTING)
        self._files.write_status(required=self._first)
        self._files.write_plan()
        self._process = ProcessGroup(self._job.argv, self._job.environment, self._job.log, drain_seconds)
        if not self._await_health(self._process):
            self._drain(self._process, _LOADING_GRACE_SECONDS)
            return
        if self._verify(self._process):
            self._status.enter(State.READY)
            self._ready_at = self._healthy_at = time.monotonic()
            self._files.write_status(vllm_pid=self._process.pid)
            self._progress.say(f"Ready: {self._job.server.base_url}/v1 serves {self._job.server.served_model_name}.")
            self._watch(self._process)
        self._drain(self._process, drain_seconds)

    def _await_health(self, process: ProcessGroup) -> bool:
        """Wait until /health answers; False if a signal came first."""
        deadline = time.monotonic() + self._job.start_timeout_seconds
        lines = LogFollower(self._job.log)
        readable = True
        meter = LoadMeter(process.members, shard_sizes(self._job.footprint.path))
        self._progress.phase("starting vLLM")
        while not self._stop:
            if readable:
                readable = self._follow(lines, meter)
            self._show_loading(meter)
            self._require_alive(process, "ended before it was ready")
            if self._client.healthy():
                return True
            if time.monotonic() > deadline:
                raise self._not_ready(process)
            time.sleep(_POLL_SECONDS)
        return False

    def _follow(self, lines: LogFollower, meter: LoadMeter) -> bool:
        """Show what the new lines of the log tell; False if it cannot be read, which only the display needs."""
        try:
            new = [*lines.new_lines(), lines.pending]
        except OSError as error:
            self._progress.say(f"warning: {self._job.log} cannot be read: {error.strerror}.")
            return False
        for line in new:
            phase = phase_of(line)
            if phase:
                self._progress.phase(phase)
            if meter.read(line):
                self._show_loading(meter)
        return True

    def _not_ready(self, process: ProcessGroup) -> ServerFailedError:
        """Return the error for a start that takes too long, with what the server does: it may hang in a collective."""
        sight, kept = HangGuard(process, self._job, self._status, self._progress, self._patience).glance()
        return ServerFailedError(
            Reason.START_TIMEOUT,
            f"vLLM was not ready within {self._job.start_timeout_seconds:.0f} seconds; it is {sight}.",
            f"{kept} Its log: {self._job.log}. A slower machine may need a longer start_timeout_seconds (profile).",
        )

    def _show_loading(self, meter: LoadMeter) -> None:
        loaded = meter.loaded()
        if loaded is not None:
            self._progress.loading(loaded)

    def _verify(self, process: ProcessGroup) -> bool:
        """Compare what runs with what was planned; False if a signal came first."""
        self._status.enter(State.VERIFYING)
        self._files.write_status()
        self._progress.phase("verifying")
        died = "died while it was being verified"
        seen = observe(self._job, self._client, self._stop, lambda: self._require_alive(process, died))
        if seen is None:
            return False
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
        self._compare(seen.metrics)
        return not self._stop

    def _compare(self, metrics: str) -> None:
        """Show and keep what was planned beside what vLLM reports."""
        try:
            with self._job.log.open(encoding="utf-8", errors="replace") as lines:
                reality = read_reality(lines, metrics)
        except OSError as error:
            self._progress.say(f"warning: {self._job.log} cannot be read: {error.strerror}.")
            reality = Reality()
        rows = compare(planned_figures(self._job.plan), reality)
        self._status.compared(rows)
        self._files.write_plan(reality)
        if rows:
            self._progress.comparison(rows)

    def _watch(self, process: ProcessGroup) -> None:
        """Return when a signal came."""
        guard = HangGuard(process, self._job, self._status, self._progress, self._patience)
        cap_log_at = time.monotonic() + _CAP_LOG_EVERY_SECONDS
        with HealthWatch(self._client, self._status) as health:
            while not self._stop:
                if health.healthy_at > self._healthy_at:
                    # What the kernel killed before the server was seen healthy was none of it.
                    self._oom_kills = oom_kills(self._proc)
                self._healthy_at = health.healthy_at
                self._require_alive(process, "died while serving")
                news, now = health.news(), time.monotonic()
                if news:
                    self._progress.say(news)
                guard.look(health)
                if now > cap_log_at:
                    cap_log_at = now + _CAP_LOG_EVERY_SECONDS
                    self._cap_log()
                time.sleep(_POLL_SECONDS)

    def _cap_log(self) -> None:
        try:
            cap_log(self._job.log)
        except OSError as error:
            self._progress.say(f"warning: {self._job.log} is large and cannot be cut: {error.strerror}.")

    def _require_alive(self, process: ProcessGroup, what: str) -> None:
        status = process.exit_status()
        if status is not None and not self._stop:
            for_memory = killed_for_memory(self._oom_kills, oom_kills(self._proc))
            raise ended(self._job, what, status, self.was_ready, for_memory)

    def _drain(self, process: ProcessGroup, seconds: float) -> None:
        """End vLLM: ask, wait `seconds` for it to finish, then let it be killed; a second signal does that at once."""
        self._status.enter(State.DRAINING)
        self._files.write_status()
        if process.exit_status() is not None:
            return
        self._progress.phase(f"stopping (at most {seconds:.0f} s)")
        process.terminate()
        deadline = time.monotonic() + seconds
        while not process.wait(_POLL_SECONDS):
            if self._stop.count > 1:
                self._progress.say("Second signal: killed at once.")
                return
            if time.monotonic() > deadline:
                self._progress.say(f"vLLM did not end within {seconds:.0f} s: killed.")
                return

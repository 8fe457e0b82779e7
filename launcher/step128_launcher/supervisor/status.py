"""The state of the supervised server, shared between the supervisor and the metrics exporter."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from step128_launcher.errors import LauncherError
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.comparison import Row
from step128_launcher.supervisor.hang import Activity
from step128_launcher.supervisor.verify import Check


class State(StrEnum):
    """Life of a server: planned, starting, verifying, ready, draining, then stopped or failed.

    After a failure that may pass it is restarting, then starting again.
    """

    PLANNED = "planned"
    STARTING = "starting"
    VERIFYING = "verifying"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Failure:
    """What a person must cure, and the exit status that stands for it.

    `reason` may quote vLLM's log, and so a request's text; `public` says the same without (LauncherError).
    """

    exit_code: int
    reason: str
    hint: str
    public: str


@dataclass(frozen=True)
class Snapshot:
    """One consistent view; `plan` is None before there is one, `start_seconds` until the server is ready.

    `failed_probes` counts the requests to /health that failed since the last that did not; `hung` tells what the server
    does while it does not answer. `restarts` is reason -> count; `last_failure` is why it was restarted, until it is
    ready again; `failure` why it was given up.
    """

    state: State = State.PLANNED
    plan: Plan | None = None
    start_seconds: float | None = None
    checks: tuple[Check, ...] = ()
    comparison: tuple[Row, ...] = ()
    failed_probes: int = 0
    hung: Activity | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    step_downs: int = 0
    failure: Failure | None = None
    last_failure: Failure | None = None

    @property
    def healthy(self) -> bool:
        """Whether the server is ready and answered when it was asked last."""
        return self.state is State.READY and self.failed_probes == 0


class ServerStatus:
    """Written by the supervisor's threads, read by the exporter's; every access takes the lock."""

    def __init__(self) -> None:
        self._now = Snapshot()
        self._started_at: float | None = None
        self._lock = threading.Lock()

    def snapshot(self) -> Snapshot:
        """Return the current view."""
        with self._lock:
            return self._now

    def enter(self, state: State) -> None:
        """Move to `state`; what held for a server that was ready holds no longer."""
        with self._lock:
            self._now = replace(self._now, state=state, failed_probes=0, hung=None)
            if state not in (State.DRAINING, State.STOPPED):  # which keep what the run was
                self._now = replace(self._now, start_seconds=None)
            if state is State.STARTING:
                self._started_at = time.monotonic()
                self._now = replace(self._now, checks=(), comparison=())
            if state is State.READY:
                self._now = replace(self._now, last_failure=None)
                if self._started_at is not None:
                    self._now = replace(self._now, start_seconds=time.monotonic() - self._started_at)

    def planned(self, plan: Plan) -> None:
        """Keep the plan that is tried now."""
        with self._lock:
            self._now = replace(self._now, plan=plan)

    def verified(self, checks: list[Check]) -> None:
        """Keep the results of the verification."""
        with self._lock:
            self._now = replace(self._now, checks=tuple(checks))

    def compared(self, rows: tuple[Row, ...]) -> None:
        """Keep what was planned and what vLLM reports."""
        with self._lock:
            self._now = replace(self._now, comparison=rows)

    def probed(self, healthy: bool) -> None:
        """Keep the result of one request to /health."""
        with self._lock:
            now = self._now
            failures = 0 if healthy else now.failed_probes + 1
            self._now = replace(now, failed_probes=failures, hung=now.hung if failures else None)

    def hangs(self, activity: Activity) -> None:
        """Keep what a server that does not answer is doing."""
        with self._lock:
            self._now = replace(self._now, hung=activity)

    def restarted(self, reason: str, error: LauncherError) -> None:
        """Count a restart, and keep why it is needed."""
        with self._lock:
            counts = dict(self._now.restarts)
            counts[reason] = counts.get(reason, 0) + 1
            self._now = replace(self._now, restarts=counts, last_failure=_failure(error))

    def stepped_down(self, error: LauncherError) -> None:
        """Count a step to a leaner plan, and keep why it is needed."""
        with self._lock:
            self._now = replace(self._now, step_downs=self._now.step_downs + 1, last_failure=_failure(error))

    def failed(self, error: LauncherError) -> None:
        """End in failure, for a reason that is kept."""
        failure = _failure(error)
        with self._lock:
            self._now = replace(
                self._now, state=State.FAILED, failure=failure, failed_probes=0, hung=None, start_seconds=None
            )


def _failure(error: LauncherError) -> Failure:
    return Failure(int(error.exit_code), error.message, error.hint, error.public)

"""The state of the supervised server, shared between the supervisor and the metrics exporter."""

import threading
import time
from dataclasses import dataclass, field
from enum import StrEnum

from step128_launcher.verify import Check


class State(StrEnum):
    """Life of a server: planned, starting, verifying, ready, draining, then stopped or failed."""

    PLANNED = "planned"
    STARTING = "starting"
    VERIFYING = "verifying"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Snapshot:
    """One consistent view; `start_seconds` is None until the server is ready.

    `failed_probes` counts the requests to /health that failed since the last that did not.
    """

    state: State
    start_seconds: float | None
    checks: tuple[Check, ...]
    failed_probes: int

    @property
    def healthy(self) -> bool:
        """Whether the server is ready and answered when it was asked last."""
        return self.state is State.READY and self.failed_probes == 0


@dataclass
class ServerStatus:
    """Written by the supervisor's thread, read by the exporter's; every access takes the lock."""

    _state: State = State.PLANNED
    _checks: tuple[Check, ...] = ()
    _started_at: float | None = None
    _start_seconds: float | None = None
    _failed_probes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, state: State) -> None:
        """Move to `state`; the time from starting to ready is kept."""
        with self._lock:
            self._state = state
            if state is State.STARTING:
                self._started_at = time.monotonic()
            if state is State.READY and self._started_at is not None:
                self._start_seconds = time.monotonic() - self._started_at

    def verified(self, checks: list[Check]) -> None:
        """Keep the results of the verification."""
        with self._lock:
            self._checks = tuple(checks)

    def probed(self, healthy: bool) -> None:
        """Keep the result of one request to /health."""
        with self._lock:
            self._failed_probes = 0 if healthy else self._failed_probes + 1

    def snapshot(self) -> Snapshot:
        """Return the current view."""
        with self._lock:
            return Snapshot(self._state, self._start_seconds, self._checks, self._failed_probes)

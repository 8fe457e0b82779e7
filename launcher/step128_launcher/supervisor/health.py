"""Asks a serving vLLM for its health again and again, beside the supervisor, which must stay free to act on signals."""

import http.client
import threading
import time
from types import TracebackType
from typing import Self

from step128_launcher.supervisor.client import ServerClient
from step128_launcher.supervisor.hang import tokens_done
from step128_launcher.supervisor.status import ServerStatus

PROBE_SECONDS = 5.0
# So many failures in a row are worth a word: a server may miss one while it compiles or swaps.
FAILURES_TO_WARN = 3


class HealthWatch:
    """While entered, a thread asks /health every PROBE_SECONDS and keeps the answers in the status.

    It also keeps when the server last showed life: it answered, or its token counters went on although it did not.
    """

    def __init__(self, client: ServerClient, status: ServerStatus) -> None:
        self._client = client
        self._status = status
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="health", daemon=True)
        self._warned = False
        self._tokens: float | None = None
        self._healthy_at = self._alive_at = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not joined: a request to a server that hangs must not hold up the end.
        self._over.set()

    @property
    def healthy_at(self) -> float:
        """When /health answered last, by time.monotonic()."""
        return self._healthy_at

    @property
    def alive_at(self) -> float:
        """When the server last answered or got something done, by time.monotonic()."""
        return self._alive_at

    def news(self) -> str | None:
        """Return a sentence when the server stopped answering, or answers again; else None."""
        failures = self._status.snapshot().failed_probes
        if not self._warned and failures >= FAILURES_TO_WARN:
            self._warned = True
            return f"warning: vLLM runs, but /health failed {failures} times in a row."
        if self._warned and not failures:
            self._warned = False
            return "vLLM answers /health again."
        return None

    def _watch(self) -> None:
        while not self._over.wait(PROBE_SECONDS):
            healthy = self._client.healthy()
            if self._over.is_set():  # of a server that was ended meanwhile
                return
            if healthy:
                self._healthy_at = self._alive_at = time.monotonic()
            elif self._progressed():
                self._alive_at = time.monotonic()
            self._status.probed(healthy)

    def _progressed(self) -> bool:
        """Return whether tokens were read or written since the last look; a server that does not say has not."""
        try:
            tokens = tokens_done(self._client.metrics())
        except (OSError, ValueError, http.client.HTTPException):
            return False
        before, self._tokens = self._tokens, tokens
        return before is not None and tokens > before

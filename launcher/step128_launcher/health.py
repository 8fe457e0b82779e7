"""Asks a serving vLLM for its health again and again, beside the supervisor, which must stay free to act on signals."""

import threading
from types import TracebackType
from typing import Self

from step128_launcher.client import ServerClient
from step128_launcher.status import ServerStatus

PROBE_SECONDS = 5.0
# So many failures in a row are worth a word: a server may miss one while it compiles or swaps.
FAILURES_TO_WARN = 3


class HealthWatch:
    """While entered, a thread asks /health every PROBE_SECONDS and keeps the answers in the status."""

    def __init__(self, client: ServerClient, status: ServerStatus) -> None:
        self._client = client
        self._status = status
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="health", daemon=True)
        self._warned = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not joined: a request to a server that hangs must not hold up the end.
        self._over.set()

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
            self._status.probed(self._client.healthy())

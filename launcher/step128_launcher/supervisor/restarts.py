"""When a server that died is started again: with growing pauses, and not for ever."""

from step128_launcher.supervisor.job import Patience


class RestartPolicy:
    """At most `max_restarts` with no `healthy_seconds` of health between them, after 1, 2, 4 … 60 seconds (Patience).

    It counts failures since the server was last healthy for that long, not failures in that time: a large model may
    load for longer than ten minutes, and would never reach the limit. The pauses are not random: a machine serves one
    model, so there is no herd to scatter.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures since the last long time of health."""
        return self._failures

    def failed(self, healthy_for: float) -> float | None:
        """Count a failure after `healthy_for` seconds of health; return the pause before the restart, None: no more."""
        patience = self._patience
        if healthy_for >= patience.healthy_seconds:
            self._failures = 0
        self._failures += 1
        if self._failures > patience.max_restarts:
            return None
        doubled: float = patience.first_pause_seconds * 2 ** (self._failures - 1)
        return min(patience.longest_pause_seconds, doubled)

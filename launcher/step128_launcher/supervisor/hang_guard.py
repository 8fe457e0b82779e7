"""Looks after a server that lives but does not answer: says what it does, keeps the evidence, gives it up at last."""

import time

from step128_launcher.supervisor.failures import Reason, ServerFailedError
from step128_launcher.supervisor.hang import ActivityWatch, Sight
from step128_launcher.supervisor.health import FAILURES_TO_WARN, HealthWatch
from step128_launcher.supervisor.job import Job, Patience
from step128_launcher.supervisor.process import ProcessGroup
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.status import ServerStatus

_GLANCE_SECONDS, _POLL_SECONDS = 2.0, 0.1


class HangGuard:
    """For one server."""

    def __init__(
        self, process: ProcessGroup, job: Job, status: ServerStatus, progress: Progress, patience: Patience
    ) -> None:
        self._process, self._job, self._status, self._progress = process, job, status, progress
        self._patience = patience
        self._watch: ActivityWatch | None = None

    def look(self, health: HealthWatch) -> None:
        """Watch what the server does while /health fails.

        Raises:
            ServerFailedError: it neither answered nor got anything done for `hang_seconds`.

        """
        snapshot, now = self._status.snapshot(), time.monotonic()
        if not snapshot.failed_probes:
            self._watch = None
            return
        if self._watch is None:
            self._watch = self._new_watch(now)
        self._watch.sample(now)
        if snapshot.failed_probes < FAILURES_TO_WARN:
            return
        sight, lifeless_seconds = self._watch.sight(), now - health.alive_at
        if snapshot.hung is not sight.activity:
            self._status.hangs(sight.activity)
            self._progress.say(f"It is {sight}.")
        if lifeless_seconds >= self._patience.hang_seconds:
            raise ServerFailedError(
                Reason.HUNG,
                f"vLLM did not answer and did no work for {lifeless_seconds:.0f} s; it was {sight}.",
                f"{self._keep(self._watch)} vLLM's log: {self._job.log}.",
            )

    def glance(self) -> tuple[Sight, str]:
        """Look for two seconds at a server that does not become ready; return what it does and where that is kept."""
        began = time.monotonic()
        watch = self._new_watch(began)
        while time.monotonic() < began + _GLANCE_SECONDS:
            time.sleep(_POLL_SECONDS)
            watch.sample(time.monotonic())
        return watch.sight(), self._keep(watch)

    def _new_watch(self, now: float) -> ActivityWatch:
        return ActivityWatch(self._process.members, self._job.plan.gpu_addresses, self._patience.root, now)

    def _keep(self, watch: ActivityWatch) -> str:
        """Write the evidence to a file and return a sentence about it."""
        path = self._job.state_dir / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            watch.write_evidence(path)
        except OSError as error:
            return f"The evidence could not be written to {path}: {error.strerror}."
        return f"Evidence: {path}."

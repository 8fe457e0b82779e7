"""What a person sees while the server starts: one moving line on a terminal, plain lines elsewhere."""

import contextlib
import time

from rich.console import Console
from rich.status import Status

from step128_launcher.verify import Check, Outcome

_COLOURS = {Outcome.PASS: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red"}


class Progress:
    """Writes to stderr, so that stdout stays for results.

    Writing may fail (a full disk, a terminal that is gone): then there is nobody to tell, and the server that is being
    looked after matters more, so that failure alone is passed over.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._phase = ""
        self._status: Status | None = None

    def phase(self, name: str) -> None:
        """Show what is going on now, with the seconds since the start."""
        if name == self._phase:
            return
        self._phase = name
        with contextlib.suppress(OSError):
            if not self._console.is_terminal:
                self._console.print(f"[{self._elapsed():5.1f} s] {name}", markup=False, highlight=False)
            elif self._status is None:
                self._status = self._console.status(_Elapsed(self))
                self._status.start()

    def say(self, text: str) -> None:
        """Print a line that stays, and end the moving one."""
        self.close()
        with contextlib.suppress(OSError):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def check(self, check: Check) -> None:
        """Print one check's result."""
        self.close()
        with contextlib.suppress(OSError):
            self._console.print(f"{check.outcome:4} ", style=_COLOURS[check.outcome], end="")
            self._console.print(f"{check.name}: {check.detail}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the moving line."""
        if self._status is not None:
            with contextlib.suppress(OSError):
                self._status.stop()
            self._status = None

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


class _Elapsed:
    """Renders the phase with the time, anew at each refresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich__(self) -> str:
        return f"{self._progress._phase} … {self._progress._elapsed():.0f} s"

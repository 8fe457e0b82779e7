"""What a person sees while the server starts: one moving line on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table

from step128_launcher.supervisor.comparison import Row, format_value
from step128_launcher.supervisor.load_pace import LoadPace
from step128_launcher.supervisor.loading import Loaded
from step128_launcher.supervisor.verify import Check, Outcome

_COLOURS = {Outcome.PASS: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red"}
_BAR_COLUMNS = 30


class Progress:
    """Writes to stderr, so that stdout stays for results.

    Writing may fail (a full disk, a terminal that is gone): then there is nobody to tell, and the server that is being
    looked after matters more, so that failure alone is passed over.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._phase = ""
        self._loaded: Loaded | None = None
        self._pace = LoadPace()
        self._status: Status | None = None

    def restart(self) -> None:
        """Count the seconds anew: another server is started."""
        self.close()
        self._started, self._phase, self._pace = time.monotonic(), "", LoadPace()

    def phase(self, name: str) -> None:
        """Show what is going on now, with the seconds since the start."""
        if name == self._phase:
            return
        self._phase, self._loaded = name, None
        self._show(name)

    def loading(self, loaded: Loaded) -> None:
        """Show how far the weights are: a bar on a terminal, else a line each tenth or half minute."""
        self._loaded = loaded
        if self._console.is_terminal:
            self._show("")
        elif self._pace.line_due(loaded, time.monotonic()):
            words = self._pace.words(loaded, time.monotonic())
            self._show(f"loading {loaded.what}: {loaded.fraction:4.0%}, {words}")

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

    def comparison(self, rows: Sequence[Row]) -> None:
        """Print what was planned beside what vLLM reports."""
        self.close()
        with contextlib.suppress(OSError):
            self._console.print(comparison_table(rows))

    def close(self) -> None:
        """End the moving line."""
        if self._status is not None:
            with contextlib.suppress(OSError):
                self._status.stop()
            self._status = None
        self._loaded = None

    def _show(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if not self._console.is_terminal:
                self._console.print(f"[{self._elapsed():5.1f} s] {line}", markup=False, highlight=False)
            elif self._status is None:
                self._status = self._console.status(_Moving(self))
                self._status.start()

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


def comparison_table(rows: Sequence[Row]) -> Table:
    """Return the table "planned, measured, difference"; sizes are those of one rank."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Planned against measured")
    for heading in ("Planned", "Measured", "Difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.item.label,
            format_value(row.item, row.planned),
            format_value(row.item, row.measured),
            "none" if row.within_precision else format_value(row.item, row.difference, sign=True),
        )
    return table


class _Moving:
    """Renders the phase with the time, or the bar of the weights, anew at each refresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich__(self) -> RenderableType:
        progress = self._progress
        elapsed, loaded = f"{progress._elapsed():.0f} s", progress._loaded
        if loaded is None:
            return f"{progress._phase} … {elapsed}"
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=loaded.fraction, width=_BAR_COLUMNS)
        words = progress._pace.words(loaded, time.monotonic())
        grid.add_row(f"loading {loaded.what}", bar, f"{loaded.fraction:4.0%}  {words} … {elapsed}")
        return grid

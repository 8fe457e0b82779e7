"""Progress of the training: a bar with the loss on a terminal, a line now and then in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOG_LINES = 16


@contextmanager
def training_progress(steps: int, visible: bool) -> Iterator[Callable[[int, float], None]]:
    """Yield ``show(steps done, loss in nats a token)``; everything goes to stderr."""
    console = Console(stderr=True)
    on_terminal = visible and console.is_terminal
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not on_terminal,
    ) as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"))

        def show(done: int, loss: float) -> None:
            bar.update(task, completed=done, loss=loss)
            if visible and not on_terminal and done % max(1, steps // _LOG_LINES) == 0:
                console.print(f"training {done}/{steps}, loss {loss:.3f}")

        yield show

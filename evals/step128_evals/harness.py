"""Ask many items at once: each outcome goes to the result file as it comes, and errors do not end a run too early."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from step128_evals.errors import (
    EvalError,
    NoSuchRouteError,
    ServerUnreachableError,
    UnauthorizedError,
    UnsupportedError,
)
from step128_evals.runs import Item, ResultFile

ERRORS_IN_A_ROW = 5
"""So many items that end in an error, one after the other, and a run stops: the rest would go the same way."""


@dataclass(frozen=True)
class Task:
    """One item still to be asked; ``ask`` gives its outcome, or raises :class:`EvalError`."""

    id: str
    ask: Callable[[], Awaitable[Item]]


OnItem = Callable[[int, int], None]
"""Called with (items done, items in all) when an item is done, and once at the start."""


async def run_tasks(tasks: Sequence[Task], results: ResultFile, concurrency: int, on_item: OnItem) -> None:
    """Ask every task that the result file lacks.

    Args:
        tasks: all of the run, finished ones included.
        results: gets each outcome. An :class:`EvalError` of one item becomes an item of status ``error`` (or
            ``unsupported``), and the next is asked.
        concurrency: requests in flight.
        on_item: for a progress bar.

    Raises:
        UnauthorizedError: the key is refused, which no other item would change.
        EvalError: :data:`ERRORS_IN_A_ROW` items ended in an error, one after the other; of the kind of the last.
    """
    by_id = {task.id: task for task in tasks}
    pending = results.pending(by_id)
    done, row = len(by_id) - len(pending), 0
    on_item(done, len(by_id))
    queue = iter(pending)

    async def work() -> None:
        nonlocal done, row
        for id in queue:
            try:
                item, error = await by_id[id].ask(), None
            except UnauthorizedError:
                raise
            except EvalError as raised:
                item, error = _outcome(id, raised), raised
            results.append(item)
            row = row + 1 if item.status == "error" else 0
            if error and row >= ERRORS_IN_A_ROW:
                raise _stopped(error, results, len(by_id)) from error
            done += 1
            on_item(done, len(by_id))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(pending))):
                group.create_task(work())
    except ExceptionGroup as group_error:
        # The first ended the run; the others were in flight beside it.
        raise group_error.exceptions[0] from None


def _outcome(id: str, error: EvalError) -> Item:
    """Unsupported only if the eval itself says so: a route that the probe found and that is gone is an error."""
    known = isinstance(error, UnsupportedError) and not isinstance(error, NoSuchRouteError)
    return Item(id, "unsupported" if known else "error", str(error))


def _stopped(error: EvalError, results: ResultFile, total: int) -> EvalError:
    kept = sum(item.final for item in results.items.values())
    kind = ServerUnreachableError if isinstance(error, ServerUnreachableError) else EvalError
    return kind(
        f"stopped after {ERRORS_IN_A_ROW} errors in a row, the last: {error} "
        f"{kept} of {total} items are in {results.path}; the same command goes on from there."
    )

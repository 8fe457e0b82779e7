"""Items go on after errors, stop when errors do not stop, and are never asked twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from step128_evals.errors import (
    EvalError,
    NoSuchRouteError,
    ServerUnreachableError,
    UnauthorizedError,
    UnsupportedError,
)
from step128_evals.harness import ERRORS_IN_A_ROW, Task, run_tasks
from step128_evals.runs import Item, Manifest, ResultFile, open_results


@pytest.fixture
def results(tmp_path: Path) -> ResultFile:
    return open_results(tmp_path / "a.jsonl", Manifest("tools", "m", "http://h", {}, {}))


def tasks(outcome: Callable[[int], Item | Exception], asked: list[int], count: int = 12) -> list[Task]:
    def task(number: int) -> Task:
        async def ask() -> Item:
            asked.append(number)
            await asyncio.sleep(0)
            found = outcome(number)
            if isinstance(found, Exception):
                raise found
            return found

        return Task(str(number), ask)

    return [task(number) for number in range(count)]


def passed(number: int) -> Item:
    return Item(str(number), "passed")


def run(tasks: list[Task], results: ResultFile, concurrency: int = 1) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    asyncio.run(run_tasks(tasks, results, concurrency, lambda done, total: seen.append((done, total))))
    return seen


@pytest.mark.parametrize("concurrency", [1, 5, 50])
def test_every_item_once(results: ResultFile, concurrency: int) -> None:
    asked: list[int] = []
    assert run(tasks(passed, asked), results, concurrency)[-1] == (12, 12)
    assert sorted(asked) == list(range(12)) and len(results.items) == 12
    assert run(tasks(passed, asked), results, concurrency) == [(12, 12)]
    assert len(asked) == 12


def test_an_error_here_and_there_does_not_stop(results: ResultFile) -> None:
    asked: list[int] = []
    run(tasks(lambda n: EvalError(f"no {n}") if n % 2 else passed(n), asked), results)
    assert results.items["3"] == Item("3", "error", "no 3")
    assert [item.status for item in results.items.values()].count("error") == 6
    run(tasks(passed, asked), results)
    assert asked[12:] == [1, 3, 5, 7, 9, 11]
    assert {item.status for item in results.items.values()} == {"passed"}


def test_errors_in_a_row_stop_and_keep(results: ResultFile) -> None:
    asked: list[int] = []
    with pytest.raises(ServerUnreachableError, match=r"2 of 12 items are in .*the same command goes on") as error:
        run(tasks(lambda n: passed(n) if n < 2 else ServerUnreachableError("gone"), asked), results)
    assert error.value.exit_code == 69 and "gone" in str(error.value)
    assert len(asked) == 2 + ERRORS_IN_A_ROW
    run(tasks(passed, asked), results)
    assert sorted(asked[2 + ERRORS_IN_A_ROW :]) == list(range(2, 12))


def test_errors_that_come_again_do_not_keep_the_others_out(results: ResultFile) -> None:
    asked: list[int] = []
    items = tasks(lambda n: EvalError("always") if n < ERRORS_IN_A_ROW else passed(n), asked)
    for _ in range(2):
        with pytest.raises(EvalError, match="errors in a row"):
            run(items, results)
    assert sum(item.final for item in results.items.values()) == len(items) - ERRORS_IN_A_ROW


def test_a_refused_key_stops_at_once(results: ResultFile) -> None:
    asked: list[int] = []
    with pytest.raises(UnauthorizedError):
        run(tasks(lambda n: UnauthorizedError("key"), asked), results)
    assert asked == [0] and not results.items


def test_unsupported_is_an_outcome(results: ResultFile) -> None:
    asked: list[int] = []
    run(tasks(lambda n: UnsupportedError("no images"), asked), results)
    assert {item.status for item in results.items.values()} == {"unsupported"} and len(asked) == 12


def test_a_route_that_is_gone_is_an_error(results: ResultFile) -> None:
    run(tasks(lambda n: NoSuchRouteError("404") if n == 3 else passed(n), []), results)
    assert results.items["3"].status == "error"
    with pytest.raises(EvalError, match="stopped after 5 errors in a row"):
        run(tasks(lambda n: NoSuchRouteError("404"), [], count=30), results)


def test_a_defect_of_ours_is_no_item(results: ResultFile) -> None:
    with pytest.raises(ZeroDivisionError):
        run(tasks(lambda n: ZeroDivisionError(), []), results)

"""One session of a soak: keeps so many requests in flight as planned, samples the server, asks the canary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from step128_evals.errors import EvalError, ServerUnreachableError, UnauthorizedError
from step128_evals.metrics import ServerCounters, read_at_rest, read_metrics
from step128_evals.runs import Item, ResultFile, Status
from step128_evals.soak.plan import Plan, Request
from step128_evals.soak.requests import Asker

CANARIES_ALONE = 3
"""Asked before and after, with nothing else in flight."""
FAILURES_IN_A_ROW = 20
"""So many requests without an answer, one after the other, and the server counts as gone."""
_STEP_SECONDS = 0.25
_END = "whole"


@dataclass
class Session:
    """Goes on where the result file ends; ``at`` of an item is in seconds of the soak, pauses left out."""

    plan: Plan
    asker: Asker
    results: ResultFile
    canary_seconds: float
    sample_seconds: float
    on_second: Callable[[int, int], None]
    clock: Callable[[], float] = time.monotonic
    _unanswered: int = field(default=0, init=False)
    _gone: str = field(default="", init=False)

    async def run(self) -> None:
        """Run to the end of the plan, or until the server is gone or refuses the key.

        Raises:
            CannotWriteError: the disk is full, say.
        """
        items = self.results.items
        if _END in items and items[_END].final:
            return
        self._begun = self.clock()
        self._offset = max((item.data.get("at", 0.0) for item in items.values()), default=0.0)
        number = 1 + sum(id.startswith("session-") for id in items)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._add(f"session-{number}", {"kind": "session", "started": started})
        self.results.append(Item(_END, "error", "interrupted before its end; the same command goes on with the rest"))
        if not any(id.startswith("request-") for id in items):
            await self._alone("before")
        await self._load()
        if self._gone:
            return
        await self._sample(f"drained-{number}", read_at_rest, drained=True)
        await self._alone("after")
        if not self._gone:
            self.results.append(Item(_END, "measured", data={"kind": "end", "at": self._at()}))

    def _at(self) -> float:
        return self._offset + self.clock() - self._begun

    def _add(self, id: str, data: dict[str, Any], status: Status = "measured", why: str = "") -> None:
        self.results.append(Item(id, status, why, {"at": round(self._at(), 3)} | data))

    async def _alone(self, when: str) -> None:
        await self._sample(f"alone-{when}", read_at_rest)
        for index in range(CANARIES_ALONE):
            await self._canary(f"canary-{when}-{index + 1}", alone=when)

    async def _load(self) -> None:
        numbers = [int(id.removeprefix("request-")) for id in self.results.items if id.startswith("request-")]
        number = max(numbers, default=-1) + 1
        flying: set[asyncio.Task[None]] = set()
        beside = [asyncio.create_task(self._sampling()), asyncio.create_task(self._canaries())]
        try:
            while (at := self._at()) < self.plan.seconds and not self._gone:
                self.on_second(int(at), int(self.plan.seconds))
                level = self.plan.requests_at_once(at)
                while len(flying) < level:
                    flying.add(asyncio.create_task(self._request(self.plan.request(number), level)))
                    number += 1
                done, flying = await asyncio.wait(flying, timeout=_STEP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            if flying:
                await asyncio.wait(flying)
        finally:
            for task in (*beside, *flying):
                task.cancel()
            outcomes = await asyncio.gather(*beside, *flying, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _request(self, request: Request, level: int) -> None:
        data = {"kind": request.kind, "started_at": round(self._at(), 3), "at_once": level}
        try:
            data |= await self.asker.ask(request)
        except EvalError as error:
            self._add(request.id, data, "failed", str(error))
            self._count_failure(error)
            await asyncio.sleep(_STEP_SECONDS)  # a server that refuses at once must not be flooded
        else:
            self._unanswered = 0
            self._add(request.id, data, "passed")

    def _count_failure(self, error: EvalError) -> None:
        self._unanswered = self._unanswered + 1 if isinstance(error, ServerUnreachableError) else 0
        if self._unanswered >= FAILURES_IN_A_ROW or isinstance(error, UnauthorizedError):
            self._gone = str(error)

    async def _canaries(self) -> None:
        for number in range(len(self.results.items), 10**9):
            await asyncio.sleep(self.canary_seconds)
            await self._canary(f"canary-{number}")

    async def _canary(self, id: str, alone: str = "") -> None:
        data = {"kind": "canary", "alone": alone, "started_at": round(self._at(), 3)}
        try:
            self._add(id, data | await self.asker.canary(), "passed")
        except EvalError as error:
            self._add(id, data, "failed", str(error))
            self._count_failure(error)
            if alone:
                self._gone = str(error)

    async def _sampling(self) -> None:
        for number in range(len(self.results.items), 10**9):
            await self._sample(f"sample-{number}", read_metrics)
            await asyncio.sleep(self.sample_seconds)

    async def _sample(self, id: str, read: Callable[..., Any], drained: bool = False) -> None:
        try:
            counters: ServerCounters | None = await read(self.asker.client)
        except EvalError:
            return  # requests fail at the same time, and are counted
        if counters is not None:
            shown = {
                name: getattr(counters, name) for name in ("running", "waiting", "kv_cache_usage", "resident_bytes")
            }
            self._add(id, {"kind": "sample", "drained": drained} | shown)

"""Hold the calls of one answer against those that are due: each call has one fault at most."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

from step128_evals.tools.faults import Fault
from step128_evals.tools.matching import assign, matches
from step128_evals.tools.scenarios import DueCall

Schemas = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """A call that is due, or was made, or both; ``fault`` None: it is right. ``made`` is a call's position in the
    answer, None for one that is missing."""

    due: DueCall | None
    made: int | None
    fault: Fault | None


@dataclass(frozen=True)
class _Made:
    """A call as it came; ``fault`` if its arguments are no JSON object that the schema of its function allows."""

    name: str
    arguments: Any
    fault: Fault | None


def judge_calls(
    schemas: Schemas, due: Sequence[DueCall], calls: Sequence[dict[str, str]], earlier_ids: Collection[str]
) -> list[Outcome]:
    """Pair due calls with made ones, irrespective of order: right ones first, then those of the same function, then
    any. What is left over is missing, or one too many.

    Args:
        schemas: of the arguments, by the names of the offered functions.
        due: the calls that are due.
        calls: as in :class:`step128_evals.chat.Answer`.
        earlier_ids: of the calls before in the conversation; an id must be new.
    """
    made = [_read(schemas, call) for call in calls]
    partner: dict[int, int] = {}
    free = set(range(len(made)))
    for fits in (_is_right, _is_same_function, _is_any):
        open_due = [position for position in range(len(due)) if position not in partner]
        open_made = sorted(free)
        found = assign([due[i] for i in open_due], [made[i] for i in open_made], fits)
        for position, partner_position in zip(open_due, found, strict=True):
            if partner_position is not None:
                partner[position] = open_made[partner_position]
                free.discard(open_made[partner_position])
    outcomes = []
    for position, call in enumerate(due):
        if position in partner:
            outcomes.append(Outcome(call, partner[position], _fault(call, made[partner[position]])))
        else:
            outcomes.append(Outcome(call, None, Fault("missing_call", f"no call of {call.name}")))
    kind = "extra_call" if due else "unneeded_call"
    for position in sorted(free):
        outcomes.append(Outcome(None, position, Fault(kind, f"{made[position].name}({calls[position]['arguments']})")))
    return _with_ids(outcomes, calls, earlier_ids)


def _read(schemas: Schemas, call: dict[str, str]) -> _Made:
    name = call["name"]
    try:
        arguments = json.loads(call["arguments"], parse_constant=_refuse_constant)
        schema = schemas.get(name, {})
        problem = next(iter(Draft202012Validator(schema).iter_errors(arguments)), None)
    except (ValueError, RecursionError) as error:  # the second: nested thousands deep
        return _Made(name, None, Fault("invalid_json", f"{name}: {error}: {call['arguments'][:300]!r}"))
    if problem is None:
        return _Made(name, arguments, None)
    return _Made(name, arguments, Fault("schema_violation", f"{name}{problem.json_path[1:]}: {problem.message}"))


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def _is_right(due: DueCall, made: _Made) -> bool:
    return made.fault is None and made.name == due.name and matches(due.arguments, made.arguments)


def _is_same_function(due: DueCall, made: _Made) -> bool:
    return made.name == due.name


def _is_any(_due: DueCall, _made: _Made) -> bool:
    return True


def _fault(due: DueCall, made: _Made) -> Fault | None:
    if made.name != due.name:
        return Fault("wrong_function", f"{made.name!r} instead of {due.name}")
    if made.fault or _is_right(due, made):
        return made.fault
    came, right = (json.dumps(value, ensure_ascii=False) for value in (made.arguments, due.arguments))
    return Fault("wrong_arguments", f"{due.name}: {came} instead of {right}")


def _with_ids(outcomes: list[Outcome], calls: Sequence[dict[str, str]], earlier_ids: Collection[str]) -> list[Outcome]:
    """Find fault with right calls whose id is empty or was there before."""
    seen = set(earlier_ids)
    bad = set()
    for position, call in enumerate(calls):
        if not call["id"] or call["id"] in seen:
            bad.add(position)
        seen.add(call["id"])
    return [
        Outcome(
            outcome.due, outcome.made, Fault("bad_ids", f"the id {calls[outcome.made]['id']!r} is empty or not new")
        )
        if outcome.made in bad and outcome.made is not None and outcome.fault is None
        else outcome
        for outcome in outcomes
    ]

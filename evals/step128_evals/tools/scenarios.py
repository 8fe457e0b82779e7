"""The conversations that are asked, read from the YAML files beside: tools, what the user says, which calls are due."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from step128_evals.errors import BadInputError
from step128_evals.files import sha256

KINDS = ("single", "arguments", "parallel", "no_call", "multi_turn", "errors", "text", "choice")
"""Each is a file of scenarios."""

AUTO, REQUIRED, NONE = "auto", "required", "none"


@dataclass(frozen=True)
class DueCall:
    """A call that is right: the function and its arguments, as :func:`step128_evals.tools.matching.matches` reads
    them. ``result`` is what the tool then returns; None: nothing is asked after this call."""

    name: str
    arguments: dict[str, Any]
    result: str | None


@dataclass(frozen=True)
class Step:
    """One request and what is right to come back.

    ``user`` is said first; None: the step follows the results of tools. Without ``calls`` no call is due, and the text
    must have one of the alternatives of each entry of ``answer``. Where ``without`` has words, the tools found nothing:
    the text must have none of them, and no number but 0, which would be invented.
    """

    user: str | None
    calls: tuple[DueCall, ...]
    answer: tuple[tuple[str, ...], ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """``tool_choice``: :data:`AUTO`, :data:`REQUIRED`, :data:`NONE`, or the name of the one function to call."""

    id: str
    kind: str
    tools: tuple[dict[str, Any], ...]
    steps: tuple[Step, ...]
    system: str | None
    tool_choice: str

    @property
    def sha256(self) -> str:
        """Of all that is asked and expected."""
        return sha256(json.dumps(self, default=vars, sort_keys=True))


@cache
def load_scenarios() -> tuple[Scenario, ...]:
    """All scenarios, kind after kind."""
    tools = {name: _tool(name, entry) for name, entry in _read("tools").items()}
    return tuple(_scenario(kind, entry, tools) for kind in KINDS for entry in _read(kind))


def choose_scenarios(scenarios: Sequence[Scenario], patterns: str | None) -> list[Scenario]:
    """Those whose id (``single-weather``) or kind fits one of the patterns, which have commas between them.

    Raises:
        BadInputError: a pattern fits none.
    """
    if patterns is None:
        return list(scenarios)
    wanted: set[str] = set()
    for pattern in patterns.split(","):
        found = {s.id for s in scenarios if pattern == s.kind or fnmatch.fnmatchcase(s.id, pattern)}
        if not found:
            raise BadInputError(
                f"no scenario fits {pattern!r}; there are the kinds {', '.join(KINDS)}, and ids such as "
                f"{scenarios[0].id} (--list names them all)"
            )
        wanted |= found
    return [scenario for scenario in scenarios if scenario.id in wanted]


def _read(name: str) -> Any:
    return yaml.safe_load(resources.files(__package__).joinpath("scenarios", f"{name}.yaml").read_text("utf-8"))


def _tool(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    optional = entry.get("optional", [])
    parameters = {
        "type": "object",
        "properties": entry["parameters"],
        "required": [parameter for parameter in entry["parameters"] if parameter not in optional],
        "additionalProperties": False,
    }
    function = {"name": name, "description": entry["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def _scenario(kind: str, entry: dict[str, Any], tools: dict[str, Any]) -> Scenario:
    return Scenario(
        id=f"{kind}-{entry['id']}",
        kind=kind,
        tools=tuple(tools[name] for name in entry["tools"]),
        steps=tuple(_step(step) for step in entry["steps"]),
        system=entry.get("system"),
        tool_choice=entry.get("tool_choice", AUTO),
    )


def _step(entry: dict[str, Any]) -> Step:
    answer = [[part] if isinstance(part, str) else part for part in entry.get("answer", [])]
    calls = [
        DueCall(call["name"], call["arguments"], _result(call["result"]) if "result" in call else None)
        for call in entry.get("calls", [])
    ]
    return Step(entry.get("user"), tuple(calls), tuple(map(tuple, answer)), tuple(entry.get("without", ())))


def _result(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Hold the conversation of one scenario, step after step, until it is through or an answer is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from step128_evals.chat import Answer, ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.errors import EvalError, NoSuchRouteError, UnsupportedError
from step128_evals.reasoning.switch import Switch, refused, thinks_hidden, thinks_openly
from step128_evals.runs import Item
from step128_evals.tools.checks import Verdict, check_answer
from step128_evals.tools.faults import TRUNCATED
from step128_evals.tools.filler import Filler
from step128_evals.tools.scenarios import AUTO, NONE, REQUIRED, Scenario

RESERVE_TOKENS = 3072
"""For a scenario's own prompt (tools, turns, results) beside the filler and the answer."""

_SWALLOWED = frozenset({"missing_call", "leaked_tags", "empty_answer", TRUNCATED})
"""Faults of answers that do not show all that was generated."""


@dataclass(frozen=True)
class Variant:
    """One way to ask a scenario."""

    stream: bool
    thinking: bool
    depth_tokens: int

    @property
    def name(self) -> str:
        """As in the ids of items: ``streamed.plain.32768``."""
        return ".".join(
            ("streamed" if self.stream else "whole", "thinking" if self.thinking else "plain", str(self.depth_tokens))
        )


@dataclass(frozen=True)
class Asking:
    """What all conversations of a run share. ``fillers``: by depth, which is above 0; those that the endpoint's context
    of ``context_tokens`` has no room for need not be there."""

    client: Client
    model: str
    context_tokens: int | None
    max_tokens: int
    switch: Switch
    fillers: Mapping[int, Filler]

    def too_deep(self, depth_tokens: int) -> str | None:
        """Why a depth cannot be asked; None if it can."""
        needed = depth_tokens + RESERVE_TOKENS + self.max_tokens
        if self.context_tokens is None or needed <= self.context_tokens:
            return None
        return (
            f"{depth_tokens} tokens of filler, {RESERVE_TOKENS} for the scenario and --max-tokens {self.max_tokens} "
            f"are more than the context of {self.context_tokens} tokens"
        )

    async def hold(self, id: str, scenario: Scenario, variant: Variant) -> Item:
        """The outcome of one scenario in one variant.

        Raises:
            EvalError: a request was not answered.
        """
        about = {"scenario": scenario.id, "kind": scenario.kind, **asdict(variant)}
        try:
            rows = await self._steps(scenario, variant)
        except NoSuchRouteError:
            raise
        except UnsupportedError as error:
            return Item(id, "unsupported", str(error), about)
        except EvalError as error:
            special = scenario.tool_choice != AUTO or (variant.depth_tokens and self.context_tokens is None)
            if special and refused(error):
                return Item(id, "unsupported", str(error), about)
            raise
        faults = [{"step": step, **asdict(f)} for step, (_, verdict) in enumerate(rows) for f in verdict.faults]
        data = about | {
            "calls": sum(len(verdict.outcomes) for _, verdict in rows),
            "failed_calls": sum(verdict.failed_calls for _, verdict in rows),
            "malformed_calls": sum(verdict.malformed_calls for _, verdict in rows),
            "faults": faults,
            "steps_due": len(scenario.steps),
            "answers": [asdict(answer) for answer, _ in rows],
        }
        why = f"step {faults[0]['step'] + 1}, {faults[0]['kind']}: {faults[0]['detail']}" if faults else ""
        return Item(id, "failed" if faults else "passed", why, data)

    async def _steps(self, scenario: Scenario, variant: Variant) -> list[tuple[Answer, Verdict]]:
        if reason := self.too_deep(variant.depth_tokens):
            raise UnsupportedError(reason)
        setting = self.switch.on if variant.thinking else self.switch.off
        if setting.options is None:
            raise UnsupportedError(f"thinking cannot be switched {'on' if variant.thinking else 'off'}: {setting.why}")
        messages: list[dict[str, Any]] = [{"role": "system", "content": scenario.system}] if scenario.system else []
        if variant.depth_tokens:
            messages += self.fillers[variant.depth_tokens].messages
        ids: set[str] = set()
        rows: list[tuple[Answer, Verdict]] = []
        for step in scenario.steps:
            if step.user is not None:
                messages.append({"role": "user", "content": step.user})
            request = ChatRequest(
                list(messages),
                self.max_tokens,
                tools=list(scenario.tools),
                stream=variant.stream,
                extra=setting.options | _tool_choice(scenario),
            )
            answer = await ask_chat(self.client, self.model, request)
            verdict = check_answer(scenario, step, answer, ids)
            if not variant.thinking and _thought(answer, verdict):
                raise UnsupportedError("thinking is switched off, and it thinks all the same")
            rows.append((answer, verdict))
            if verdict.faults:
                break
            ids |= {call["id"] for call in answer.tool_calls}
            messages += [answer.assistant_message, *_results(answer, verdict)]
        return rows


def _thought(answer: Answer, verdict: Verdict) -> bool:
    """Whether an answer was thought about. Tokens that are not to be seen tell of it only where nothing is missing:
    else they may be a call that the server's parser swallowed."""
    missing = any(fault.kind in _SWALLOWED for fault in verdict.faults)
    return thinks_openly(answer) or (thinks_hidden(answer) and not missing)


def _tool_choice(scenario: Scenario) -> dict[str, Any]:
    if scenario.tool_choice in (AUTO, REQUIRED, NONE):
        return {"tool_choice": scenario.tool_choice}
    return {"tool_choice": {"type": "function", "function": {"name": scenario.tool_choice}}}


def _results(answer: Answer, verdict: Verdict) -> list[dict[str, Any]]:
    """What the tools return, in the order in which they were called."""
    results = {outcome.made: outcome.due.result for outcome in verdict.outcomes if outcome.due}
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": results[position]}
        for position, call in enumerate(answer.tool_calls)
    ]

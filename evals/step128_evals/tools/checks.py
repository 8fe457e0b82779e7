"""What is wrong with one answer: its calls, its text, and what says that it ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from step128_evals.chat import Answer
from step128_evals.tools.calls import Outcome, judge_calls
from step128_evals.tools.faults import TRUNCATED, Fault
from step128_evals.tools.leaks import find_leak
from step128_evals.tools.scenarios import AUTO, Scenario, Step
from step128_evals.tools.wording import find_invented, has


@dataclass(frozen=True)
class Verdict:
    """``outcomes``: of the calls that were due or made. ``other``: faults of the answer that are no single call's."""

    outcomes: tuple[Outcome, ...]
    other: tuple[Fault, ...]

    @property
    def faults(self) -> list[Fault]:
        """All of them."""
        return [outcome.fault for outcome in self.outcomes if outcome.fault] + list(self.other)

    @property
    def failed_calls(self) -> int:
        """Calls with a fault; all of an answer's if its form is wrong: its finish reason, or marks in its text."""
        return self._count(any_kind=True)

    @property
    def malformed_calls(self) -> int:
        """Those of the failed calls whose form is wrong."""
        return self._count(any_kind=False)

    def _count(self, any_kind: bool) -> int:
        if any(fault.malformed for fault in self.other):
            return len(self.outcomes)
        return sum(o.fault is not None and (any_kind or o.fault.malformed) for o in self.outcomes)


def check_answer(scenario: Scenario, step: Step, answer: Answer, earlier_ids: Collection[str] = ()) -> Verdict:
    """Judge one answer.

    Args:
        scenario: gives the tools and ``tool_choice``.
        step: what is due.
        answer: what came.
        earlier_ids: ids of the calls of the conversation so far.
    """
    if answer.finish_reason == "length":
        cut = Fault(TRUNCATED, f"cut off after {answer.tokens} tokens")
        return Verdict(tuple(Outcome(due, None, cut) for due in step.calls), () if step.calls else (cut,))
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in scenario.tools}
    outcomes = judge_calls(schemas, step.calls, answer.tool_calls, earlier_ids)
    other = []
    if (mark := find_leak(answer.text, schemas)) is not None:
        leak = Fault("leaked_tags", f"the text has {mark!r}")
        # A call that stands in the text as letters is why it is missing among the calls.
        explained = [replace(o, fault=leak) if o.made is None else o for o in outcomes]
        other += [leak] if explained == outcomes else []
        outcomes = explained
    elif not step.calls and not answer.tool_calls:
        other += _text_faults(step, answer.text)
    if answer.tool_calls and answer.finish_reason not in _finish_reasons(scenario):
        other.append(Fault("wrong_finish_reason", f"{answer.finish_reason!r} after calls"))
    return Verdict(tuple(outcomes), tuple(other))


def _finish_reasons(scenario: Scenario) -> set[str]:
    """OpenAI's own API ends with ``stop`` when the request forced the call, and servers differ in it."""
    return {"tool_calls"} if scenario.tool_choice == AUTO else {"tool_calls", "stop"}


def _text_faults(step: Step, text: str) -> list[Fault]:
    if not text.strip():
        return [Fault("empty_answer", "neither text nor a call")]
    kind = "result_not_used" if step.user is None else "wrong_answer"
    for alternatives in step.answer:
        if not any(has(text, each) for each in alternatives):
            return [Fault(kind, f"no {' or '.join(map(repr, alternatives))} in {text[:300]!r}")]
    if step.without and (invented := find_invented(text, step.without)) is not None:
        return [Fault(kind, f"{invented!r} in {text[:300]!r}, where nothing was found")]
    return []

"""Each fault is found as exactly its kind, and nothing else with it."""

from __future__ import annotations

import json

import pytest
from tool_answers import BY_ID

from step128_evals.chat import Answer
from step128_evals.tools.checks import Verdict, check_answer
from step128_evals.tools.faults import KINDS

Call = tuple[str, str]

ROME = ("get_weather", '{"city": "Rome"}')
OSLO, NAIROBI = ("get_weather", '{"city": "Oslo"}'), ("get_weather", '{"city": "Nairobi"}')
LISBON = ("get_weather", '{"city": "Lisbon"}')


def judge(
    scenario: str, *calls: Call, text: str = "", finish: str | None = None, ids: str | None = None, step: int = 0
) -> Verdict:
    """``ids``: with a blank between them."""
    names = ids.split(" ") if ids is not None else [str(number) for number in range(len(calls))]
    made = tuple({"id": id, "name": name, "arguments": given} for id, (name, given) in zip(names, calls, strict=True))
    answer = Answer(text, "", made, finish or ("tool_calls" if calls else "stop"), 9, 0.1, 0.2)
    return check_answer(BY_ID[scenario], BY_ID[scenario].steps[step], answer, {"before"})


def kinds(verdict: Verdict) -> list[str]:
    found = [fault.kind for fault in verdict.faults]
    assert set(found) <= set(KINDS)
    return found


SAME = "parallel-same-twice"


@pytest.mark.parametrize(
    ("verdict", "found", "calls", "failed", "malformed"),
    [
        (judge("single-weather", LISBON), [], 1, 0, 0),
        (judge("single-weather", LISBON, text="One moment."), [], 1, 0, 0),
        (judge(SAME, NAIROBI, OSLO), [], 2, 0, 0),
        # Form.
        (judge("single-weather", ("get_weather", '{"city": "Lisbon"')), ["invalid_json"], 1, 1, 1),
        (judge("single-weather", ("get_weather", "")), ["invalid_json"], 1, 1, 1),
        (judge("single-currency", ("convert_currency", '{"amount": NaN, "source": "CHF", "target": "NOK"}')),
         ["invalid_json"], 1, 1, 1),
        (judge("single-weather", ("get_weather", '{"town": "Lisbon"}')), ["schema_violation"], 1, 1, 1),
        (judge("single-weather", ("get_weather", '"Lisbon"')), ["schema_violation"], 1, 1, 1),
        (judge("single-order-list", ("list_orders", '{"customer_id": 8812}')), ["schema_violation"], 1, 1, 1),
        (judge("single-weather", text='<tool_call>{"name": "get_weather"'), ["leaked_tags"], 1, 1, 1),
        (judge("single-weather", LISBON, text="</think>"), ["leaked_tags"], 1, 1, 1),
        (judge("no_call-sum", text="7<|im_end|>"), ["leaked_tags"], 0, 0, 0),
        (judge("single-weather", LISBON, ids=""), ["bad_ids"], 1, 1, 1),
        (judge("single-weather", LISBON, ids="before"), ["bad_ids"], 1, 1, 1),
        (judge(SAME, OSLO, NAIROBI, ids="a a"), ["bad_ids"], 2, 1, 1),
        (judge("single-weather", LISBON, finish="stop"), ["wrong_finish_reason"], 1, 1, 1),
        (judge(SAME, OSLO, NAIROBI, finish="stop"), ["wrong_finish_reason"], 2, 2, 2),
        (judge("choice-required", ("get_weather", '{"city": "Porto"}'), finish="stop"), [], 1, 0, 0),
        # Choice of the call.
        (judge("single-forecast", ("get_weather", '{"city": "Tallinn"}')), ["wrong_function"], 1, 1, 0),
        (judge("single-weather", ("get_wether", '{"city": "Lisbon"}')), ["wrong_function"], 1, 1, 0),
        (judge("single-weather", ROME), ["wrong_arguments"], 1, 1, 0),
        (judge("arguments-optional-left-out", ("search_books", '{"subject": "beekeeping", "limit": 10}')),
         ["wrong_arguments"], 1, 1, 0),
        (judge("single-weather", text="I cannot know."), ["missing_call"], 1, 1, 0),
        (judge(SAME, OSLO), ["missing_call"], 2, 1, 0),
        (judge("single-weather", LISBON, ROME), ["extra_call"], 2, 1, 0),
        (judge(SAME, OSLO, OSLO), ["wrong_arguments"], 2, 1, 0),
        (judge("no_call-sum", ROME), ["unneeded_call"], 1, 1, 0),
        (judge("multi_turn-result-balance", ("get_balance", "{}"), step=1), ["unneeded_call"], 1, 1, 0),
        # Text.
        (judge("no_call-sum", text="It is 8."), ["wrong_answer"], 0, 0, 0),
        (judge("no_call-sum", text="It is 7."), [], 0, 0, 0),
        (judge("no_call-thanks", text=" \n"), ["empty_answer"], 0, 0, 0),
        (judge("multi_turn-result-balance", text="About 7000 euros.", step=1), ["result_not_used"], 0, 0, 0),
        (judge("multi_turn-result-balance", text="It is **7,381.46** euros.", step=1), [], 0, 0, 0),
        (judge("multi_turn-result-balance", text="17381.46", step=1), ["result_not_used"], 0, 0, 0),
        (judge("multi_turn-result-balance", text="7381.461", step=1), ["result_not_used"], 0, 0, 0),
        # The end.
        (judge("single-weather", ("get_weather", '{"ci'), finish="length"), ["truncated"], 1, 1, 0),
        (judge(SAME, text="<tool_call>", finish="length"), ["truncated"] * 2, 2, 2, 0),
        (judge("no_call-sum", text="", finish="length"), ["truncated"], 0, 0, 0),
    ],
)  # fmt: skip
def test_fault(verdict: Verdict, found: list[str], calls: int, failed: int, malformed: int) -> None:
    assert kinds(verdict) == found
    assert (len(verdict.outcomes), verdict.failed_calls, verdict.malformed_calls) == (calls, failed, malformed)


def test_calls_are_paired_by_what_fits_best() -> None:
    """The right call is found behind a wrong one of the same function; a broken one stands for the due one left."""
    verdict = judge(SAME, ("get_weather", "{"), OSLO)
    assert kinds(verdict) == ["invalid_json"]
    assert [
        (outcome.due and outcome.due.arguments["city"]["$any_case"], outcome.made) for outcome in verdict.outcomes
    ] == [
        ("Oslo", 1),
        ("Nairobi", 0),
    ]


def test_whitespace_inside_a_string_counts_and_between_tokens_does_not() -> None:
    right = {"title": "Shopping", "body": "flour\neggs (10)\nlemons"}
    assert kinds(judge("text-line-breaks", ("save_note", json.dumps(right, indent=4)))) == []
    for body in ("flour\n\neggs (10)\nlemons", "flour\neggs (10)\nlemons\n", "flour eggs (10) lemons"):
        assert kinds(judge("text-line-breaks", ("save_note", json.dumps(right | {"body": body})))) == [
            "wrong_arguments"
        ]


def test_details_are_for_people() -> None:
    details = [fault.detail for fault in judge("arguments-boolean-true", ("lock_doors", '{"locked": "yes"}')).faults]
    assert details == ["lock_doors.locked: 'yes' is not of type 'boolean'"]

"""What counts as the right arguments, and as a mark that leaked."""

from __future__ import annotations

from typing import Any

import pytest

from step128_evals.tools.leaks import find_leak
from step128_evals.tools.matching import assign, matches


@pytest.mark.parametrize(
    ("expected", "actual", "fits"),
    [
        (3, 3, True),
        (3, 3.0, True),
        (3, "3", False),
        (1, True, False),
        (True, 1, False),
        (False, False, True),
        ("0153", 153, False),
        ("a b", "a b", True),
        ("a b", "a  b", False),
        ("a b", "a b\n", False),
        ("Oslo", "oslo", False),
        (None, None, True),
        (None, "", False),
        ({"$any_case": "Évora"}, "éVORA", True),
        ({"$any_case": "Oslo"}, "Oslo, Norway", False),
        ({"$contains": "Bee"}, "on beekeeping", True),
        ({"$contains": "bee"}, 3, False),
        ({"$one_of": [1, {"$any_case": "x"}]}, "X", True),
        ({"$one_of": [1, 2]}, 3, False),
        ({"$set": [1, 2, 2]}, [2, 1, 2], True),
        ({"$set": [1, 2, 2]}, [1, 1, 2], False),
        ({"$set": [1, 2]}, [1, 2, 3], False),
        ({"$set": [{"$contains": "a"}, "ab"]}, ["ab", "xa"], True),
        ({"$set": [1]}, 1, False),
        ([1, 2], [2, 1], False),
        ([1, 2], [1], False),
        ([], {}, False),
        ({}, {}, True),
        ({}, {"x": 1}, False),
        ({"a": {"b": [1]}}, {"a": {"b": [1]}}, True),
        ({"a": {"b": [1]}}, {"a": {"b": [1], "c": 2}}, False),
        ({"a": 1, "b": {"$optional": 2}}, {"a": 1}, True),
        ({"a": 1, "b": {"$optional": 2}}, {"a": 1, "b": 2}, True),
        ({"a": 1, "b": {"$optional": 2}}, {"a": 1, "b": 3}, False),
        ({"a": 1}, [["a", 1]], False),
    ],
)
def test_matches(expected: Any, actual: Any, fits: bool) -> None:
    assert matches(expected, actual) is fits


def test_assign_serves_as_many_as_possible() -> None:
    """First come, first served would leave the second without: "ab" fits both, "xa" only the first."""
    assert assign([{"$contains": "a"}, "ab"], ["ab", "xa"], matches) == [1, 0]
    assert assign([1, 1, 2], [2, 1], matches) == [1, None, 0]
    assert assign([], [1], matches) == []


@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("It is 21 degrees, <b>really</b>, and 3 < 4 > 2.", None),
        ("I would use get_weather(city) for that.", None),
        ('The name is "get_weather".', None),
        ("a | b | c <|> x", None),
        ("<tool_call>\n{}", "<tool_call>"),
        ("so far </think> yes", "</think>"),
        ("done<|im_end|>", "<|im_end|>"),
        ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),
        ("<function=get_weather>\n<parameter=city>", "<function=get_weather>"),
        ("[TOOL_CALLS][", "[TOOL_CALLS]"),
        ('{"name": "get_weather", "arguments": {}}', '"name": "get_weather", "arguments":'),
        ('{"name": "other", "arguments": {}}', None),
        ("```python\nset_timer(\n    minutes=3\n)\n```", "```python\nset_timer(\n    minutes=3\n)"),
        ('[get_weather(city="Rome")]', '[get_weather(city="Rome")'),
    ],
)
def test_leaks(text: str, leak: str | None) -> None:
    assert find_leak(text, ["get_weather", "set_timer"]) == leak

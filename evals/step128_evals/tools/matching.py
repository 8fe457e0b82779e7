"""Whether a call's arguments are the right ones, compared after JSON parsing, and which call answers which due one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

OPTIONAL = "$optional"


def matches(expected: Any, actual: Any) -> bool:
    """Whether a JSON value is as expected.

    ``expected`` is a JSON value that must be equal (3 equals 3.0, but neither equals "3" or true), in which an object
    of one key may stand for more than itself: ``{$any_case: text}`` for the text in any case, ``{$contains: text}`` for
    any text that has it, in any case; ``{$one_of: [...]}`` for each of these; ``{$set: [...]}`` for an array of these
    in any order; and, as a property, ``{$optional: value}`` for the value or nothing at all.
    """
    if isinstance(expected, dict):
        if len(expected) == 1:
            name, operand = next(iter(expected.items()))
            if name in _OPERATORS:
                return _OPERATORS[name](operand, actual)
        return isinstance(actual, dict) and _properties_match(expected, actual)
    if isinstance(expected, list):
        same_length = isinstance(actual, list) and len(actual) == len(expected)
        return same_length and all(map(matches, expected, actual))
    if isinstance(expected, bool) or isinstance(actual, bool):
        return expected is actual
    return bool(expected == actual)


def _any_case(operand: str, actual: Any) -> bool:
    return isinstance(actual, str) and actual.casefold() == operand.casefold()


def _contains(operand: str, actual: Any) -> bool:
    return isinstance(actual, str) and operand.casefold() in actual.casefold()


def _one_of(operand: list[Any], actual: Any) -> bool:
    return any(matches(each, actual) for each in operand)


def _set(operand: list[Any], actual: Any) -> bool:
    same_length = isinstance(actual, list) and len(actual) == len(operand)
    return same_length and None not in assign(operand, actual, matches)


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$any_case": _any_case,
    "$contains": _contains,
    "$one_of": _one_of,
    "$set": _set,
    OPTIONAL: matches,
}


def _properties_match(expected: dict[str, Any], actual: dict[str, Any]) -> bool:
    optional = {name for name, value in expected.items() if isinstance(value, dict) and list(value) == [OPTIONAL]}
    names_match = set(expected) - optional <= set(actual) <= set(expected)
    return names_match and all(matches(expected[name], value) for name, value in actual.items())


def assign(expected: Sequence[Any], actual: Sequence[Any], fits: Callable[[Any, Any], bool]) -> list[int | None]:
    """Give each of ``expected`` the position of another of ``actual`` that fits it.

    Returns:
        The positions; None where there is no other, of which there are as few as possible (a maximum matching by
        augmenting paths: Kuhn 1955, Berge 1957).
    """
    owner: dict[int, int] = {}

    def serve(wanted: int, tried: set[int]) -> bool:
        for position, value in enumerate(actual):
            if position in tried or not fits(expected[wanted], value):
                continue
            tried.add(position)
            if position not in owner or serve(owner[position], tried):
                owner[position] = wanted
                return True
        return False

    for wanted in range(len(expected)):
        serve(wanted, set())
    positions = {wanted: position for position, wanted in owner.items()}
    return [positions.get(wanted) for wanted in range(len(expected))]

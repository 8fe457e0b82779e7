"""Checks of the values in a profile's YAML file: each returns what to store, or raises ValueError: what it wants."""

import math
import re
from collections.abc import Callable
from typing import Any

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

Check = Callable[[Any], Any]


def parse_size(value: Any) -> int:
    """Return bytes for a text such as "512MiB", "1.5 GiB" or "300000B".

    Raises:
        ValueError: saying what a size looks like.

    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|B)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size with its unit, such as 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def a_text(value: Any) -> str:
    """Return a text that is not empty, its white space made single spaces."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return " ".join(value.split())


def a_flag(value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def one_of(*choices: str) -> Check:
    """Return the check for one of these texts."""

    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return check


def integer(minimum: int, maximum: int | None = None) -> Check:
    """Return the check for a whole number in these bounds, both included."""

    def check(value: Any) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < minimum
            or (maximum is not None and value > maximum)
        ):
            limit = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"a whole number {limit}")
        return value

    return check


def _is_no_number(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def number(value: Any) -> float:
    """Return a finite number of at least 0."""
    if _is_no_number(value) or not 0 <= value < math.inf:
        raise ValueError("a number that is not negative")
    return float(value)


def positive(value: Any) -> float:
    """Return a finite number above 0."""
    if _is_no_number(value) or not 0 < value < math.inf:
        raise ValueError("a number above 0")
    return float(value)


def fraction(value: Any) -> float:
    """Return a number above 0 and at most 1."""
    if _is_no_number(value) or not 0 < value <= 1:
        raise ValueError("a number above 0 and at most 1")
    return float(value)


def list_of(item: Check, *, may_be_empty: bool = True) -> Check:
    """Return the check for a list, each entry of which passes `item`."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (value or may_be_empty):
            raise ValueError("a list" if may_be_empty else "a list of at least one entry")
        try:
            return tuple(map(item, value))
        except ValueError as error:
            raise ValueError(f"a list, each entry {error}") from error

    return check


def variables(value: Any) -> tuple[tuple[str, str], ...]:
    """Return pairs of environment variable and text."""
    if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        raise ValueError('a mapping of variable to text (a number needs quotes: "1")')
    return tuple(value.items())

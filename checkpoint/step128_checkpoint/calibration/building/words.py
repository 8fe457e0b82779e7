"""Words that generated conversations are made of: names, places, dates, and sentences in several languages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))

GIVEN_NAMES: list[str] = _DATA["given_names"]
FAMILY_NAMES: list[str] = _DATA["family_names"]
CITIES: list[str] = _DATA["cities"]
PRODUCTS: list[str] = _DATA["products"]
TOPICS: list[str] = _DATA["topics"]
LANGUAGES: dict[str, str] = _DATA["languages"]
_SENTENCES: list[dict[str, str]] = _DATA["sentences"]

MONTHS: list[str] = _DATA["months"]
WEEKDAYS: list[str] = _DATA["weekdays"]
COLOURS = (
    ("red", (214, 39, 40)),
    ("blue", (31, 119, 180)),
    ("green", (44, 160, 44)),
    ("orange", (255, 127, 14)),
    ("purple", (148, 103, 189)),
    ("brown", (140, 86, 75)),
    ("pink", (227, 119, 194)),
    ("grey", (127, 127, 127)),
    ("yellow", (230, 200, 30)),
    ("teal", (23, 150, 160)),
)


def person(rng: random.Random) -> str:
    """A full name."""
    return f"{rng.choice(GIVEN_NAMES)} {rng.choice(FAMILY_NAMES)}"


def date(rng: random.Random) -> str:
    """A date in ISO form."""
    return f"20{rng.randrange(18, 30)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


def clock(rng: random.Random) -> str:
    """A time of day on a quarter of an hour."""
    return f"{rng.randrange(7, 21):02}:{rng.choice(('00', '15', '30', '45'))}"


def listed(items: list[str]) -> str:
    """a, b and c."""
    if not items:
        return "none"
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def sentences(rng: random.Random, count: int, *codes: str) -> list[tuple[str, ...]]:
    """``count`` sentences, each in all of the languages asked for, with the same names and numbers."""
    found = []
    for table in rng.sample(_SENTENCES, count):
        values = {
            "city": rng.choice(CITIES),
            "name": rng.choice(GIVEN_NAMES),
            "hour": rng.randrange(8, 22),
            "minute": rng.choice(("05", "15", "20", "30", "40", "55")),
            "small": rng.randrange(5, 10),  # from five on, Russian's plural is the same
            "number": 10 * rng.randrange(1, 40),
        }
        found.append(tuple(table[code].format(**values) for code in codes))
    return found

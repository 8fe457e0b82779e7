"""Whether a text has a word or a figure, however it is written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

_DASHES_AND_QUOTES = str.maketrans({"\u2010": "-", "\u2011": "-", "\u2019": "'"})
_THOUSANDS = re.compile("(?<![\\d.,])[0-9]{1,3}([ ,'\u00a0\u202f\u2009])[0-9]{3}(?:\\1[0-9]{3})*(?![0-9])")
_NUMBER = re.compile(r"(?<!\w)(?<![0-9]\.)[0-9]+(?:\.[0-9]+)*")
"""A letter may follow (26.4C), none may come before (E4471)."""


def has(text: str, part: str) -> bool:
    """Whether the part stands in the text as a word or number of its own: 48 does not in 148, nor in 48.5.

    Case, emphasis, kinds of dashes and apostrophes, and how letters are composed do not count. Numbers are compared as
    numbers: 17.30 is 17.3, and 25,384.00 is 25384.
    """
    plain, wanted = _plain(text), _plain(part)
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", wanted):
        return Decimal(wanted) in _numbers(plain)
    after = "[0-9]" if wanted[-1:].isdigit() else r"\w"
    return re.search(rf"(?<!\w)(?<!\d\.){re.escape(wanted)}(?!{after})(?!\.\d)", plain) is not None


def find_invented(text: str, words: Iterable[str]) -> str | None:
    """The first of the words that the text has, or a number other than 0; None without either."""
    plain = _plain(text)
    found = [word for word in words if has(text, word)]
    found += [str(number) for number in _numbers(plain) if number]
    return found[0] if found else None


def _plain(text: str) -> str:
    text = re.sub(r"[*_`]", "", unicodedata.normalize("NFC", text).casefold()).translate(_DASHES_AND_QUOTES)
    return _THOUSANDS.sub(lambda found: found[0].replace(found[1], ""), text)


def _numbers(plain: str) -> list[Decimal]:
    return [Decimal(number) for number in _NUMBER.findall(plain) if number.count(".") <= 1]

"""Marks of the chat template, and calls written as text, that a parser left in what a user gets to read."""

from __future__ import annotations

import re
from collections.abc import Collection

_MARKS = re.compile(
    r"</?(?:think|tool_calls?|tool_response|function_calls?|invoke|function|parameter)\b[^<>]{0,80}>"
    r"|<function=|<parameter="
    r"|<[|\uff5c][^<>|\uff5c\n]{1,60}[|\uff5c]>"  # <|im_end|>, and DeepSeek's with U+FF5C
    r"|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
)


def find_leak(text: str, functions: Collection[str]) -> str | None:
    """The first mark or written call in a text; None if it is clean.

    Args:
        text: an answer's content.
        functions: names of the functions that were offered.
    """
    if mark := _MARKS.search(text):
        return mark[0]
    names = "|".join(map(re.escape, functions))
    as_json = rf'"(?:name|function)"\s*:\s*"(?:{names})"\s*,\s*"(?:arguments|parameters)"\s*:'
    as_code = rf"\A[\s`\[]*(?:(?:python|json|tool_code)\s+)?(?:{names})\(.*\)"
    for pattern in (as_json, as_code):
        if call := re.search(pattern, text, re.DOTALL):
            return call[0][:80]
    return None

"""`step128 plan --explain ITEM`: what is known of one memory line or setting."""

import re
from collections.abc import Sequence

from step128_launcher.commands.settings import SETTINGS
from step128_launcher.planning.items import MemoryLine
from step128_launcher.planning.plan import Plan
from step128_launcher.sizes import format_bytes

# A setting's name -> the words that the plan's sentences use for it.
_KEYWORDS = {
    "max_model_len": "context",
    "num_speculative_tokens": "MTP depth",
    "kv_cache_dtype": "KV cache in",
    "tensor_parallel_size": "tensor parallel",
    "vision": "text only",
    "attention_backend": "attention backend",
}


def explain_item(plan: Plan, item: str) -> list[tuple[str, list[str]]]:
    """Return title and sentences of every memory line and setting that `item` names, and of the decisions about it.

    A name is matched by its start, or by whole words in it; a sentence by whole words.
    """
    wanted = _words(item)
    found: list[tuple[str, list[str]]] = []
    if not wanted:
        return found
    for memory in filter(None, (plan.memory, plan.host_memory)):
        for line in memory.lines:
            if _starts(line.name, wanted) or _contains(line.name, wanted):
                found.append((f"{line.name} ({memory.where}): {format_bytes(line.total_bytes)}", _about(line)))
    settings = [name for name in SETTINGS if _starts(name, wanted)]
    for name in settings:
        value = getattr(plan, name)
        found.append((f"{name}: {'not set on this device' if value is None else value}", [SETTINGS[name]]))
    subjects = [wanted, *(_words(_KEYWORDS.get(name, name)) for name in settings)]
    notes = [reason for reason in plan.reasons if any(_contains(reason, words) for words in subjects)]
    notes += [
        f"{alternative.wish}: {alternative.reason}."
        for alternative in plan.rejected
        if any(_contains(alternative.wish, words) for words in subjects)
    ]
    if notes:
        found.append(("Decisions", notes))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _starts(name: str, wanted: Sequence[str]) -> bool:
    return "_".join(_words(name)).startswith("_".join(wanted))


def _contains(text: str, wanted: Sequence[str]) -> bool:
    return f" {' '.join(wanted)} " in f" {' '.join(_words(text))} "


def _about(line: MemoryLine) -> list[str]:
    sentences = [f"{line.total_bytes:,} bytes; {line.evidence}: {line.explanation}."]
    return [*sentences, f"Source: {line.source}."] if line.source else sentences

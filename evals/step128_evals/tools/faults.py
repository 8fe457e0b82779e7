"""The kinds of what can be wrong."""

from __future__ import annotations

from dataclasses import dataclass

MALFORMED = ("invalid_json", "schema_violation", "leaked_tags", "bad_ids", "wrong_finish_reason")
"""The form is wrong: a damaged model, or a parser that does not fit it."""

MISTAKEN = ("wrong_function", "wrong_arguments", "missing_call", "extra_call", "unneeded_call")
"""The form is right, and the call is not."""

TEXTUAL = ("result_not_used", "wrong_answer", "empty_answer")
"""The text is wrong where no call is due."""

TRUNCATED = "truncated"
"""``max_tokens`` ended the answer: nothing else is said about it."""

KINDS = (*MALFORMED, *MISTAKEN, *TEXTUAL, TRUNCATED)


@dataclass(frozen=True)
class Fault:
    """``kind`` is one of :data:`KINDS`; ``detail`` is for people."""

    kind: str
    detail: str

    @property
    def malformed(self) -> bool:
        """Whether it is one of form."""
        return self.kind in MALFORMED

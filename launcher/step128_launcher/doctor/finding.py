"""One result of one check."""

from dataclasses import dataclass

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"


@dataclass(frozen=True)
class Finding:
    """What a check saw. FAIL: do not start like this. WARN: it starts, and may be slow, smaller or fail later.

    SKIP: the check could not look, or is about something this machine does not have; `evidence` says which. `remedy`
    is what to do, with the exact command where there is one; mostly empty for PASS and SKIP.
    """

    check: str
    outcome: str
    evidence: str
    remedy: str = ""


def passed(check: str, evidence: str, remedy: str = "") -> Finding:
    """Return a PASS; `remedy` is what would make it better still."""
    return Finding(check, PASS, evidence, remedy)


def warned(check: str, evidence: str, remedy: str) -> Finding:
    """Return a WARN."""
    return Finding(check, WARN, evidence, remedy)


def failed(check: str, evidence: str, remedy: str) -> Finding:
    """Return a FAIL."""
    return Finding(check, FAIL, evidence, remedy)


def skipped(check: str, why: str, remedy: str = "") -> Finding:
    """Return a SKIP."""
    return Finding(check, SKIP, why, remedy)

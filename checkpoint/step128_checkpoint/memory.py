"""How much memory this process uses, and what a person writes for an amount of it."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path

DEFAULT_MAX_MEMORY_BYTES = 8 << 30
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes (Linux: /proc/self/statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_size(text: str) -> int:
    """Bytes from ``8GiB``, ``500MB`` or a plain number; for argparse.

    Raises:
        ArgumentTypeError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size_bytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size_bytes < 1:
        raise ArgumentTypeError(f"{text!r} is no amount of memory; write for instance 8GiB or 500MB")
    return size_bytes

"""What the commands of ``step128-kernels`` ask of their options alike."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from step128_kernels.errors import NoSuchKernelError


def positive(text: str) -> int:
    """Parse a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def check_kernels(wanted: Iterable[str], known: Iterable[str]) -> None:
    """Refuse kernels that do not exist.

    Raises:
        NoSuchKernelError: names the first of them and what there is.
    """
    known = tuple(known)
    for name in wanted:
        if name not in known:
            raise NoSuchKernelError(f"--kernel {name}: no such kernel; there are {', '.join(known)}.")

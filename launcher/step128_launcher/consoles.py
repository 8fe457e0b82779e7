"""Consoles for people that survive the loss of their reader."""

import os

from rich.console import Console


class PatientConsole(Console):
    """Goes silent when its reader is gone (such as `head`), where rich's own would end the process with status 1."""

    def on_broken_pipe(self) -> None:
        """Send what is still to come to nowhere, also what Python flushes at its end."""
        self.quiet = True
        silence(self.file.fileno())


def stdout() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return the console for messages and progress."""
    return _console(stderr=True)


def silence(descriptor: int) -> None:
    """Point an open file at /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _console(stderr: bool) -> Console:
    """Return a console; without a terminal rich would break the table at 80 columns."""
    console = PatientConsole(stderr=stderr)
    return console if console.is_terminal else PatientConsole(stderr=stderr, width=140)

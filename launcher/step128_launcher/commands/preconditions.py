"""Before minutes of loading on a GPU: the doctor's findings, said; and what would surely end the start, refused."""

from collections.abc import Callable, Sequence

from step128_launcher.doctor import FAIL, Finding
from step128_launcher.errors import ExitCode, LauncherError

# Checks whose failure no start survives, and the exit code for it. Others may be false alarms: they are only said.
_FATAL = {"device-nodes": ExitCode.PERMISSION}


def check_machine(findings: Sequence[Finding], say: Callable[[str], None]) -> None:
    """Say every finding that failed.

    Raises:
        LauncherError: 5, if the GPUs' device nodes are not there or may not be opened.

    """
    failed = [finding for finding in findings if finding.outcome == FAIL]
    for finding in failed:
        if finding.check in _FATAL:
            raise LauncherError(_FATAL[finding.check], f"{finding.check}: {finding.evidence}.", finding.remedy)
    for finding in failed:
        say(f"doctor: FAIL {finding.check}: {finding.evidence}. {finding.remedy}")

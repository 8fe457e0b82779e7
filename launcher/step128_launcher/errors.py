"""The launcher's exit codes, and the one exception that carries a message for a person."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the launcher's exit status means; scripts may rely on it."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    DOES_NOT_FIT = 3
    UNSUPPORTED_HARDWARE = 4
    PERMISSION = 5
    BAD_CHECKPOINT = 65
    INPUT_NOT_FOUND = 66
    SERVER_FAILED = 69
    VERIFICATION_FAILED = 70
    CANNOT_WRITE = 73
    PORT_IN_USE = 75
    BAD_CONFIGURATION = 78


INTERRUPTED = 130  # 128 + SIGINT, as a shell says it

EXIT_CODE_HELP = """exit codes:
  0 ok                        1 doctor: a check failed      2 usage
  3 does not fit in memory    4 unsupported hardware        5 permission
 65 bad checkpoint           66 input not found            69 server failed to start, or died; Docker unusable
 70 started, but what was planned did not take effect      73 cannot write the output
 75 port, or state folder, in use                          78 bad configuration
  1 also stands for an unexpected internal error          130 interrupted"""


class LauncherError(Exception):
    """An error to show as it is, without a traceback.

    Args:
        exit_code: the status the process ends with.
        message: what was found and what was needed.
        hint: what to do next; empty if the message says it.
        public: the message without quoted log lines, which may hold a request's text, for /health, which anyone may
            read; empty if the message quotes none.

    """

    def __init__(self, exit_code: ExitCode, message: str, hint: str = "", public: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message
        self.hint = hint
        self.public = public or message


class CheckpointError(LauncherError):
    """A checkpoint that cannot be served; the message names the file and, where there is one, the tensor."""

    def __init__(self, message: str, hint: str = "", public: str = "") -> None:
        super().__init__(ExitCode.BAD_CHECKPOINT, message, hint, public)

"""Reading vLLM's log: which phase of the start it is in, and why it died."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from step128_launcher.supervisor.log_cap import old_part

# Log text of vLLM 0.32 -> what it means to someone waiting.
_PHASES = (
    ("Application startup complete", "answering"),
    ("Starting vLLM server", "opening the port"),
    ("KV cache size", "KV cache allocated"),
    ("Available KV cache memory", "allocating the KV cache"),
    ("Explicitly set (", "allocating the KV cache"),
    ("Capturing CUDA graphs", "capturing graphs"),
    ("torch.compile took", "compiled"),
    ("Model loading took", "weights loaded"),
    ("Loading drafter model", "loading the MTP draft"),
    ("Loading weights took", "weights loaded"),
    ("Loading safetensors", "loading weights"),
    ("Starting to load model", "loading weights"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("vLLM API server version", "starting the API server"),
)

# "(EngineCore pid=12) ERROR 11-23 16:30:00 [core.py:42] text" -> text
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:(?:ERROR|WARNING|INFO)\s+\d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s*)?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b(?::|$)")
_STEP128 = re.compile(r"(?:^|[\s:])step128: (.+)$")
ANSI = re.compile(r"\x1b\[[0-9;]*m")

# What vLLM's outer processes say when an inner one died; the cause stands further up.
_CONSEQUENCES = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineDeadError",
    "Executor failed",
)
_DEAD_WORKER = "died unexpectedly"
# Text of a known cause -> what to do about it.
_REMEDIES = (
    ("operator torchvision::nms does not exist", "Repair the environment: python -m step128_kernels.cpu_environment"),
    ("libc10_cuda.so: cannot open", "Repair the environment: python -m step128_kernels.cpu_environment"),
)
_TAIL_BYTES = 2_000_000
# A log shorter than this may have been cut a moment ago (log_cap.py): what matters then ends its old part.
_SHORT_BYTES = 64 * 1024
# Where a server that had been serving tells why it died; before that stands what its requests were refused for.
RECENT_LINES = 200
_WIDER = 10


def phase_of(line: str) -> str | None:
    """Return the phase a log line announces, or None."""
    return next((phase for text, phase in _PHASES if text in line), None)


def read_tail(path: Path) -> list[str]:
    """Return the log's last lines without colours and vLLM's prefixes; empty if there is no log."""
    data = _last_bytes(path, _TAIL_BYTES)
    if data is None:
        return []
    if len(data) < _SHORT_BYTES:  # the old part moves on with its log at each start, so it is this start's
        data = (_last_bytes(old_part(path), _TAIL_BYTES - len(data)) or b"") + data
    text = data.decode("utf-8", errors="replace")
    return [_PREFIX.sub("", ANSI.sub("", line)).rstrip() for line in text.splitlines()]


def _last_bytes(path: Path, number: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - number))
            return file.read()
    except OSError:
        return None


def plugin_error(lines: list[str]) -> str | None:
    """Return what our plugin complained about (`step128: …`), or None."""
    for line in lines:
        match = _STEP128.search(line)
        if match and (_EXCEPTION.match(line) or line.startswith("step128: ")):
            return match[1]
    return None


def cause(lines: list[str], recent_lines: int | None = None) -> list[str]:
    """Return the lines that say why vLLM died: the last exception that is no mere consequence, else the last lines.

    For a server that had been ready only its last `recent_lines` (RECENT_LINES) count: an older exception is a request
    that was refused. Where they hold nothing but consequences, one for each request that was running, the cause is
    looked for in ten times as many.
    """
    if recent_lines is not None:
        recent = lines[-recent_lines:]
        only_consequences = _reasons(recent) and not _roots(recent)
        lines = lines[-recent_lines * _WIDER :] if only_consequences else recent
    reasons, roots = _reasons(lines), _roots(lines)
    if not reasons:
        return [line for line in lines if line][-5:]
    start = (roots or reasons)[-1]
    # Some exceptions say what is wrong on the indented lines after their name.
    details = itertools.takewhile(lambda line: line.startswith("  "), lines[start + 1 : start + 4])
    return [lines[start], *(line.strip() for line in details)]


def _reasons(lines: list[str]) -> list[int]:
    return [index for index, line in enumerate(lines) if _EXCEPTION.match(line) or _DEAD_WORKER in line]


def _roots(lines: list[str]) -> list[int]:
    return [index for index in _reasons(lines) if not any(text in lines[index] for text in _CONSEQUENCES)]


def remedy(lines: list[str]) -> str | None:
    """Return what to do about a known cause found in the log, or None."""
    return next((action for text, action in _REMEDIES if any(text in line for line in lines)), None)


class LogFollower:
    """Yields the lines appended to a file since the last call; progress bars end theirs with a carriage return."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._pending = ""

    def new_lines(self) -> Sequence[str]:
        """Return the complete lines added; a line still being written stays for the next call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        self._offset += complete
        self._pending = data[complete:].decode("utf-8", errors="replace")
        return [line for line in data[:complete].decode("utf-8", errors="replace").splitlines() if line]

    @property
    def pending(self) -> str:
        """The line still being written: a progress bar's last state, which gets its end only with the next one."""
        return self._pending

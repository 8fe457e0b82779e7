"""The signals that ask the launcher to end."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_ASK_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class StopSignals:
    """While entered, counts SIGTERM, SIGINT, SIGQUIT, and SIGHUP where that is not ignored (nohup).

    It is entered from the main thread, which alone may handle signals, once for the whole run: between two of them a
    signal would be lost to a container's process 1, whose default action is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.count > 0

    def __enter__(self) -> Self:
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in _ASK_TO_END if not (nohup and number is signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._on_signal) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

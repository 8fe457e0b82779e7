"""The pace of loading in words: bytes, rate and time left, and when a plain line about it is due."""

from step128_launcher.sizes import format_bytes
from step128_launcher.supervisor.loading import Loaded

_LINE_STEP, _LINE_SECONDS = 0.10, 30.0
# A rate over less says nothing: the first shard may have come from the page cache.
_SHORTEST_SECONDS = 1.0


class LoadPace:
    """Knows when each part (weights, MTP draft) began, and what was said of it last; times in seconds of one clock."""

    def __init__(self) -> None:
        self._what = ""
        self._began = 0.0
        self._began_bytes = 0
        self._said_at = 0.0
        self._said_fraction = 0.0

    def words(self, loaded: Loaded, now: float) -> str:
        """Return, for example, "12.0 of 120.0 GiB, 1.5 GiB/s, 1:12 left, shard 3 of 30"."""
        self._follow(loaded, now)
        parts = [f"{format_bytes(loaded.done_bytes)} of {format_bytes(loaded.total_bytes)}"]
        seconds, read = now - self._began, loaded.done_bytes - self._began_bytes
        if seconds >= _SHORTEST_SECONDS and read > 0:
            rate = read / seconds
            left = round((loaded.total_bytes - loaded.done_bytes) / rate)
            parts += [f"{format_bytes(int(rate))}/s", f"{left // 60}:{left % 60:02d} left"]
        shard = min(loaded.shards_done + 1, loaded.shards)
        return ", ".join([*parts, f"shard {shard} of {loaded.shards}"])

    def line_due(self, loaded: Loaded, now: float) -> bool:
        """Return whether a line should be printed where nothing moves: each tenth, and each half minute."""
        self._follow(loaded, now)
        tenth = int(loaded.fraction / _LINE_STEP + 1e-9) > int(self._said_fraction / _LINE_STEP + 1e-9)
        if not tenth and now - self._said_at < _LINE_SECONDS:
            return False
        self._said_at, self._said_fraction = now, loaded.fraction
        return True

    def _follow(self, loaded: Loaded, now: float) -> None:
        if loaded.what != self._what:
            self._what, self._began, self._began_bytes = loaded.what, now, loaded.done_bytes
            self._said_at, self._said_fraction = now, 0.0

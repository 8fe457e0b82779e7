"""How much of the checkpoint vLLM has read, from its log and from the kernel.

vLLM counts shards in its log ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [...]"), and a shard may
take a minute. In between: its processes map a shard into memory and touch it as they copy the weights out, so what is
resident of that mapping (Rss in /proc/PID/smaps) is what they have read. Measured with safetensors 0.8 and a file in
and out of the page cache, exact both times; of /proc/PID/io, rchar does not count mapped reads at all, and read_bytes
only those that were not in the page cache.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.supervisor.procfs import mapped_bytes

_SHARDS = re.compile(r"Loading safetensors checkpoint shards[^:]*:\s*\d+% Completed \| (\d+)/(\d+)")
_DRAFT = "Loading drafter model"
_SUFFIX = ".safetensors"
_NATURAL = re.compile(r"(\d+)")
# Reading smaps takes about 10 ms a process, more with many mappings; this share of the time at most is spent on it.
_LOOK_SECONDS, _LARGEST_SHARE = 1.0, 0.05


@dataclass(frozen=True)
class Loaded:
    """Where the loading of one model is: of the target, then of the MTP draft, which reads the shards again."""

    what: str
    shards_done: int
    shards: int
    done_bytes: int
    total_bytes: int

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0


def shard_sizes(folder: Path) -> tuple[int, ...]:
    """Return the sizes of a checkpoint's shards in bytes, in vLLM's order (numbers in names by their value)."""
    try:
        files = sorted(folder.glob("*" + _SUFFIX), key=lambda path: _natural(path.name))
        return tuple(file.stat().st_size for file in files)
    except OSError:  # moved away or not readable: vLLM itself will say so, and only the bar lacks it
        return ()


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NATURAL.split(name)]


class LoadMeter:
    """Follows one start. `pids` returns the processes that may load, `sizes` are the shards' (shard_sizes)."""

    def __init__(
        self,
        pids: Callable[[], Sequence[int]],
        sizes: Sequence[int],
        *,
        mapped: Callable[[int, str], int] = mapped_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pids, self._sizes, self._mapped, self._clock = pids, sizes, mapped, clock
        self._what = "weights"
        self._shards: tuple[int, int] | None = None
        self._within = 0
        self._next_look = 0.0

    def read(self, line: str) -> bool:
        """Take a line of the log into account; return whether it tells how many shards are loaded."""
        if _DRAFT in line:
            self._what, self._shards, self._within = "MTP draft", None, 0
        match = _SHARDS.search(line)
        if match:
            shards = int(match[1]), int(match[2])
            if shards != self._shards:
                self._shards, self._within = shards, 0
        return match is not None

    def loaded(self) -> Loaded | None:
        """Return where loading is; None before it has begun, and after it has ended."""
        if self._shards is None:
            return None
        done, shards = self._shards
        if done >= shards:
            self._shards = None
            return self._position(done, shards, 0)
        self._look()
        return self._position(done, shards, self._within)

    def _look(self) -> None:
        """Let the most advanced rank tell how far the current shard is; it never goes back."""
        started = self._clock()
        if started < self._next_look:
            return
        touched = max((self._mapped(pid, _SUFFIX) for pid in self._pids()), default=0)
        self._within = max(self._within, touched)
        spent = self._clock() - started
        self._next_look = started + max(_LOOK_SECONDS, spent / _LARGEST_SHARE)

    def _position(self, done: int, shards: int, within: int) -> Loaded:
        # The draft reads only the shards that hold a part of it, and the log does not say which: shards of average size
        # then, as it is for a folder whose shards are not those that vLLM loads.
        known = shards == len(self._sizes)
        average = sum(self._sizes) // len(self._sizes) if self._sizes else 0
        sizes = self._sizes if known else (average,) * shards
        current = min(within, sizes[done]) if done < shards else 0
        return Loaded(self._what, done, shards, sum(sizes[:done]) + current, sum(sizes))

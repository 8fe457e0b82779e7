"""How much of the checkpoint was read, from the log's shards and what is mapped in between."""

import io
import mmap
import os
import re
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from step128_launcher.errors import ExitCode
from step128_launcher.supervisor.load_pace import LoadPace
from step128_launcher.supervisor.loading import Loaded, LoadMeter, shard_sizes
from step128_launcher.supervisor.procfs import mapped_bytes
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.vllm_log import LogFollower

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py
GIB = 2**30
# As vLLM 0.32 writes them (model_executor/model_loader/weight_utils.py: _BAR_FORMAT).
SHARD = "Loading safetensors checkpoint shards: {0:3}% Completed | {1}/{2} [00:10<00:10,  2.00s/it]"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def meter(mapped: dict[int, int], clock: Clock, sizes: tuple[int, ...] = (4 * GIB, 4 * GIB)) -> LoadMeter:
    return LoadMeter(lambda: list(mapped), sizes, mapped=lambda pid, suffix: mapped[pid], clock=clock)


def test_shards_and_what_is_mapped_of_the_next() -> None:
    mapped, clock = {1: 0, 2: 0}, Clock()
    load = meter(mapped, clock)
    load.read("INFO Starting to load model")
    assert load.loaded() is None
    load.read(SHARD.format(0, 0, 2))
    assert load.loaded() == Loaded("weights", 0, 2, 0, 8 * GIB)
    clock.now += 2
    mapped |= {1: GIB, 2: 2 * GIB}
    assert load.loaded() == Loaded("weights", 0, 2, 2 * GIB, 8 * GIB)  # the most advanced rank
    clock.now += 2
    mapped |= {2: 0}
    assert load.loaded() == Loaded("weights", 0, 2, 2 * GIB, 8 * GIB)  # never back
    load.read(SHARD.format(50, 1, 2))
    mapped |= {1: 0}
    assert load.loaded() == Loaded("weights", 1, 2, 4 * GIB, 8 * GIB)
    clock.now += 2
    mapped |= {1: 9 * GIB}  # more than the shard: other mappings are there as well
    assert load.loaded() == Loaded("weights", 1, 2, 8 * GIB, 8 * GIB)
    load.read(SHARD.format(100, 2, 2))
    assert load.loaded() == Loaded("weights", 2, 2, 8 * GIB, 8 * GIB)
    assert load.loaded() is None  # said once


def test_the_draft_reads_some_shards_again() -> None:
    load = meter({}, Clock(), sizes=(2 * GIB, 4 * GIB, 6 * GIB))
    load.read("(Worker pid=8) INFO [r.py:75] Loading drafter model...")
    load.read(SHARD.format(0, 0, 2))
    assert load.loaded() == Loaded("MTP draft", 0, 2, 0, 8 * GIB)  # which two is not said: of average size


def test_smaps_is_not_read_all_the_time() -> None:
    clock, looks = Clock(), []

    def slow(pid: int, suffix: str) -> int:
        looks.append(clock.now)
        clock.now += 1.0  # a process with very many mappings
        return 0

    load = LoadMeter(lambda: [1], (GIB,), mapped=slow, clock=clock)
    load.read(SHARD.format(0, 0, 1))
    for _ in range(100):
        clock.now += 0.5
        load.loaded()
    assert len(looks) <= 4


def test_what_is_mapped_and_touched_is_measured(tmp_path: Path) -> None:
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.write_bytes(bytes(8 * 2**20))
    (tmp_path / "other.bin").write_bytes(bytes(2**20))
    other = tmp_path / "other.bin"
    with shard.open("rb") as file, other.open("rb") as other_file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        ignored = mmap.mmap(other_file.fileno(), 0, prot=mmap.PROT_READ)
    assert mapped_bytes(os.getpid(), ".safetensors") == 0
    assert not any(view[: 4 * 2**20]) and not any(ignored[:])
    touched = mapped_bytes(os.getpid(), ".safetensors")
    view.close()
    assert 4 * 2**20 <= touched <= 5 * 2**20  # the kernel maps a few pages around
    assert mapped_bytes(os.getpid(), ".safetensors") == 0
    assert mapped_bytes(2**22 + 1, ".safetensors") == 0  # no such process


def test_shards_come_in_vllm_s_order(tmp_path: Path) -> None:
    for name, size in (("model-10.safetensors", 3), ("model-9.safetensors", 2), ("model-1.safetensors", 1)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "config.json").write_text("{}")
    assert shard_sizes(tmp_path) == (1, 2, 3)


def test_words_with_rate_and_time_left() -> None:
    pace = LoadPace()
    start = Loaded("weights", 0, 30, 0, 120 * GIB)
    assert pace.words(start, 0.0) == "0 B of 120.00 GiB, shard 1 of 30"
    later = Loaded("weights", 3, 30, 12 * GIB, 120 * GIB)
    assert pace.words(later, 8.0) == "12.00 GiB of 120.00 GiB, 1.50 GiB/s, 1:12 left, shard 4 of 30"


def test_a_line_each_tenth_and_each_half_minute() -> None:
    pace = LoadPace()

    def due(percent: float, now: float) -> bool:
        return pace.line_due(Loaded("weights", 0, 10, int(percent * GIB), 100 * GIB), now)

    assert not due(0, 0) and not due(9, 1)
    assert due(10, 2) and not due(19, 3)
    assert not due(19, 31) and due(19, 32)  # half a minute after the last
    assert due(55, 33) and not due(59, 34)


def test_a_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    progress = Progress(console)
    progress.loading(Loaded("weights", 1, 2, 6 * GIB, 8 * GIB))
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "loading weights" in text and "━━━━" in text and "75%" in text and "6.00 GiB of 8.00 GiB" in text


def test_lines_that_end_with_a_carriage_return(tmp_path: Path) -> None:
    log = tmp_path / "log"
    follower = LogFollower(log)
    log.write_bytes(b"one\n\rLoading:  50% | 1/2")
    assert follower.new_lines() == ["one"] and follower.pending == "Loading:  50% | 1/2"
    log.write_bytes(b"one\n\rLoading:  50% | 1/2\rLoading: 100% | 2/2\ntwo\n")
    assert follower.new_lines() == ["Loading:  50% | 1/2", "Loading: 100% | 2/2", "two"] and follower.pending == ""


def test_a_slow_load_is_shown_and_compared_with_the_plan(bench: Bench) -> None:
    assert bench.run("slow", signals=(signal.SIGTERM,)) is ExitCode.OK
    text = bench.text()
    assert re.search(r"loading weights: +\d+%, .* of .*, shard 2 of 2", text)
    assert "loading weights: 100%" in text
    assert re.search(r"^weights +.* 1\.50 GiB +\+", text, re.MULTILINE)  # what vLLM says against the plan

"""A server that lives but does not answer: busy or idle is told, and in the end it is started again."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode
from step128_launcher.supervisor.hang import Activity, ActivityWatch, tokens_done
from step128_launcher.supervisor.job import Patience
from step128_launcher.supervisor.status import State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step128_launcher.supervisor.health.PROBE_SECONDS", 0.1)
    monkeypatch.setattr("step128_launcher.supervisor.hang._SAMPLE_SECONDS", 0.2)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("mode", "activity"), [("sick", Activity.IDLE), ("sick_busy", Activity.BUSY)])
def test_a_hung_server_is_diagnosed_and_restarted(mode: str, activity: Activity, bench: Bench) -> None:
    bench.patience = Patience(max_restarts=1, first_pause_seconds=0.05, hang_seconds=1.0)
    assert bench.run(mode, "ok", signals=(signal.SIGTERM,), starts=2) is ExitCode.OK
    assert bench.status.snapshot().restarts == {"hung": 1}
    text = bench.text()
    assert f"It is {activity.meaning}" in text and "did not answer and did no work for 1 s" in text
    evidence = next(iter(bench.job.state_dir.glob("hang-*.txt")))
    assert evidence.stat().st_mode & 0o077 == 0
    content = evidence.read_text()
    assert content.startswith(activity.meaning) and "Threads:" in content and " wchan\n" in content
    bench.assert_nothing_left()


@pytest.mark.usefixtures("quick")
def test_a_server_that_still_generates_is_never_taken_for_hung(bench: Bench) -> None:
    bench.patience = Patience(max_restarts=1, hang_seconds=0.6)
    seen: list[int] = []

    def watch() -> bool:
        failed = bench.status.snapshot().failed_probes
        seen.append(failed)
        return failed > 12  # well over the time after which it would have been ended

    bench.when(watch, signal.SIGTERM)
    assert bench.run("sick_working") is ExitCode.OK
    assert max(seen) > 12 and bench.starts() == 1 and not bench.status.snapshot().restarts


@pytest.mark.usefixtures("quick")
def test_the_metric_s_state_goes_when_health_comes_back(bench: Bench) -> None:
    bench.status.enter(State.READY)
    bench.status.probed(False)
    bench.status.hangs(Activity.BUSY)
    assert bench.status.snapshot().hung is Activity.BUSY
    bench.status.probed(True)
    assert bench.status.snapshot().hung is None


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[dict[str, str], int], Path]:
    """A made tree: gpu_busy_percent of each GPU, and the CPU ticks of process 7."""

    def make(percents: dict[str, str], ticks: int) -> Path:
        for address, percent in percents.items():
            folder = tmp_path / "sys/bus/pci/devices" / address
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "gpu_busy_percent").write_text(percent)
        (tmp_path / "proc/7").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/7/stat").write_text(f"7 (VLLM: x) y) S 1 7 7 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1 0 5\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("percents", "ticks", "activity"),
    [
        ({"0000:03:00.0": "0\n", "0000:83:00.0": "100\n"}, 0, Activity.BUSY),  # one rank waits for the others
        ({"0000:03:00.0": "0\n", "0000:83:00.0": "3\n"}, 1000, Activity.IDLE),  # GPUs decide, not the CPU
        ({}, 1000, Activity.BUSY),  # ten seconds of CPU time in ten
        ({}, 20, Activity.IDLE),
        ({"0000:03:00.0": "not known\n"}, 20, Activity.IDLE),  # a driver that does not tell: as without
    ],
)
def test_busy_or_idle(
    percents: dict[str, str], ticks: int, activity: Activity, machine: Callable[[dict[str, str], int], Path]
) -> None:
    root = machine(percents, 0)
    addresses = ("0000:03:00.0", "0000:83:00.0") if percents else ()
    watch = ActivityWatch(lambda: [7], addresses, root, now=100.0)
    machine(percents, ticks)
    for second in range(1, 11):
        watch.sample(100.0 + second)
    assert watch.sight().activity is activity
    gpus = "GPUs" if len(percents) > 1 else "GPU load unknown"
    assert gpus in str(watch.sight()) and f"{ticks / 1000:.1f} CPU cores" in str(watch.sight())


def test_a_process_that_ended_is_no_error(machine: Callable[[dict[str, str], int], Path], tmp_path: Path) -> None:
    watch = ActivityWatch(lambda: [7, 8], (), machine({}, 0), now=0.0)
    watch.sample(5.0)
    watch.write_evidence(tmp_path / "hang.txt")
    assert "8 status\nnot readable: No such file" in (tmp_path / "hang.txt").read_text()


def test_tokens_are_summed_over_engines() -> None:
    text = (
        "# TYPE vllm:prompt_tokens counter\n"
        'vllm:prompt_tokens_total{engine="0"} 10.0\nvllm:prompt_tokens_total{engine="1"} 5.0\n'
        'vllm:prompt_tokens_cached_total{engine="0"} 99.0\nvllm:generation_tokens_total{engine="0"} 2.0\n'
    )
    assert tokens_done(text) == 17.0 and tokens_done("") == 0.0


def test_a_start_that_hangs_is_diagnosed_and_not_repeated(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step128_launcher.supervisor.hang_guard._GLANCE_SECONDS", 0.2)
    bench.patience = replace(bench.patience, max_restarts=3)
    error = bench.fail("never", start_timeout_seconds=0.3)
    assert error.exit_code == ExitCode.SERVER_FAILED and bench.starts() == 1
    assert "not ready within 0 seconds; it is idle" in error.message
    evidence = next(iter(bench.job.state_dir.glob("hang-*.txt")))
    assert str(evidence) in error.hint and "Threads:" in evidence.read_text()

"""`step128 plan --explain`: every line and setting, what a name matches, and what is unknown."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from step128_launcher import cli
from step128_launcher.commands.settings import SETTINGS
from step128_launcher.errors import ExitCode

MACHINES = Path(__file__).parents[1] / "machines"
REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `step128 plan` on a recorded machine; exit status, output, errors."""
    monkeypatch.delenv("STEP128_PROFILE", raising=False)
    monkeypatch.setenv("STEP128_PROFILES_DIR", str(tmp_path))

    def plan(*arguments: str, machine: str = "quad-r9700") -> tuple[int, str, str]:
        code = cli.main(["plan", "--machine", str(MACHINES / machine), "--policy", "all-linears", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return plan


@pytest.mark.parametrize("machine", ["quad-r9700", "strix-halo-128-gtt120"])
def test_every_line_and_setting_is_explained(machine: str, run: Run) -> None:
    narrow = (str(REAL_MODEL), "--max-num-seqs", "8", "--max-num-batched-tokens", "2048", "--kv-cache-dtype", "fp8")
    document = json.loads(run(*narrow, "--json", machine=machine)[1])
    for pool in ("memory", "host_memory"):
        for line in document[pool]["lines"]:
            code, out, _ = run(*narrow, "--explain", line["name"], machine=machine)
            assert code == 0 and f"{line['bytes']:,} bytes; {line['evidence']}: " in out, line["name"]
    for name, value in document["settings"].items():
        code, out, _ = run(*narrow, "--explain", name.replace("_", "-"), machine=machine)
        assert code == 0 and f"{name}: {value}\n  {SETTINGS[name]}\n" in out
    assert "MTP depth 3: the deepest within 10%" in run(str(REAL_MODEL), "--explain", "num_speculative_tokens")[1]


def test_an_item_is_named_by_its_start_or_by_whole_words(run: Run) -> None:
    def titles(item: str) -> list[str]:
        out = run(str(REAL_MODEL), "--explain", item)[1]
        return [line.partition(":")[0].partition(" (")[0] for line in out.splitlines() if line[:1] not in ("", " ")]

    assert set(titles("e")) <= {"engine core process", "enable_expert_parallel", "enforce_eager"}
    assert titles("gpu_memory_utilization") == ["gpu_memory_utilization"]
    assert titles("max-num")[:2] == ["max_num_seqs", "max_num_batched_tokens"]
    assert titles("scratch") == ["attention scratch"]


@pytest.mark.parametrize("item", ["flux capacitor", "_", "__class__", "memory"])
def test_an_unknown_item_is_a_usage_error(item: str, run: Run) -> None:
    code, out, err = run(str(REAL_MODEL), "--explain", item)
    assert code == ExitCode.USAGE and out == "" and "Memory items: " in err and "max_model_len" in err


def test_a_setting_that_a_device_has_not_is_explained(run: Run) -> None:
    for name in ("attention_backend", "gpu_memory_utilization"):
        code, out, _ = run(str(REAL_MODEL), "--explain", name, "--profile", "cpu", "--memory", "119GiB")
        assert code == 0 and f"{name}: not set on this device" in out

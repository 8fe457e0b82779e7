"""The command line: what it prints, what it refuses, and with which exit code."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher import cli
from step128_launcher.commands import planned as planning
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.supervisor import exporter
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.lock import hold_lock
from step128_launcher.supervisor.status import ServerStatus

MakeCheckpoint = Callable[..., Path]
REFUSED = [
    [],
    ["plan"],
    ["plan", "m", "--memory", "4"],
    ["serve", "m", "--port", "0"],
    ["plan", "m", "--memory", "0B"],
    ["plan", "m", "--memory", "0.0GiB"],
    ["plan", "m", "--host", ""],
    ["serve", "m", "--host", "[]"],
    ["serve", "m", "--port", "9000", "--metrics-port", "9000"],
    ["serve", "m", "--port", "9128"],
    ["plan", "m", "--json", "--dry-run"],
    ["plan", "m", "--json", "--explain", "weights"],
    ["plan", "m", "--dry-run", "--explain", "weights"],
]
MEMORY = ("--profile", "cpu", "--memory", "6GiB")


@pytest.fixture(autouse=True)
def sixteen_gib(monkeypatch: pytest.MonkeyPatch, make_machine: Callable[..., Hardware]) -> None:
    """These tests must not depend on the machine that runs them."""
    monkeypatch.setattr(planning, "probe", make_machine)
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, "/nonexistent")
    for name in ("STEP128_API_KEY", "VLLM_API_KEY", "STEP128_PROFILE", "STEP128_PROFILES_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_plan_json(make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint()
    assert cli.main(["plan", str(model), *MEMORY, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["result"]) == (2, "fits")
    assert document["settings"]["num_speculative_tokens"] == 3
    assert document["argv"][document["argv"].index("--model") + 1] == str(model)
    assert sum(line["bytes"] for line in document["memory"]["lines"]) == document["memory"]["total_bytes"]
    assert {line["evidence"] for line in document["memory"]["lines"]} == {"computed", "vLLM's code", "assumed"}


def test_plan_that_does_not_fit(make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(make_checkpoint()), "--profile", "cpu", "--memory", "1GiB"]
    assert cli.main(arguments) == ExitCode.DOES_NOT_FIT
    output = capsys.readouterr()
    assert output.out == "" and "KV cache" in output.err
    assert "\nRESULT   does not fit: a context of 256 tokens: needs" in output.err
    assert "\nTRY      raise --memory\n" in output.err and "error: " not in output.err
    assert cli.main([*arguments, "--json"]) == ExitCode.DOES_NOT_FIT
    assert json.loads(capsys.readouterr().out)["result"] == "does not fit"


def test_plan_for_people(make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(make_checkpoint()), *MEMORY]) == 0
    text = capsys.readouterr().out
    for part in ("weights: routed_experts", "KV cache", "RESULT   fits: context 4096, MTP 3, KV fp8", "budget"):
        assert part in text


def test_dry_run_shows_the_command_without_the_key(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEP128_API_KEY", "very-secret")
    state = tmp_path / "state"
    arguments = ["serve", str(make_checkpoint()), *MEMORY, "--state-dir", str(state), "--dry-run"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "vllm.entrypoints.openai.api_server" in output and 'VLLM_API_KEY="$STEP128_API_KEY"' in output
    assert "very-secret" not in output and not state.exists()
    monkeypatch.delenv("STEP128_API_KEY")
    assert cli.main(arguments) == 0
    assert f'VLLM_API_KEY="$(cat {state}/api_key)"' in capsys.readouterr().out and not state.exists()


def test_dry_run_checks_the_key(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    arguments = ["serve", str(make_checkpoint()), *MEMORY, "--dry-run"]
    assert cli.main([*arguments, "--api-key-file", str(tmp_path / "empty")]) == ExitCode.BAD_CONFIGURATION
    assert cli.main([*arguments, "--api-key-file", str(tmp_path / "none")]) == ExitCode.INPUT_NOT_FOUND
    monkeypatch.setenv("VLLM_API_KEY", "clé")
    assert cli.main(arguments) == ExitCode.BAD_CONFIGURATION


def test_what_dry_run_prints_is_understood_by_a_shell(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "a folder's name"
    state.mkdir()
    (state / "api_key").write_text("the-key\n")
    assert cli.main(["serve", str(make_checkpoint()), *MEMORY, "--state-dir", str(state), "--dry-run"]) == 0
    command = capsys.readouterr().out.partition(f" {sys.executable} ")[0]
    seen = subprocess.run(["sh", "-c", f"{command} env"], capture_output=True, text=True, check=True).stdout
    assert "VLLM_API_KEY=the-key\n" in seen and f"STEP128_LOAD_REPORT_DIR={state}/load-reports\n" in seen


def test_more_memory_than_the_machine_has(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(make_checkpoint()), "--profile", "cpu", "--memory", "500GiB", "--state-dir", str(tmp_path / "s")]
    sentence = "--memory 500.00 GiB is above the 16.00 GiB available (host memory)."
    for command in ("plan", "serve"):
        assert cli.main([command, *arguments]) == ExitCode.DOES_NOT_FIT
        error = capsys.readouterr().err
        assert f"RESULT   does not fit: {sentence}\nTRY      lower --memory" in error and "profile cpu" in error
    assert not (tmp_path / "s").exists()
    assert cli.main(["plan", *arguments, "--json"]) == ExitCode.DOES_NOT_FIT
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == sentence and document["memory"] is None and document["profile"] == "cpu"


def test_variables_of_the_user_are_left_alone(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(make_checkpoint()), *MEMORY]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert cli.main([*arguments, "--json"]) == 0
    assert "VLLM_CPU_OMP_THREADS_BIND" not in json.loads(capsys.readouterr().out)["environment"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "VLLM_CPU_OMP_THREADS_BIND" not in capsys.readouterr().out
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "VLLM_CPU_OMP_THREADS_BIND" in capsys.readouterr().out


def test_errors_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tmp_path / "none"), "--profile", "cpu", "--json"]) == ExitCode.INPUT_NOT_FOUND
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert document["exit_code"] == 66 and "does not exist" in document["error"] and document["hint"]
    assert "error: " in output.err


@pytest.mark.parametrize("arguments", [["plan", "/nowhere", "--profile", "cpu", "--json"], ["profiles"]])
def test_a_reader_that_went_away_is_no_traceback(arguments: list[str]) -> None:
    wanted = ExitCode.INPUT_NOT_FOUND if arguments[0] == "plan" else ExitCode.OK
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "step128_launcher.cli", *arguments]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode == wanted and "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_neither_does_a_reader_of_a_table(make_checkpoint: MakeCheckpoint) -> None:
    model = str(make_checkpoint())
    for stream, wanted in (("stdout", 0), ("stderr", 66)):
        reading, writing = os.pipe()
        os.close(reading)
        arguments = ["plan", model if stream == "stdout" else "/nowhere", "--profile", "cpu"]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writing}
        command = [sys.executable, "-m", "step128_launcher.cli", *arguments]
        result = subprocess.run(command, text=True, **streams)
        os.close(writing)
        assert result.returncode == wanted and "Traceback" not in (result.stderr or "")


def test_a_second_launcher_is_refused_by_the_folder(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", str(make_checkpoint()), *MEMORY, "--state-dir", str(tmp_path)]
    with hold_lock(tmp_path):
        assert cli.main(arguments) == ExitCode.PORT_IN_USE
    error = capsys.readouterr().err
    assert f"process {os.getpid()}" in error and str(tmp_path) in error
    assert not (tmp_path / "api_key").exists()
    with hold_lock(tmp_path):
        pass  # free again


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, ExitCode.PERMISSION), (errno.EADDRINUSE, ExitCode.PORT_IN_USE)]
)
def test_metrics_port_that_cannot_be_opened(number: int, code: ExitCode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(exporter, "make_server", refuse)
    with pytest.raises(LauncherError) as caught:
        Exporter(ServerStatus(), "127.0.0.1", 80)
    assert caught.value.exit_code == code and "--metrics-port" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plan", "/nowhere", "--profile", "cpu"], ExitCode.INPUT_NOT_FOUND),
        (["plan", "/nowhere", "--profile", "tpu"], ExitCode.BAD_CONFIGURATION),
    ],
)
def test_errors_are_for_people(arguments: list[str], code: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error


@pytest.mark.parametrize("arguments", REFUSED)
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == ExitCode.USAGE
    assert "usage:" in capsys.readouterr().err


def test_auto_profile_on_a_gpu_machine(
    make_checkpoint: Callable[..., Path],
    make_machine: Callable[..., Hardware],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(planning, "probe", lambda: replace(make_machine(), has_amd_gpu=True))
    model = str(make_checkpoint())
    assert cli.main(["plan", model]) == ExitCode.UNSUPPORTED_HARDWARE
    assert "--profile cpu" in capsys.readouterr().err
    assert cli.main(["plan", model, "--profile", "cpu"]) == 0

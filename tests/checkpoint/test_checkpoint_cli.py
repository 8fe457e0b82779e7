from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from step128_checkpoint.cli import main


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from step128_checkpoint.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'vllm', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "tiny" in done.stdout
    for code in (1, 2, 5, 65, 66, 73, 78, 130):
        assert f"  {code} " in done.stdout


@pytest.mark.parametrize("command", ["tiny", "calibrate", "chat"])
def test_missing_extra_is_a_sentence(command: str, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from step128_checkpoint.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = {"tiny": ["out"], "calibrate": ["in", "out", "--samples-from", "set"], "chat": ["in"]}[command]
    done = subprocess.run(
        [sys.executable, "-c", code, command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert f"`{command}` needs the package torch" in done.stderr
    assert "pip install 'step128[checkpoint]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_policy(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "quantize",
        "--method",
        "mse",
        str(make_checkpoint()),
        str(tmp_path / "out"),
        "--policy",
        "most",
        "--json",
    ]
    assert main(command) == 78
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 78
    assert "experts, experts+linears, all-linears, all" in captured.err


def test_output_inside_the_input(make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint()
    assert main(["quantize", "--method", "mse", str(source), str(source / "nl4")]) == 73
    assert "inside the input" in capsys.readouterr().err
    assert not (source / "nl4").exists()


def test_output_without_permission(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "out.partial")

    source = make_checkpoint()
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["quantize", "--method", "mse", str(source), str(tmp_path / "out")]) == 5
    assert "Permission denied" in capsys.readouterr().err


# A run that gets Ctrl-C's signal when a good part of the output is written.
INTERRUPTED_RUN = """
import os, signal, sys
from step128_checkpoint import shards
from step128_checkpoint.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
real, left = os.pwrite, [30]
def count(*arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)
shards.os.pwrite = count
sys.exit(main(["quantize", "--method", "mse", sys.argv[1], sys.argv[2], "--jobs", "2"]))
"""


def test_control_c_is_one_line_and_130(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_RUN, str(make_checkpoint()), str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "step128-checkpoint: interrupted; run the same command again and it resumes\n"
    assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["[/y]", "[bold]x"])
def test_names_that_look_like_markup(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_checkpoint(), tmp_path / name
    assert main(["quantize", "--method", "mse", str(source), str(out), "--dry-run"]) == 0
    assert name in capsys.readouterr().out.replace("\n", "")
    assert main(["quantize", "--method", "mse", str(source), str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["inspect", str(out / "[/nothing]")]) == 66


def test_importance_that_is_a_folder(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(make_checkpoint()), str(tmp_path / "out"), "--importance", str(tmp_path)]
    assert main(command) == 65
    assert f"{tmp_path}: not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("inspect", "interrupted"),
        ("verify", "interrupted"),
        ("dequantize", "interrupted; run the same command again and it resumes"),
        ("download", "interrupted; run the same command again: finished files are kept"),
    ],
)
def test_control_c_promises_only_what_holds(
    command: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("step128_checkpoint.cli._parser", interrupt)
    assert main([command]) == 130
    assert capsys.readouterr().err == f"step128-checkpoint: {sentence}\n"


def test_wrong_usage_is_2(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["quantize", "--method", "mse", str(tmp_path), str(tmp_path / "out"), "--jobs", "0"])
    assert raised.value.code == 2


def test_interrupt_keeps_the_work(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source, out = make_checkpoint(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("step128_checkpoint.conversion.write_synced", interrupt)
        assert main(["quantize", "--method", "mse", str(source), str(out)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted; run the same command again and it resumes")
    assert not out.exists()
    assert main(["quantize", "--method", "mse", str(source), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written_tensors"] == 0
    assert report["verified_tensors"] > 50

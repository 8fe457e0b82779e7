"""Runs the tests of ``interpreted/`` with Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """One process a file, side by side: the interpreter is slow, and uses one core each."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    started = {
        name: subprocess.Popen(
            [*command, str(FOLDER / name)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in FILES
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(running: dict[str, "subprocess.Popen[str]"], name: str) -> None:
    output, _ = running[name].communicate()
    print(output[-6000:])
    assert running[name].returncode == 0
    assert " passed" in output and "skipped" not in output

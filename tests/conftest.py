"""Fixtures shared by the rooms: the trained tiny checkpoint and what is made from it, each made once a session."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MEASURED = pytest.StashKey[list[str]]()


def run_command(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of our console scripts from this environment, as a user would."""
    program, *rest = map(str, arguments)
    script = Path(sys.executable).parent / program
    return subprocess.run(
        [str(script), *rest], capture_output=True, text=True, env=os.environ | (environment or {}), check=False
    )


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep one line of figures for the end of pytest's output, where a passing test's prints would be lost."""
    return request.config.stash.setdefault(MEASURED, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(MEASURED, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_command


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def tiny(made: Path) -> Path:
    """The trained tiny checkpoint in bfloat16 (from the user's cache when it was made before)."""
    out = made / "tiny"
    result = run_command("step128-checkpoint", "tiny", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def quantized(made: Path, tiny: Path) -> Callable[..., Path]:
    """Quantize the tiny checkpoint: ``quantized(policy, method)``, each combination once."""

    def quantize(policy: str = "all-linears", method: str = "mse") -> Path:
        out = made / f"tiny-nl4-{policy}-{method}"
        if not out.exists():
            options = ("--policy", policy, "--method", method)
            result = run_command("step128-checkpoint", "quantize", tiny, out, *options)
            assert result.returncode == 0, result.stderr
        return out

    return quantize


@pytest.fixture(scope="session")
def dequantized(made: Path, quantized: Callable[..., Path]) -> Callable[..., Path]:
    """A quantized checkpoint expanded to float32."""

    def dequantize(policy: str = "all-linears", method: str = "mse") -> Path:
        out = made / f"tiny-float32-{policy}-{method}"
        if not out.exists():
            source = quantized(policy, method)
            result = run_command("step128-checkpoint", "dequantize", source, out, "--dtype", "float32")
            assert result.returncode == 0, result.stderr
        return out

    return dequantize


@pytest.fixture(scope="session")
def offline_vllm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run the real vLLM in its own process; equal requests are run once a session.

    Returns what ``stack/offline_vllm.py`` finds, and the load reports under ``reports``.
    """
    done: dict[str, dict[str, Any]] = {}

    def run(**request: Any) -> dict[str, Any]:
        request["engine"] = {name: str(v) if isinstance(v, Path) else v for name, v in request["engine"].items()}
        key = json.dumps(request, sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp("vllm")
            (folder / "request.json").write_text(key)
            environment = os.environ | {"STEP128_LOAD_REPORT_DIR": str(folder)}
            ranks = request["engine"].get("tensor_parallel_size", 1)
            if ranks > 1:  # one core a rank; vLLM's own binding wants a NUMA node for each
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(ranks))
            script = Path(__file__).parent / "stack/offline_vllm.py"
            process = subprocess.run(
                [sys.executable, str(script), str(folder / "request.json"), str(folder / "result.json")],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
            result = {"returncode": process.returncode, "log": process.stdout + process.stderr}
            if process.returncode == 0:
                result |= json.loads((folder / "result.json").read_text())
            result["reports"] = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-rank*.json")}
            done[key] = result
        return done[key]

    return run

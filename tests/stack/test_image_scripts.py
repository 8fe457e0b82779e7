"""The programs inside of the image: the health probe, and what puts the wheel on top of the base."""

from __future__ import annotations

import http.server
import json
import runpy
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
Answers = list[tuple[int, dict[str, Any]]]


def load(name: str) -> dict[str, Any]:
    """The globals of a script; a function of it sees what is changed in them."""
    script = runpy.run_path(str(DOCKER / name))
    main = script["main"]
    assert isinstance(main, FunctionType)
    return main.__globals__


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[tuple[dict[str, Any], Answers]]:
    """The probe, and the launcher's answers to it, in turn; the last one is given again and again."""
    answers: Answers = []

    class Launcher(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, document = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Launcher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = load("healthcheck.py")
    script["URL"] = f"http://127.0.0.1:{server.server_port}/health"
    script["WAS_READY"], script["POLL_SECONDS"] = tmp_path / "was-ready", 0.01
    yield script, answers
    server.shutdown()
    server.server_close()


def test_a_first_start_is_waited_for(probe: tuple[dict[str, Any], Answers], capsys: pytest.CaptureFixture[str]) -> None:
    script, answers = probe
    answers += [
        (503, {"state": "planned"}),
        (503, {"state": "starting"}),
        (503, {"state": "restarting", "reason": "x"}),
    ]
    answers += [(503, {"state": "verifying"}), (200, {"state": "ready"})]
    assert script["main"]() == 0
    assert len(answers) == 1 and capsys.readouterr().out == "ready\n"


def test_a_start_that_failed_is_told_at_once(
    probe: tuple[dict[str, Any], Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    script, answers = probe
    failed = {"state": "failed", "reason": "/models/x does not exist.", "hint": "Set MODEL.", "exit_code": 66}
    answers += [(503, {"state": "planned"}), (503, failed)]
    assert script["main"]() == 1
    assert capsys.readouterr().out == "failed /models/x does not exist. Set MODEL.\n"


@pytest.mark.parametrize("state", ["starting", "restarting", "ready", "draining"])
def test_a_server_that_was_ready_is_not_waited_for(probe: tuple[dict[str, Any], Answers], state: str) -> None:
    script, answers = probe
    answers.append((200, {"state": "ready"}))
    assert script["main"]() == 0
    answers[:] = [(503, {"state": state, "reason": "vLLM ended"})]
    assert script["main"]() == 1


def test_a_launcher_that_does_not_answer_is_unhealthy(
    probe: tuple[dict[str, Any], Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    script, _ = probe
    script["URL"] = "http://127.0.0.1:9/health"
    assert script["main"]() == 1
    assert "does not answer" in capsys.readouterr().out


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "step128-0.1.0-py3-none-any.whl", "w") as archive:
        needs = "".join(f"Requires-Dist: {each}\n" for each in ("docker>=7.1", "numpy>=1.26", 'torch; extra == "cpu"'))
        archive.writestr("step128-0.1.0.dist-info/METADATA", f"Name: step128\nVersion: 0.1.0\n{needs}")
    return tmp_path


@pytest.fixture
def install(wheel: Path) -> Callable[..., list[tuple[str, ...]]]:
    """Run install.py between two states of the image; return what pip was asked for."""
    (wheel / "requirements.txt").write_text(
        "# pins\ndocker==7.2.0 \\\n    --hash=sha256:aa\nmdurl==0.1.2 --hash=sha256:bb\n"
    )

    def run(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, ...]]:
        script = load("install.py")
        states, asked = [before, after], []
        script["installed"] = lambda: states.pop(0)

        def pip(*arguments: str) -> None:
            chosen = [Path(name).read_text() for name in arguments if name.endswith(".txt")]
            asked.append((*arguments[:2], *chosen))

        script["pip"] = pip
        script["main"](wheel, wheel / "requirements.txt")
        return asked

    return run


BASE = {"numpy": "2.3.5", "torch": "2.13.0+rocm7.2", "vllm": "0.32.0"}
OURS = {"step128": "0.1.0", "docker": "7.2.0", "mdurl": "0.1.2"}


def test_only_what_is_lacking_is_installed(install: Callable[..., list[tuple[str, ...]]]) -> None:
    first, second = install(BASE | {"mdurl": "0.1.1"}, BASE | OURS | {"mdurl": "0.1.1"})
    assert first == ("install", "--require-hashes", "docker==7.2.0      --hash=sha256:aa\n")
    assert second[1].endswith(".whl")


def test_a_version_that_step128_does_not_take_is_replaced(install: Callable[..., list[tuple[str, ...]]]) -> None:
    first, _ = install(BASE | {"docker": "6.0", "mdurl": "0.1.2"}, BASE | OURS)
    assert "docker==7.2.0" in first[2] and "mdurl" not in first[2]


def test_a_changed_torch_fails_the_build(install: Callable[..., list[tuple[str, ...]]]) -> None:
    with pytest.raises(SystemExit, match=r"must stay as they are; changed: torch 2.13.0\+rocm7.2 -> 2.13.0"):
        install(BASE, BASE | OURS | {"torch": "2.13.0"})


def test_a_base_without_what_cannot_be_pure_python_fails_the_build(
    install: Callable[..., list[tuple[str, ...]]],
) -> None:
    base = {name: version for name, version in BASE.items() if name != "numpy"}
    with pytest.raises(SystemExit, match=r"The base image lacks numpy>=1\.26"):
        install(base, base | OURS)

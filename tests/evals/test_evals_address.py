"""The server's address and key: what cannot be used is refused in one sentence, and the key stays on the machine."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from step128_evals.address import is_loopback
from step128_evals.cli import main

GOOD = [["Paris."], ["A disc."], ("get_weather", ['{"city": "Paris"}']), ["Sunny."]]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr("step128_evals.metrics._SETTLE_SECONDS", 0.01)


def run(server: Any, command: str, *options: str) -> int:
    return main([command, "--base-url", server.url, *options])


@pytest.mark.parametrize("command", ["smoke", "ppl", "acceptance"])
def test_wrong_key(fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = tmp_path / "text"
    text.write_text("some text")
    options = [] if command == "smoke" else ["--text", str(text)]
    (tmp_path / "key").write_text("wrong\n")
    assert run(fake_server, command, "--api-key-file", str(tmp_path / "key"), *options) == 5
    assert "refuses the API key (status 401)" in capsys.readouterr().err
    (tmp_path / "key").write_text("secret\n")
    assert run(fake_server, command, "--api-key-file", str(tmp_path / "key"), *options) != 5


@pytest.mark.parametrize("key", ["", "\n", "two\nlines", "schlüssel", "zero\x00byte", "tab\tbed"])
def test_key_that_is_none(fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    (tmp_path / "key").write_text(key)
    assert run(fake_server, "smoke", "--json", "--api-key-file", str(tmp_path / "key")) == 78
    captured = capsys.readouterr()
    assert "empty" in json.loads(captured.out)["error"]
    assert key.strip() not in captured.err or not key.strip()
    assert len(captured.err.splitlines()) == 1


def test_key_from_the_environment_is_checked_too(
    fake_server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "schlüssel")
    assert run(fake_server, "smoke") == 78
    assert "printable ASCII" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "127.0.0.1:8000", "http://", "ftp://x/", "http://a b/"])
def test_address_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--base-url", url, "--json"]) == 78
    captured = capsys.readouterr()
    assert "base URL" in json.loads(captured.out)["error"]
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_key_never_reaches_a_proxy(fake_server: Any, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        fake_server.answers = list(GOOD)
        port = fake_server.url.rpartition(":")[2]
        assert main(["smoke", "--base-url", f"http://{host}:{port}"]) == 0
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_loopback_hosts() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "api.localhost", "0.0.0.0"):
        assert is_loopback(host)
    for host in ("10.0.0.1", "example.org", "localhost.example.org", "::2"):
        assert not is_loopback(host)


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert main(["smoke", "--base-url", url]) == 69
    assert f"no answer from {url}" in capsys.readouterr().err

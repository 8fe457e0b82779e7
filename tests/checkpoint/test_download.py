"""Against a small hub of our own on 127.0.0.1, with the endpoints that huggingface_hub calls; never the real one."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from step128_checkpoint import download
from step128_checkpoint.errors import CheckpointError, InputNotFoundError, OutputError, PermissionDeniedError

REPO, COMMIT = "someone/step", "a" * 40
SHARD = bytes(range(256)) * 4096  # 1 MiB
FILES = {"config.json": b'{"a": 1}\n', "sub/notes.txt": b"notes\n", "model.safetensors": SHARD}
LARGE = {"model.safetensors"}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]]
    requests: ClassVar[list[tuple[str, str, str | None]]]  # method, path, Range
    tokens: ClassVar[set[str | None]]
    refusal: ClassVar[tuple[int, str] | None]
    cut_once: ClassVar[set[str]]  # files whose first answer breaks off in the middle
    failing: ClassVar[set[str]]  # files that are answered with 500, once `finished` is there
    finished: ClassVar[Path]
    altered: ClassVar[dict[str, bytes]]  # sent in place of the true content

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path, _, _ = self.path.partition("?")
        self.requests.append((self.command, self.path, self.headers.get("Range")))
        if REPO in path or path.startswith("/blobs/"):  # the client asks the hub for other things besides
            self.tokens.add(self.headers.get("Authorization"))
        if self.refusal and path.startswith("/api/"):
            status, code = self.refusal
            self._send(status, b"{}", {"X-Error-Code": code} if code else {})
        elif re.fullmatch(rf"/api/models/{REPO}(/revision/(main|{COMMIT}))?", path):
            self._json({"id": REPO, "sha": COMMIT, "siblings": [self._sibling(name) for name in self.files]})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self._json([self._entry(name) for name in self.files])
        elif (name := path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in LARGE:
            # As the hub does: a redirect to another place, what the file is in headers of the redirect itself.
            self._send(302, b"", self._linked(name) | {"Location": f"/blobs/{name}"})
        elif (name := path.removeprefix("/blobs/").removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in self.files:
            self._file(name, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str, body: bool) -> None:
        data = self.altered.get(name, self.files[name])
        start = int(match[1]) if (match := re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))) else 0
        if body and name in self.failing:
            for _ in range(1000):
                if self.finished.exists():
                    break
                time.sleep(0.01)
            return self._send(500, b"", {})
        headers = self._linked(name)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and name in self.cut_once:
            self.cut_once.remove(name)
            self._send(200, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            self.close_connection = True
            return None
        return self._send(206 if start else 200, data[start:] if body else None, headers, len(data) - start)

    def _send(self, status: int, data: bytes | None, headers: dict[str, str], size: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(size if data is None else len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET" and data:
            self.wfile.write(data)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _linked(self, name: str) -> dict[str, str]:
        data = self.files[name]
        etag = hashlib.sha256(data).hexdigest() if name in LARGE else git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return headers | ({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))} if name in LARGE else {})

    def _sibling(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 133}
        found = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
        return found | ({"lfs": lfs} if name in LARGE else {})

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        lfs = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 133}
        found = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
        return found | ({"lfs": lfs} if name in LARGE else {})


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Set HF_ENDPOINT, and what the library made of it when it was first imported, perhaps by another test."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    for name, value in {"files": dict(FILES), "requests": [], "tokens": set(), "refusal": None}.items():
        setattr(Hub, name, value)
    Hub.cut_once, Hub.failing, Hub.altered = set(), set(), {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    use_endpoint(monkeypatch, address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf_cache"))
    yield Hub
    server.shutdown()
    server.server_close()


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    download.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["download", *map(str, arguments)])
    return int(parsed.run(parsed))


def fetched(hub: type[Hub]) -> list[str]:
    """Names of the files whose content was asked for."""
    return [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/api/" not in path]


def test_everything_arrives_and_is_verified(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    out = tmp_path / "out"
    assert run(REPO, out, "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        report["verified"] and report["commit"] == COMMIT and report["fetched_bytes"] == sum(map(len, FILES.values()))
    )
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    note = json.loads((out / "step128_download.json").read_text())
    assert note["repo"] == REPO and note["commit"] == COMMIT
    assert hub.tokens == {"Bearer hf_" + "x" * 34}
    hub.requests.clear()
    assert run(REPO, out) == 0, "a second run only verifies"
    assert fetched(hub) == []


def test_broken_stream_goes_on_where_it_broke(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64 << 10)  # it goes on by whole chunks
    hub.cut_once = {"model.safetensors"}
    assert run(REPO, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == SHARD
    ranges = [start for method, path, start in hub.requests if method == "GET" and "/blobs/" in path]
    assert ranges[0] is None and ranges[1] is not None and int(ranges[1][6:-1]) > 0


def test_interrupted_download_keeps_finished_files(hub: type[Hub], tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.failing, hub.finished = {"config.json"}, out / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"HTTP 500.*run the same command again") as caught:
        run(REPO, out)
    assert caught.value.exit_code == 69
    assert (out / "model.safetensors").read_bytes() == SHARD and not (out / "config.json").exists()
    half = out / ".cache" / "huggingface" / "download" / "x.1.incomplete"
    half.write_bytes(b"left by a kill")
    hub.failing = set()
    missing = [name for name in FILES if not (out / name).exists()]
    hub.requests.clear()
    assert run(REPO, out) == 0
    assert sorted(fetched(hub)) == sorted(Path(name).name for name in missing)
    assert not half.exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_altered_byte_is_found_and_fetched_again(hub: type[Hub], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    altered = bytearray(FILES[name])
    altered[-1] ^= 1
    hub.altered = {name: bytes(altered)}
    with pytest.raises(CheckpointError, match=rf"{name}: other bytes") as caught:
        run(REPO, out)
    assert caught.value.exit_code == 65
    assert not (out / "step128_download.json").exists()
    hub.altered = {}
    assert run(REPO, out) == 0
    assert (out / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        ((403, "GatedRepo"), PermissionDeniedError, r"gated: accept its terms at http://127.*hf auth login"),
        ((404, "RepoNotFound"), InputNotFoundError, "no such model, or it is private"),
        ((401, "RepoNotFound"), InputNotFoundError, "no such model, or it is private"),
        ((500, ""), CheckpointError, "HTTP 500"),
    ],
)
def test_refusals_in_sentences(
    hub: type[Hub], tmp_path: Path, refusal: tuple[int, str], error: type[CheckpointError], words: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(error, match=words) as caught:
        run(REPO, tmp_path / "out")
    codes = {PermissionDeniedError: 5, InputNotFoundError: 66, CheckpointError: 69}
    assert caught.value.exit_code == codes[error]
    assert not (tmp_path / "out").exists()


def test_unknown_revision_and_bad_name(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no revision 'v9'"):
        run(REPO, tmp_path / "out", "--revision", "v9")
    with pytest.raises(CheckpointError, match="no repository's name") as caught:
        run("a/b/c", tmp_path / "out")
    assert caught.value.exit_code == 78


def test_unreachable_hub(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        run(REPO, tmp_path / "out")
    assert caught.value.exit_code == 69


def test_too_small_disk_is_said_before_anything_is_fetched(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"1\.05 MB are still to be fetched, 1\.00 kB are free"):
        run(REPO, out)
    assert fetched(hub) == [] and not out.exists()


def test_what_is_there_needs_no_room(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(REPO, tmp_path / "out") == 0
    (tmp_path / "out" / "config.json").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run(REPO, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 73, "disk is full"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), 73, "disk is full"),
        (RuntimeError("Data processing error: connection reset"), 69, "the connection broke .*connection reset"),
        (PermissionError(13, "Permission denied", "out"), 5, "cannot be written"),
    ],
)
def test_failures_while_fetching(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("step128_checkpoint.hub.fetch.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=words) as caught:
        run(REPO, tmp_path / "out")
    assert caught.value.exit_code == code


def test_two_downloads_into_one_folder(hub: type[Hub], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(REPO, out) == 0
    with (out / ".cache" / "huggingface" / "download" / "step128.lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another download is writing here"):
            run(REPO, out)


def test_patterns_and_dry_run(hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(REPO, out, "--exclude", "*.safetensors", "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["missing_files"] == 2 and "sub/notes.txt" in captured.err
    assert not out.exists()
    assert run(REPO, out, "--include", "*.json") == 0
    assert sorted(path.name for path in out.iterdir()) == [".cache", "config.json", "step128_download.json"]
    with pytest.raises(InputNotFoundError, match="none of which the patterns choose"):
        run(REPO, out, "--include", "*.gguf")


def test_folder_of_something_else_is_refused(hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="was not made by a download"):
        run(REPO, tmp_path)

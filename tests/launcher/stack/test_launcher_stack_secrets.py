"""`step128 secrets`: made once, readable for containers and for nobody else, never shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from step128_launcher.cli import main
from step128_launcher.stack import permissions, secret_files
from step128_launcher.stack.project import User

NAMES = ("api_key", "metrics_token", "grafana_password")
USERS = [User(10001, frozenset({0})), User(65534, frozenset({65534})), User(472, frozenset({0}))]


def read(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in NAMES}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_container_may_read_them_and_no_other_user_reaches_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert main(["secrets", str(tmp_path / "a/secrets")]) == 0
    finally:
        os.umask(before)
    folder = tmp_path / "a/secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(NAMES)
    for name in NAMES:
        status = (folder / name).stat()
        assert status.st_mode & 0o777 == 0o644
        assert all(permissions.may(user, status, permissions.READ) for user in USERS)


def test_they_differ_and_are_never_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], [], ["--rotate"]):
        main(["secrets", str(tmp_path / "s"), *arguments])
        found = read(tmp_path / "s")
        assert len({*found.values()}) == 3 and all(len(value.strip()) >= 43 for value in found.values())
        printed = "".join(capsys.readouterr())
        assert not [value for value in found.values() if value.strip() in printed]


def test_what_is_there_is_kept_unless_rotated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    (folder / "api_key").write_text("my own\n")
    (folder / "api_key").chmod(0o600)
    assert main(["secrets", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"kept    {folder}/api_key") and f"made    {folder}/metrics_token" in printed
    first = read(folder)
    assert first["api_key"] == "my own\n" and (folder / "api_key").stat().st_mode & 0o777 == 0o644
    main(["secrets", str(folder), "--rotate"])
    printed = capsys.readouterr().out
    assert not {*first.values()} & {*read(folder).values()}
    assert "docker compose restart" in printed and "reset-admin-password" in printed


def test_the_folder_is_compose_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRETS_DIR", "elsewhere")
    assert main(["secrets"]) == 0
    assert read(tmp_path / "elsewhere") and not (tmp_path / "secrets").exists()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_a_folder_that_others_may_enter_is_refused(
    tmp_path: Path, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    folder.chmod(mode)
    assert main(["secrets", str(folder)]) == 78
    assert not list(folder.iterdir()) and folder.stat().st_mode & 0o777 == mode
    assert f"`chmod 700 {folder}`" in capsys.readouterr().err


def test_an_empty_one_is_not_kept_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    (tmp_path / "s/metrics_token").touch()
    assert main(["secrets", str(tmp_path / "s")]) == 78
    assert "metrics_token is there and holds no secret: it is empty" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["secrets", str(tmp_path / "file/s")]) == 73
    assert "SECRETS_DIR" in capsys.readouterr().err
    (tmp_path / "t/api_key").mkdir(parents=True)
    (tmp_path / "t").chmod(0o700)
    assert main(["secrets", str(tmp_path / "t"), "--rotate"]) == 73
    printed = capsys.readouterr().err
    assert "SECRETS_DIR" in printed and "--state-dir" not in printed


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert main(["secrets", str(tmp_path / "s")]) == 73
    assert not list((tmp_path / "s").iterdir())


def test_the_names_are_compose_s() -> None:
    text = (Path(__file__).parents[3] / "compose.yaml").read_text()
    for name in secret_files.NAMES:
        assert f"{name}: {{file: " in text
    assert json.dumps(sorted(secret_files.NAMES)) == json.dumps(sorted(NAMES))

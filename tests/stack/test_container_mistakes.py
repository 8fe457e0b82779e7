"""What a user may get wrong before the stack is up: each ends at once, with what is missing, and starts nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from container_stack import RENDER_GID, Stack, make_secrets

pytestmark = pytest.mark.proof


def refusal(stack: Stack, **changed: str | None) -> str:
    """What `up` prints when it fails; nothing may be left running."""
    result = stack.compose("up", "--detach", "--wait", "serve", check=False, **changed)
    running = stack.compose("ps", "--quiet", "--status", "running").stdout if None not in changed.values() else ""
    stack.compose("down", "--volumes", check=False)
    assert result.returncode != 0 and not running.strip()
    return result.stderr


def test_a_missing_secret_is_named(built: Stack, tmp_path: Path) -> None:
    make_secrets(tmp_path / "secrets")
    (tmp_path / "secrets/metrics_token").unlink()
    said = refusal(built, SECRETS_DIR=str(tmp_path / "secrets"))
    assert f"does not exist: {tmp_path}/secrets/metrics_token" in said


def test_a_missing_model_folder_is_named_and_not_made(built: Stack, tmp_path: Path) -> None:
    said = refusal(built, MODEL_DIR=str(tmp_path / "nowhere"))
    assert f"does not exist: {tmp_path}/nowhere" in said
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_setting_is_named_with_what_to_do(built: Stack) -> None:
    assert "set RENDER_GID in .env: getent group render" in refusal(built, RENDER_GID=None)


@pytest.mark.skipif(Path("/dev/kfd").exists(), reason="this machine has the device")
def test_a_missing_device_is_named(built: Stack) -> None:
    without_overlays = replace(built, overlays=())
    assert '"/dev/kfd": no such file or directory' in refusal(without_overlays)


def test_a_secret_that_the_server_may_not_read_is_held_with_the_reason(built: Stack, tmp_path: Path) -> None:
    """A file of mode 0600 is the host user's alone; `step128 secrets` makes them readable in a folder that is not."""
    make_secrets(tmp_path / "secrets")
    (tmp_path / "secrets/api_key").chmod(0o600)
    changed = {"SECRETS_DIR": str(tmp_path / "secrets")}
    result = built.compose("up", "--detach", "--wait", "serve", check=False, **changed)
    status, said = built.health("serve")
    restarts = built.inspect("serve")["RestartCount"]
    built.compose("down", "--volumes")
    assert result.returncode != 0 and (status, restarts) == ("unhealthy", 0)
    assert "/run/secrets/api_key cannot be read: Permission denied" in said


@pytest.mark.parametrize(("group", "outcome"), [(None, "PASS"), ("44999", "FAIL")])
def test_a_wrong_group_is_told_with_the_right_number(built: Stack, group: str | None, outcome: str) -> None:
    """The doctor on the recorded machine, whose device nodes are real ones here and belong to the host's group."""
    overlays = built.overlays if group is None else (*built.overlays, "groups.yaml")
    (built.folder / "groups.yaml").write_text(f'services: {{serve: {{group_add: !override ["{group}"]}}}}\n')
    command = ["run", "--rm", "--no-deps", "--no-TTY", "serve", "doctor", "--machine", "/machine"]
    said = replace(built, overlays=overlays).compose(*command, check=False).stdout
    (line,) = [each for each in said.splitlines() if "device-nodes" in each]
    assert outcome in line, said
    assert group is None or f"(group {RENDER_GID})" in said, said

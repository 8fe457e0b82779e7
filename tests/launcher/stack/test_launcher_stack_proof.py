"""`step128 up`, `status --stack`, `logs` and `down` against a real engine and the real compose plugin.

The two services are shells in an image of this machine's own /bin/sh, so that nothing is pulled; the stack of
compose.yaml itself is tests/stack's.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from docker_engine import Engine, EngineUnavailableError, docker_engine
from launched import free_port

from step128_launcher.cli import main

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[3]
PROJECT, IMAGE = "step128hostproof", "step128-host-proof:local"
PROGRAMS = ("/bin/sh", "/bin/sleep", "/bin/cat")
_COMPOSE = """\
name: {project}
services:
  serve:
    image: ${{STEP128_IMAGE:-{image}}}
    user: "10001:0"
    entrypoint: [/bin/sh, -ec]
    command:
      - |
        echo "[  0.1 s] loading weights:  10%"
        cat /run/secrets/api_key /models/tiny/config.json > /dev/null
        test -z "$FAIL" || {{ echo "it went wrong"; exit 7; }}
        sleep 8
        echo > /tmp/ready
        exec sleep 1000
      - --model
      - /models/${{MODEL:?set MODEL in .env}}
    environment: {{FAIL: "${{FAIL:-}}"}}
    init: true
    read_only: true
    cap_drop: [ALL]
    tmpfs: [/tmp]
    stop_grace_period: 1s
    healthcheck:
      test: [CMD, /bin/sh, -c, "test -e /tmp/ready"]
      interval: 1s
      start_period: 30s
      start_interval: 1s
    ports: ["127.0.0.1:${{PORT}}:8000"]
    secrets: [api_key]
    volumes:
      - {{type: bind, source: ./models, target: /models, read_only: true}}
      - state:/state
  grafana:
    image: {image}
    profiles: [monitoring]
    command: [/bin/sleep, "1000"]
    init: true
    stop_grace_period: 1s
volumes: {{state: {{}}}}
secrets: {{api_key: {{file: ./secrets/api_key}}}}
"""


@dataclass
class HostStack:
    engine: Engine
    folder: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = main([*arguments])
        printed = self.capsys.readouterr()
        return code, printed.out, printed.err

    def listed(self, kind: str) -> list[str]:
        command = ["ps", "--all"] if kind == "container" else [kind, "ls"]
        label = f"label=com.docker.compose.project={PROJECT}"
        return self.engine.docker(*command, "--quiet", "--filter", label).stdout.split()


def shell_image() -> bytes:
    """A root file system of a shell, two programs and the libraries they name."""
    files = set(PROGRAMS)
    for program in PROGRAMS:
        printed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        files |= set(re.findall(r"(/\S+) \(0x", printed))
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in sorted(files):
            tar.add(Path(name).resolve(), arcname=name.lstrip("/"))
    return made.getvalue()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    try:
        with docker_engine() as found:
            tar = shell_image()
            command = ["docker", "import", "-", IMAGE]
            subprocess.run(command, input=tar, env=found.environment, check=True, capture_output=True)
            yield found
            found.docker("compose", "--project-name", PROJECT, "down", "--volumes", check=False)
            found.docker("image", "rm", "--force", IMAGE, check=False)
    except EngineUnavailableError as error:
        pytest.skip(f"no proof of the host commands: {error}")


@pytest.fixture
def stack(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[HostStack]:
    (tmp_path / "compose.yaml").write_text(_COMPOSE.format(project=PROJECT, image=IMAGE))
    (tmp_path / ".env").write_text(f"MODEL=tiny\nPORT={free_port()}\nCOMPOSE_PROJECT_NAME={PROJECT}\n")
    checkpoint = tmp_path / "models/tiny"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    tmp_path.chmod(0o755)
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path / "models")], check=True)
    for name, value in engine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield HostStack(engine, tmp_path, capfd)
    engine.docker("compose", "--project-name", PROJECT, "down", "--volumes", check=False)


def test_from_secrets_to_nothing_left(stack: HostStack) -> None:
    code, _, said = stack.run("up")
    assert code == 66 and "`step128 secrets`" in said and not stack.listed("container")
    assert stack.run("secrets")[0] == 0

    code, out, said = stack.run("up", "--profile", "monitoring")
    assert code == 0, said
    assert "loading weights:  10%" in said and not out
    code, out, _ = stack.run("status", "--stack", "--json")
    states = {each["service"]: (each["state"], each["health"]) for each in json.loads(out)["services"]}
    assert (code, states) == (0, {"serve": ("running", "healthy"), "grafana": ("running", None)})
    code, out, _ = stack.run("logs", "serve", "--tail", "5")
    assert code == 0 and "loading weights" in out
    code, _, said = stack.run("up", "--profile", "monitoring")
    assert code == 0 and "is serve's already" in said, "up again changes nothing"

    code, _, said = stack.run("down")
    assert code == 0 and f"{PROJECT}_state" in said
    assert not stack.listed("container") and not stack.listed("network") and len(stack.listed("volume")) == 1
    code, _, said = stack.run("down", "--volumes", "--yes")
    assert code == 0 and "logs, plan and calibration" in said and not stack.listed("volume")


def test_a_service_that_fails_is_shown_with_its_last_lines(stack: HostStack) -> None:
    stack.run("secrets")
    with (stack.folder / ".env").open("a") as settings:
        settings.write("FAIL=1\n")
    code, _, said = stack.run("up")
    assert code == 69, said
    assert "serve is exited (exit code 7, 0 restarts)" in said and "  it went wrong\n" in said
    code, out, _ = stack.run("status", "--stack")
    assert code == 69 and "exited (7)" in out


def test_a_setting_or_an_image_that_is_missing(stack: HostStack) -> None:
    stack.run("secrets")
    settings = (stack.folder / ".env").read_text()
    (stack.folder / ".env").write_text(settings.replace("MODEL=tiny", "MODEL="))
    code, _, said = stack.run("up")
    assert code == 78 and "set MODEL in .env" in said
    (stack.folder / ".env").write_text(settings + "STEP128_IMAGE=localhost:9/nosuch:1\n")
    code, _, said = stack.run("up")
    assert code == 69 and "localhost:9/nosuch:1, for serve, is not here, and its registry cannot be asked" in said
    assert not stack.listed("container")


@pytest.mark.skipif(Path("/dev/kfd").exists(), reason="this machine has the device")
def test_compose_yaml_on_a_machine_without_the_gpus(stack: HostStack) -> None:
    """Our own files, as a user has them: what is checked comes out of compose's reading of them."""
    for name in ("compose.yaml", "compose.cpu.yaml"):
        (stack.folder / name).write_text((ROOT / name).read_text())
    with (stack.folder / ".env").open("a") as settings:
        settings.write(f"MODEL_DIR=./models\nRENDER_GID=1\nVIDEO_GID=2\nSTEP128_IMAGE={IMAGE}\n")
    stack.run("secrets")
    code, _, said = stack.run("up")
    assert code == 4 and "serve needs /dev/kfd, which is not there" in said and "step128 up --cpu" in said
    assert stack.run("up", "--cpu", "--check")[0] == 0
    assert not stack.listed("container")

"""A fake engine in the SDK's place and a fake `docker` on PATH, for the commands that look after the stack."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
from docker.errors import APIError, ImageNotFound

from step128_launcher.cli import main

PROJECT = "step128"
_DOCKER = """\
#!/bin/sh
printf '%s\\n' "$*" >> "{fake}/calls"
case "$*" in
  "compose version --short") cat "{fake}/compose_version"; test -s "{fake}/compose_version" ;;
  "context inspect"*) cat "{fake}/context" ;;
  *"--no-interpolate") cat "{fake}/raw.json" ;;
  *"config --format json")
    cat "{fake}/config_error" >&2
    test -s "{fake}/config_error" && exit 15
    cat "{fake}/config.json" ;;
  *" up --detach"*) echo "compose says this" >&2; exit "$(cat "{fake}/up_code")" ;;
esac
"""


def _api_error(status: int, text: str) -> APIError:
    return APIError(text, response=SimpleNamespace(status_code=status, url="", reason=""), explanation=text)


class FakeContainer:
    """One container that goes through `life`, (state, health) pairs, one step at each look."""

    def __init__(self, service: str, *life: tuple[str, str | None], **more: Any) -> None:
        self.name = f"{PROJECT}-{service}-1"
        self.labels = {"com.docker.compose.service": service, **more.get("labels", {})}
        self.life, self.more = list(life), more
        self.reload()

    def reload(self) -> None:
        state, health = self.life.pop(0) if len(self.life) > 1 else self.life[0]
        ports = self.more.get("ports", {})
        self.attrs: dict[str, Any] = {
            "State": {"Status": state, "ExitCode": self.more.get("exit_code", 0), "StartedAt": self.started_at},
            "RestartCount": self.more.get("restarts", 0),
            "Config": {"Image": "image:1"},
            "NetworkSettings": {"Ports": ports},
        }
        if health is not None:
            log = [{"Output": self.more.get("says", "")}]
            self.attrs["State"]["Health"] = {"Status": health, "Log": log}

    @property
    def started_at(self) -> str:
        return "2026-11-26T12:00:00.123456789Z"

    def logs(self, tail: int, since: float | None = None) -> bytes:
        return "\n".join(self.more.get("logs", [])[-tail:]).encode()

    def exec_run(self, command: list[str], stderr: bool) -> tuple[int, bytes]:
        document = self.more.get("launcher")
        return (1, b"") if document is None else (0, json.dumps(document).encode())


@dataclass
class FakeEngine:
    """What docker.DockerClient is replaced by; a test changes what it holds."""

    release: str = "26.1.5"
    components: tuple[str, ...] = ("Engine",)
    local: dict[str, list[str]] = field(default_factory=dict)  # image -> RepoDigests
    remote: dict[str, str | Exception] = field(default_factory=dict)  # image -> digest, or what asking raises
    found: list[FakeContainer] = field(default_factory=list)
    volume_names: list[str] = field(default_factory=list)
    unreachable: Exception | None = None
    fails: Exception | None = None

    def ping(self) -> None:
        if self.unreachable is not None:
            raise self.unreachable

    def version(self) -> dict[str, Any]:
        return {"Version": self.release, "Components": [{"Name": name} for name in self.components]}

    @property
    def images(self) -> Any:
        return SimpleNamespace(get=self._image, get_registry_data=self._registry)

    @property
    def containers(self) -> Any:
        return SimpleNamespace(list=self._containers)

    @property
    def volumes(self) -> Any:
        return SimpleNamespace(list=lambda filters: [SimpleNamespace(name=name) for name in self.volume_names])

    def _containers(self, filters: dict[str, str], **options: bool) -> list[FakeContainer]:
        if self.fails is not None:
            raise self.fails
        return self.found if filters == {"label": f"com.docker.compose.project={PROJECT}"} else []

    def _image(self, name: str) -> Any:
        if name not in self.local:
            raise ImageNotFound(f"No such image: {name}")
        return SimpleNamespace(id="sha256:" + "1" * 64, attrs={"RepoDigests": self.local[name]})

    def _registry(self, name: str) -> Any:
        answer = self.remote.get(name, _api_error(500, "dial tcp: lookup registry.example: no such host"))
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(id=answer)


@dataclass
class Bench:
    """A folder with compose.yaml, .env, secrets and a checkpoint; an engine; and the `docker` command's answers."""

    folder: Path
    fake: Path
    engine: FakeEngine
    capsys: pytest.CaptureFixture[str]

    def set(self, name: str, text: str) -> None:
        (self.fake / name).write_text(text)

    def calls(self) -> list[str]:
        path = self.fake / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def run(self, *arguments: str) -> SimpleNamespace:
        """Run a command: its exit status, and what it printed with line breaks of the console undone."""
        limit = ["--timeout", "5"] if arguments[0] == "up" and "--timeout" not in arguments else []
        code = main([*arguments, *limit])
        printed = self.capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """What `docker compose config --format json` prints for compose.yaml with the CPU overlay, shortened."""

    def service(image: str, user: str, port: int, *secrets: str) -> dict[str, Any]:
        return {
            "image": image,
            "user": user,
            "ports": [{"mode": "ingress", "host_ip": "127.0.0.1", "target": port, "published": str(port)}],
            "secrets": [{"source": name, "target": f"/run/secrets/{name}"} for name in secrets],
        }

    serve = service("step128:cpu", "10001:0", 18000, "api_key", "metrics_token") | {
        "build": {"context": ".", "args": {"BASE_IMAGE": "vllm/vllm-openai-cpu:v0.32.0"}},
        "command": ["serve", "--service", "--model", "/models/tiny"],
        "volumes": [
            {"type": "bind", "source": str(tmp_path / "stack/models"), "target": "/models", "read_only": True},
            {"type": "volume", "source": "state", "target": "/var/lib/step128"},
        ],
    }
    files = {name: str(tmp_path / "stack/secrets" / name) for name in ("api_key", "metrics_token", "grafana_password")}
    return {
        "name": PROJECT,
        "services": {
            "grafana": service("grafana/grafana:13.2.0", "472:0", 13000, "grafana_password"),
            "serve": serve,
        },
        "secrets": {name: {"name": f"{PROJECT}_{name}", "file": path} for name, path in files.items()},
    }


@pytest.fixture
def bench(
    tmp_path: Path,
    document: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Bench:
    """Everything as it should be; each test spoils what it is about."""
    folder, fake = tmp_path / "stack", tmp_path / "fake"
    checkpoint = folder / "models/tiny"
    checkpoint.mkdir(parents=True)
    for path in (folder / "models", checkpoint):
        path.chmod(0o755)
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).write_text("{}")
        (checkpoint / name).chmod(0o644)
    for name in ("compose.yaml", "compose.cpu.yaml", ".env"):
        (folder / name).write_text("")
    fake.mkdir()
    program = fake / "docker"
    program.write_text(_DOCKER.format(fake=fake))
    program.chmod(0o755)
    engine = FakeEngine(local={"step128:cpu": [], "grafana/grafana:13.2.0": ["grafana/grafana@sha256:" + "a" * 64]})
    made = Bench(folder, fake, engine, capsys)
    made.set("compose_version", "2.26.1-4\n")
    made.set("config_error", "")
    made.set("up_code", "0")
    made.set("context", "unix:///var/run/docker.sock\n")
    made.set("config.json", json.dumps(document))
    raw = json.loads(json.dumps(document))
    raw["services"]["grafana"]["image"] = "${GRAFANA_IMAGE:-grafana/grafana:13.2.0}"
    raw["services"]["serve"]["image"] = "${STEP128_IMAGE:-step128:cpu}"
    raw["services"]["serve"]["build"]["args"] = ["BASE_IMAGE=${CPU_BASE_IMAGE:-vllm/vllm-openai-cpu:v0.32.0}"]
    made.set("raw.json", json.dumps(raw))
    for variable in ("DOCKER_HOST", "COMPOSE_PROJECT_NAME", "SECRETS_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(docker, "DockerClient", lambda base_url, timeout: engine)
    monkeypatch.setattr("step128_launcher.stack.waiting.POLL_SECONDS", 0.01)
    assert main(["secrets"]) == 0
    capsys.readouterr()
    return made


@pytest.fixture
def up_and_well() -> Callable[[], list[FakeContainer]]:
    """Two containers that are up."""

    def make() -> list[FakeContainer]:
        ports = {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18000"}], "9128/tcp": None}
        return [
            FakeContainer("serve", ("running", "healthy"), ports=ports, launcher={"state": "ready"}),
            FakeContainer("grafana", ("running", "healthy")),
        ]

    return make


@pytest.fixture
def api_error() -> Callable[[int, str], APIError]:
    """Make what the SDK raises for an answer of the engine: its status and text."""
    return _api_error

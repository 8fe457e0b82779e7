"""The stack of compose.yaml with the CPU overlay, on images made on the spot: what the container proof runs."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base_image
import yaml
from docker_engine import Engine, download
from launched import free_port

ROOT = Path(__file__).parents[2]
MACHINES = ROOT / "tests/machines"
PROJECT = "step128proof"
PROOF_OVERLAY = "proof.yaml"
IMAGE, PROMETHEUS_IMAGE, PROBE_IMAGE = (f"step128-proof-{name}:local" for name in ("serve", "prometheus", "probe"))
# Numbers that no user or group of the image has.
RENDER_GID, VIDEO_GID = 44992, 44044
CA_BUNDLES = (os.environ.get("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt")
_PROMETHEUS = """\
FROM {base}
COPY prometheus promtool /bin/
RUN mkdir /prometheus && chown 65534:65534 /prometheus
ENTRYPOINT ["/bin/prometheus"]
"""
_PROBE = """\
FROM {base}
COPY grafana_probe.py /opt/
COPY --chmod=0755 wget /usr/bin/wget
RUN mkdir /var/lib/grafana && chown 472:0 /var/lib/grafana
ENTRYPOINT ["python3", "-I", "/opt/grafana_probe.py"]
"""
# Grafana's image has busybox's wget, which the healthcheck of compose.yaml calls; Debian's minimal system has none.
_WGET = """\
#!/usr/bin/python3 -I
import sys, urllib.request
urllib.request.urlopen(sys.argv[-1], timeout=4)
"""


def build_base(engine: Engine) -> str:
    """Return the name of the base image, which is kept for the next proof."""
    name = base_image.tag()
    if engine.docker("image", "inspect", name, check=False).returncode:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            tar = Path(folder) / "base.tar"
            base_image.write_tar(tar)
            engine.docker("import", str(tar), name)
    return name


def build_monitoring(engine: Engine, base: str, folder: Path) -> None:
    """Build the image in Prometheus's place (Debian's program, laid out like prom/prometheus) and in Grafana's."""
    folder.mkdir()
    unpacked = download(("prometheus", "promtool"), folder / "deb")
    for name in ("prometheus", "promtool"):
        shutil.copy(unpacked / "usr/bin" / name, folder / name)
    shutil.copy(ROOT / "tests/stack/grafana_probe.py", folder)
    (folder / "wget").write_text(_WGET)
    for image, text in ((PROMETHEUS_IMAGE, _PROMETHEUS), (PROBE_IMAGE, _PROBE)):
        recipe = folder / f"{image.split(':')[0]}.Dockerfile"
        recipe.write_text(text.format(base=base))
        engine.docker("build", "--quiet", "--file", str(recipe), "--tag", image, str(folder))


@dataclass
class Stack:
    """One compose project of the proof: its settings, and commands on it."""

    engine: Engine
    folder: Path
    settings: dict[str, str]
    overlays: tuple[str, ...] = ("compose.cpu.yaml", PROOF_OVERLAY)

    @property
    def key(self) -> str:
        return (self.folder / "secrets/api_key").read_text().strip()

    @property
    def metrics_token(self) -> str:
        return (self.folder / "secrets/metrics_token").read_text().strip()

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.settings['PORT']}"

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self.settings['PROMETHEUS_PORT']}"

    @property
    def probe(self) -> str:
        return f"http://127.0.0.1:{self.settings['GRAFANA_PORT']}"

    @property
    def machine(self) -> Path:
        """The recorded machine whose /sys and /proc the exporter reads; it may be changed while it runs."""
        return self.folder / "machine"

    def compose(self, *arguments: str, check: bool = True, **changed: str | None) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` with the settings, those in `changed` in their place (None: without that one)."""
        settings = {name: value for name, value in (self.settings | changed).items() if value is not None}
        env_file = self.folder / "env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        names = ("compose.yaml", *self.overlays)
        files = [(ROOT if name.startswith("compose.") else self.folder) / name for name in names]
        named = [part for file in files for part in ("--file", str(file))]
        command = ["compose", "--project-name", PROJECT, "--project-directory", str(ROOT)]
        return self.engine.docker(*command, "--env-file", str(env_file), *named, *arguments, check=check)

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what the engine knows of a service's container."""
        (found,) = json.loads(self.engine.docker("inspect", f"{PROJECT}-{service}-1").stdout)
        return dict(found)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of a PromQL expression, now."""
        answer = fetch(f"{self.prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return list(json.loads(answer.text)["data"]["result"])

    def health(self, service: str) -> tuple[str, str]:
        """Return a container's health and what its last check printed."""
        found = self.inspect(service)["State"]["Health"]
        return found["Status"], (found["Log"] or [{"Output": ""}])[-1]["Output"]

    def alerts(self) -> set[str]:
        """Return the names of the alerts that fire."""
        found = json.loads(fetch(f"{self.prometheus}/api/v1/alerts").text)["data"]["alerts"]
        return {each["labels"]["alertname"] for each in found if each["state"] == "firing"}

    def leftovers(self) -> dict[str, str]:
        """Return what the engine still has of the project, by kind."""
        label = f"label=com.docker.compose.project={PROJECT}"
        kinds = {"container": ["ps", "--all"], "volume": ["volume", "ls"], "network": ["network", "ls"]}
        listed = {
            kind: self.engine.docker(*command, "--quiet", "--filter", label).stdout for kind, command in kinds.items()
        }
        return {kind: text for kind, text in listed.items() if text.strip()}


class Timed:
    """Keeps how long a block took: `with timed("what it does"):`."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.lines.append(f"{what} {time.monotonic() - began:.0f} s")


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP."""

    status: int
    text: str


def fetch(url: str, body: object = None, key: str | None = None) -> Answer:
    """Ask a URL of this machine; a refusal is an answer too."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode())


def wait_until(what: str, true: Callable[[], Any], limit_seconds: float) -> float:
    """Wait for a condition and return how long it took."""
    began = time.monotonic()
    while time.monotonic() - began < limit_seconds:
        try:
            if true():
                return time.monotonic() - began
        except (OSError, ValueError, KeyError):
            pass  # not up yet
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {limit_seconds:.0f} s")


def prepare(engine: Engine, folder: Path, models: Path, base: str) -> Stack:
    """Lay out what a user has beside compose.yaml: settings, secrets, models, and this proof's device nodes."""
    ports = {name: str(free_port()) for name in ("PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")}
    ca_bundle = next((path for path in CA_BUNDLES if path and Path(path).exists()), "/dev/null")
    settings = {
        "COMPOSE_PROFILES": "monitoring",
        "STEP128_IMAGE": IMAGE,
        "CPU_BASE_IMAGE": base,
        "PROMETHEUS_IMAGE": PROMETHEUS_IMAGE,
        "GRAFANA_IMAGE": PROBE_IMAGE,
        "MODEL_DIR": str(models),
        "MODEL": "tiny-nl4",
        "RENDER_GID": str(RENDER_GID),
        "VIDEO_GID": str(VIDEO_GID),
        "SECRETS_DIR": str(folder / "secrets"),
        "CA_BUNDLE": ca_bundle,
        **ports,
    }
    make_secrets(folder / "secrets")
    use_machine(folder / "machine", "quad-r9700")
    shutil.copytree(ROOT / "configs/prometheus", folder / "prometheus")
    (folder / PROOF_OVERLAY).write_text(yaml.safe_dump(_overlay(folder)))
    folder.chmod(0o755)
    return Stack(engine, folder, settings)


def make_secrets(folder: Path) -> None:
    """Make the three secrets as a user does; each container must be able to read its own."""
    subprocess.run([str(Path(sys.executable).parent / "step128"), "secrets", str(folder)], check=True)


def use_machine(target: Path, name: str) -> None:
    """Put a recorded machine in place of the one there, its device nodes being real ones (of /dev/null)."""
    target.mkdir(exist_ok=True)
    for entry in target.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.copytree(MACHINES / name, target, symlinks=True, dirs_exist_ok=True)
    for node in [target / "dev/kfd", *(target / "dev/dri").iterdir()]:
        node.unlink()
        os.mknod(node, 0o660 | stat.S_IFCHR, os.makedev(1, 3))
        os.chown(node, 0, RENDER_GID)
        node.chmod(0o660)


def _overlay(folder: Path) -> Mapping[str, Any]:
    """Return what the proof adds: faked devices, a recorded machine for the exporter, its own copy of the rules."""
    serve = {
        "devices": [f"{folder}/machine/dev/kfd:/dev/kfd", f"{folder}/machine/dev/dri:/dev/dri"],
        "group_add": [str(RENDER_GID), str(VIDEO_GID)],
        "environment": {"STEP128_TELEMETRY_ROOT": "/machine"},
        "volumes": [f"{folder}/machine:/machine:ro"],
    }
    return {"services": {"serve": serve, "prometheus": {"volumes": [f"{folder}/prometheus:/etc/prometheus:ro"]}}}

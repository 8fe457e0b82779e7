"""A Docker engine for the container proof: one that runs already, or one that the proof installs and starts.

It is installed only by root on Debian, where apt has it, and started with a socket and a data folder of its own, so
that nothing of an installation of yours is touched. What stands in the way is an `EngineUnavailableError`, and its text
the reason that the proof is skipped for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LEAST_ENGINE, LEAST_COMPOSE = (25, 0), (2, 26)  # as compose.yaml says
RUN_DIR, DATA_DIR = Path("/run/step128-proof"), Path("/var/cache/step128-proof")
CDI_DIR = RUN_DIR / "cdi"
START_LIMIT_SECONDS = 60
# Debian 12 has an engine that is too old; Debian 13's packages install on it (tried), with Debian 12's libc and runc.
NEWER_SUITE = "trixie"
FROM_NEWER = ("docker.io", "docker-cli", "docker-compose", "docker-buildx", "prometheus", "promtool")
ENGINE = FROM_NEWER[:4]
TOOLS = ("mmdebstrap", "iptables")
_SOURCES = """\
deb [signed-by={keyring}] {archive} {suite} main
deb [signed-by={keyring}] {archive} {newer} main
"""
_PREFERENCES = """\
Package: *
Pin: release n={newer}
Pin-Priority: 100

Package: {packages}
Pin: release n={newer}
Pin-Priority: 990
"""


class EngineUnavailableError(Exception):
    """Why there is no engine here."""


@dataclass(frozen=True)
class Engine:
    """How to reach an engine, and what it took to have it; `cdi_dir` is None for one that is not the proof's own."""

    environment: dict[str, str]
    versions: str
    install_seconds: float
    start_seconds: float
    cdi_dir: Path | None = None

    def docker(
        self, *arguments: str, check: bool = True, environment: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker`; a failure that was not expected shows what it printed."""
        result = subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            env=self.environment | (environment or {}),
            cwd=cwd,
            check=False,
        )
        if check and result.returncode:
            raise AssertionError(
                f"docker {' '.join(arguments)}: exit {result.returncode}\n{result.stdout}\n{result.stderr}"
            )
        return result


@contextmanager
def docker_engine() -> Iterator[Engine]:
    """Give an engine until the block ends; one that was started for it is stopped then.

    Raises:
        EngineUnavailableError: if there is none, and none can be had.

    """
    own = os.environ | {"DOCKER_HOST": f"unix://{RUN_DIR}/docker.sock"}
    for environment, cdi_dir in ((dict(os.environ), None), (own, CDI_DIR)):
        if _answers(environment):
            yield Engine(environment, _checked_versions(environment), 0.0, 0.0, cdi_dir)
            return
    install_seconds = _install_if_needed()
    with _daemon(own) as start_seconds:
        yield Engine(own, _checked_versions(own), install_seconds, start_seconds, CDI_DIR)


def install(packages: tuple[str, ...]) -> None:
    """Install Debian packages, those of FROM_NEWER from the newer suite; apt's own configuration stays as it is.

    Raises:
        EngineUnavailableError: if that is not possible here.

    """
    if os.geteuid() != 0:
        raise EngineUnavailableError(f"not root, so {', '.join(packages)} cannot be installed")
    _apt("install", "--yes", "--no-install-recommends", *packages)


def download(packages: tuple[str, ...], folder: Path) -> Path:
    """Return a folder with the packages' files, unpacked and not installed.

    Raises:
        EngineUnavailableError: if that is not possible here.

    """
    folder.mkdir()
    _apt("download", *packages, cwd=folder)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder / "files")], check=True)
    return folder / "files"


def _apt(*step: str, cwd: Path | None = None) -> None:
    suite = _debian_suite()
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryDirectory() as folder:
        options = _apt_options(Path(folder), suite)
        for arguments in (("update",), step):
            command = ["apt-get", *options, *arguments]
            result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
            if result.returncode:
                last = (result.stderr or result.stdout).strip().splitlines()[-1:]
                raise EngineUnavailableError(f"apt-get {' '.join(arguments)} failed: {' '.join(last)}")


def _debian_suite() -> str:
    release = Path("/etc/os-release")
    fields = dict(line.split("=", 1) for line in release.read_text().splitlines() if "=" in line)
    if fields.get("ID") != "debian" or not shutil.which("apt-get"):
        raise EngineUnavailableError("no Docker engine runs here, and only on Debian the proof would install one")
    return fields["VERSION_CODENAME"]


def _archive(suite: str) -> str:
    """Return the address that this machine's apt has Debian from."""
    folder = Path("/etc/apt")
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        text = path.read_text() if path.is_file() else ""
        for stanza in text.split("\n\n") if path.suffix == ".sources" else ():
            fields = dict(re.findall(r"^(\w[\w-]*):\s*(.+)$", stanza, re.M))
            if suite in fields.get("Suites", "").split():
                return fields["URIs"].split()[0]
        if line := re.search(rf"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+{suite}\s", text, re.M):
            return line[1]
    raise EngineUnavailableError(f"apt's sources name no archive for {suite}")


def _apt_options(folder: Path, suite: str) -> list[str]:
    (folder / "lists/partial").mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = _SOURCES.format(keyring=keyring, archive=_archive(suite), suite=suite, newer=NEWER_SUITE)
    (folder / "sources.list").write_text(sources)
    (folder / "preferences").write_text(_PREFERENCES.format(newer=NEWER_SUITE, packages=" ".join(FROM_NEWER)))
    settings = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "none",
        "Dir::Etc::preferences": folder / "preferences",
        "Dir::State::lists": folder / "lists",
        "DPkg::Lock::Timeout": 300,
        "APT::Sandbox::User": "root",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _install_if_needed() -> float:
    began = time.monotonic()
    present = shutil.which("dockerd") and shutil.which("mmdebstrap")
    if not present or _version(["dockerd", "--version"]) < LEAST_ENGINE:
        install((*ENGINE, *TOOLS))
    return time.monotonic() - began


@contextmanager
def _daemon(environment: dict[str, str]) -> Iterator[float]:
    if os.geteuid() != 0:
        raise EngineUnavailableError("not root, so no Docker engine can be started")
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    log = RUN_DIR / "dockerd.log"
    command = ["dockerd", "--host", environment["DOCKER_HOST"], "--data-root", str(DATA_DIR / "docker")]
    command += ["--exec-root", str(RUN_DIR / "exec"), "--pidfile", str(RUN_DIR / "docker.pid")]
    command += ["--config-file", str(RUN_DIR / "daemon.json")]
    settings = {"features": {"cdi": True}, "experimental": True, "cdi-spec-dirs": [str(CDI_DIR)]}
    (RUN_DIR / "daemon.json").write_text(json.dumps(settings))
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not _answers(environment):
            if process.poll() is not None or time.monotonic() - began > START_LIMIT_SECONDS:
                last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-2:])
                raise EngineUnavailableError(f"dockerd does not start here: {last}")
            time.sleep(0.2)
        yield time.monotonic() - began
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(environment: dict[str, str]) -> bool:
    if not shutil.which("docker"):
        return False
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, capture_output=True, env=environment, check=False).returncode == 0


def _checked_versions(environment: dict[str, str]) -> str:
    engine = _version(["docker", "version", "--format", "{{.Server.Version}}"], environment)
    compose = _version(["docker", "compose", "version", "--short"], environment)
    buildx = _version(["docker", "buildx", "version"], environment)
    shown = f"engine {_text(engine)}, compose {_text(compose)}, buildx {_text(buildx)}"
    if engine < LEAST_ENGINE or compose < LEAST_COMPOSE or not buildx:
        raise EngineUnavailableError(
            f"{shown}; needed: {_text(LEAST_ENGINE)}, {_text(LEAST_COMPOSE)} and any version of buildx"
        )
    return shown


def _version(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, ...]:
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"\d+(\.\d+)+", result.stdout)
    return tuple(int(part) for part in found[0].split(".")) if result.returncode == 0 and found else ()


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "not installed"

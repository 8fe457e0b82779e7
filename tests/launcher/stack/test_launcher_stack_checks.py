"""What `step128 up` checks of the machine: each mistake alone, with its remedy and exit code, and nothing started."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.stack import permissions
from step128_launcher.stack.checks import Check, check_machine
from step128_launcher.stack.project import Project, Service, User, image_variables, read_project

ROOT = Path(__file__).parents[3]
Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py
NO_CONTAINER: set[int] = set()


def has_compose() -> bool:
    docker = shutil.which("docker")
    return bool(docker) and not subprocess.run([str(docker), "compose", "version"], capture_output=True).returncode


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    """A root with the nodes of two GPUs, which belong to this process's group; no other may open them."""
    (tmp_path / "dev/dri").mkdir(parents=True)
    for name in ("kfd", "dri/renderD128", "dri/renderD129", "dri/card0"):
        (tmp_path / "dev" / name).touch()
        (tmp_path / "dev" / name).chmod(0o660)
    (tmp_path / "dev/dri/card0").chmod(0o600)  # a screen's, which no runtime opens
    return tmp_path


def with_devices(*groups: int, names: tuple[str, ...] = ()) -> Project:
    service = Service(
        name="serve",
        image="step128:latest",
        base_image=None,
        user=User(10001, frozenset(groups)),
        group_names=names,
        devices=(Path("/dev/kfd"), Path("/dev/dri")),
        ports=(),
        secrets={},
        model=None,
    )
    return Project("step128", (service,))


def only(project: Project, root: Path) -> Check:
    (check,) = check_machine(project, NO_CONTAINER, root)
    return check


def test_devices_that_the_container_may_open(gpus: Path) -> None:
    check = only(with_devices(os.getgid()), gpus)
    assert check.exit_code == 0 and check.detail.endswith("/dev/kfd, /dev/dri/renderD128, /dev/dri/renderD129")


@pytest.mark.parametrize(
    ("gone", "said"), [("dev/kfd", "/dev/kfd"), ("dev/dri/renderD*", "/dev/dri/renderD*"), ("dev/dri", "/dev/dri")]
)
def test_a_missing_device(gpus: Path, gone: str, said: str) -> None:
    for path in gpus.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    check = only(with_devices(os.getgid()), gpus)
    assert check.exit_code == 4
    assert check.detail == f"serve needs {said}, which is not there"
    assert "modprobe amdgpu" in check.remedy and "step128 up --cpu" in check.remedy


def test_a_wrong_group_is_told_with_the_right_number(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = only(with_devices(44999, 45000), gpus)
    assert check.exit_code == 78
    assert f"of the groups 44999, 45000, may not open /dev/kfd (owner {os.getuid()}, group" in check.detail
    group = os.getgid()
    assert check.remedy == (f"In .env: RENDER_GID={group}" if group else check.remedy)


def test_the_numbers_to_set_are_those_of_the_nodes(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        found = list(real(path, **options))
        found[5] = 992 if path.name == "kfd" else 44  # st_gid
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    assert only(with_devices(44, 992), gpus).exit_code == 0
    check = only(with_devices(992), gpus)
    assert check.remedy == "In .env: RENDER_GID=44 VIDEO_GID=992" and "/dev/kfd" not in check.detail


def test_nodes_that_are_shut_to_their_own_group_need_udev(gpus: Path) -> None:
    (gpus / "dev/kfd").chmod(0o600)
    check = only(with_devices(os.getgid()), gpus)
    assert check.exit_code == 78 and "udev rules" in check.remedy and "RENDER_GID" not in check.remedy


def test_a_group_by_name(gpus: Path) -> None:
    check = only(with_devices(os.getgid(), names=("render",)), gpus)
    assert check.exit_code == 78 and "getent group render" in check.remedy


@pytest.mark.parametrize(
    ("mode", "owns", "in_group", "allowed"),
    [
        (0o640, False, False, False),
        (0o644, False, False, True),
        (0o640, False, True, True),
        (0o604, False, True, False),  # the group's bits count, although others' would allow it
        (0o044, True, True, False),
        (0o400, True, False, True),
    ],
)
def test_one_set_of_bits_decides(tmp_path: Path, mode: int, owns: bool, in_group: bool, allowed: bool) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "f").chmod(mode)
    status = (tmp_path / "f").stat()
    user = User(status.st_uid + (not owns), frozenset({status.st_gid + (not in_group)}))
    assert permissions.may(user, status, permissions.READ) is allowed


def spoiled(bench: Bench, code: int) -> str:
    """What a refused `up` prints; nothing may have been started."""
    result = bench.run("up", "--cpu")
    assert result.code == code, result.err
    assert "nothing was started" in result.err and not [call for call in bench.calls() if " up " in call]
    return str(result.err)


def test_a_missing_checkpoint_folder(bench: Bench) -> None:
    (bench.folder / "models/tiny").rename(bench.folder / "models/other")
    said = spoiled(bench, 66)
    assert f"MODEL: there is no folder {bench.folder}/models/tiny; beside it: other" in said
    shutil.rmtree(bench.folder / "models")
    assert f"MODEL_DIR: there is no folder {bench.folder}/models" in spoiled(bench, 66)


def test_a_folder_that_is_no_checkpoint(bench: Bench) -> None:
    (bench.folder / "models/tiny/config.json").unlink()
    (bench.folder / "models/tiny/inner").mkdir()
    assert "is no checkpoint: it has no config.json; beside it: inner" in spoiled(bench, 65)


@pytest.mark.parametrize("shut", ["models", "models/tiny", "models/tiny/model.safetensors"])
def test_a_checkpoint_that_the_container_may_not_read(bench: Bench, shut: str) -> None:
    path = bench.folder / shut
    path.chmod(0o700 if path.is_dir() else 0o600)
    said = spoiled(bench, 5)
    assert f"serve (user 10001) may not read {path}" in said and "chmod -R a+rX" in said


def test_a_checkpoint_that_this_user_may_not_look_at(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    said = spoiled(bench, 5)
    assert f"{bench.folder}/models cannot be looked at: Permission denied" in said


def test_a_checkpoint_of_links_that_lead_out_of_the_mount(bench: Bench) -> None:
    blob = bench.folder / "blob"
    (bench.folder / "models/tiny/model.safetensors").rename(blob)
    (bench.folder / "models/tiny/model.safetensors").symlink_to(blob)
    said = spoiled(bench, 65)
    assert f"is a link to {blob}, outside of MODEL_DIR" in said and "cp -rL" in said


def test_secrets_that_are_missing_or_shut(bench: Bench) -> None:
    (bench.folder / "secrets/api_key").unlink()
    (bench.folder / "secrets/metrics_token").chmod(0o600)
    (bench.folder / "secrets/grafana_password").write_text("")
    said = spoiled(bench, 78)
    assert "secrets/api_key not there" in said and "secrets/grafana_password empty" in said
    assert "secrets/metrics_token may not be read by serve (user 10001)" in said
    assert "`step128 secrets`" in said and "3 checks failed" in said


def test_a_port_in_use(bench: Bench, document: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        document["services"]["serve"]["ports"][0]["published"] = str(port)
        bench.set("config.json", json.dumps(document))
        said = spoiled(bench, 75)
    assert f"127.0.0.1:{port}, for serve, is in use" in said and f"'sport = :{port}'" in said


def test_an_address_of_another_machine(bench: Bench, document: dict[str, Any]) -> None:
    document["services"]["serve"]["ports"][0]["host_ip"] = "192.0.2.1"
    bench.set("config.json", json.dumps(document))
    assert "BIND_ADDRESS in .env must be an address of this machine" in spoiled(bench, 78)


def test_a_port_that_the_stack_itself_holds_is_no_obstacle(bench: Bench, document: dict[str, Any]) -> None:
    project = read_project(document)
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        port = own.getsockname()[1]
        serve = project.service("serve")
        assert serve is not None
        moved = replace(serve, ports=(replace(serve.ports[0], port=port),))
        checks = [*check_machine(Project("step128", (moved,)), {port})]
    assert not [check for check in checks if check.exit_code]
    assert [check.detail for check in checks if check.name == "ports"] == [f"127.0.0.1:{port} is serve's already"]


@pytest.mark.skipif(not has_compose(), reason="no compose plugin here")
@pytest.mark.parametrize("overlay", [None, "compose.cpu.yaml"])
def test_the_real_files_are_understood(overlay: str | None) -> None:
    """The shape of `docker compose config` is compose's own, not the one that the other tests assume."""
    files = [part for name in ("compose.yaml", overlay) if name for part in ("--file", name)]
    command = ["docker", "compose", *files, "--profile", "monitoring", "config", "--format", "json"]
    settings = {"MODEL": "m", "MODEL_DIR": "/srv", "RENDER_GID": "109", "VIDEO_GID": "44"}
    environment = {"PATH": os.environ["PATH"], **settings}

    def read(*more: str) -> dict[str, Any]:
        printed = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, check=True).stdout
        return dict(json.loads(printed))

    project = read_project(read())
    assert [service.name for service in project.services] == ["grafana", "prometheus", "serve"]
    serve = project.service("serve")
    assert serve is not None and serve.model is not None
    assert (serve.model.mounted, serve.model.folder) == (Path("/srv"), Path("/srv/m"))
    assert serve.user == User(10001, frozenset({0} if overlay else {0, 109, 44}))
    assert serve.devices == (() if overlay else (Path("/dev/kfd"), Path("/dev/dri")))
    assert serve.secrets == {name: ROOT / "secrets" / name for name in ("api_key", "metrics_token")}
    assert [(port.address, port.port) for port in serve.ports] == [("127.0.0.1", 8000)]
    assert serve.base_image is not None and serve.base_image.startswith("vllm/")
    assert image_variables(read("--no-interpolate")) == {
        ("serve", "image"): "STEP128_IMAGE",
        ("serve", "base"): "CPU_BASE_IMAGE" if overlay else "BASE_IMAGE",
        ("prometheus", "image"): "PROMETHEUS_IMAGE",
        ("grafana", "image"): "GRAFANA_IMAGE",
    }

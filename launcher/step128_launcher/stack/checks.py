"""What must be true of this machine before the stack is started; each failure says what to do about it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.errors import ExitCode
from step128_launcher.stack import permissions
from step128_launcher.stack.project import Model, Project, Published, Service

_RENDER_NODES = "renderD*"


@dataclass(frozen=True)
class Check:
    """What was looked at and found; `exit_code` is OK where it is as it should be, and `remedy` empty."""

    name: str
    detail: str
    exit_code: ExitCode = ExitCode.OK
    remedy: str = ""


def check_machine(project: Project, own_ports: Set[int], root: Path = Path("/")) -> Iterator[Check]:
    """Check devices, groups, checkpoint, secrets and ports; `own_ports` are held by this very stack."""
    for service in project.services:
        if service.devices:
            yield _check_devices(service, root)
    for service in project.services:
        if service.model is not None:
            yield _check_model(service, service.model)
    yield from _check_secrets(project)
    for service in project.services:
        for port in service.ports:
            yield _check_port(service, port, own_ports)


def _check_devices(service: Service, root: Path) -> Check:
    def failed(detail: str, code: ExitCode, remedy: str) -> Check:
        return Check("devices", detail, code, remedy)

    nodes: list[Path] = []
    for device in service.devices:
        there = root / device.relative_to("/")
        found = sorted(there.glob(_RENDER_NODES)) if there.is_dir() else [there] if there.exists() else []
        if not found:
            missing = f"{device}/{_RENDER_NODES}" if there.is_dir() else str(device)
            return failed(
                f"{service.name} needs {missing}, which is not there",
                ExitCode.UNSUPPORTED_HARDWARE,
                "`sudo modprobe amdgpu`, then `sudo dmesg | grep -i amdgpu`; `step128 doctor` says more. On a machine "
                "without an AMD GPU: step128 up --cpu, with a small checkpoint.",
            )
        nodes += found
    if service.group_names:
        names = ", ".join(service.group_names)
        return failed(
            f"{service.name} is to get the group {names} by name, which its image does not know",
            ExitCode.BAD_CONFIGURATION,
            f"Put the numbers into .env: getent group {' '.join(service.group_names)} | cut -d: -f3",
        )
    shut = [node for node in nodes if not permissions.may(service.user, node.stat(), permissions.USE)]
    if not shut:
        return Check("devices", f"{service.name} may open {', '.join(_shown(node, root) for node in nodes)}")
    described = "; ".join(f"{_shown(node, root)} ({permissions.who(node.stat())})" for node in shut)
    groups = ", ".join(map(str, sorted(service.user.groups)))
    return failed(
        f"{service.name}, user {service.user.user} of the groups {groups}, may not open {described}",
        ExitCode.BAD_CONFIGURATION,
        _open_to_group(nodes),
    )


def _open_to_group(nodes: list[Path]) -> str:
    """Return how the nodes' groups get into .env; a node that is shut to its own group is udev's to open."""
    if any(node.stat().st_mode >> 3 & permissions.USE != permissions.USE for node in nodes):
        return (
            "Their group may not open them either: install the driver's udev rules (group render, mode 0660), reboot."
        )
    groups = sorted({node.stat().st_gid for node in nodes})
    if groups == [0]:
        return "They are root's: install the driver's udev rules (group render, mode 0660), then reboot."
    settings = [f"{name}={group}" for name, group in zip(("RENDER_GID", "VIDEO_GID"), groups, strict=False)]
    return f"In .env: {' '.join(settings)}"


def _check_model(service: Service, model: Model) -> Check:
    try:
        return _look_at_model(service, model)
    except OSError as error:
        return Check(
            "checkpoint",
            f"{error.filename or model.folder} cannot be looked at: {error.strerror}",
            ExitCode.PERMISSION,
            "Run this as a user who may, or give others the right to: chmod -R a+rX.",
        )


def _look_at_model(service: Service, model: Model) -> Check:
    def failed(detail: str, code: ExitCode, remedy: str) -> Check:
        return Check("checkpoint", detail, code, remedy)

    for folder, variable in ((model.mounted, "MODEL_DIR"), (model.folder, "MODEL")):
        if not folder.is_dir():
            return failed(
                f"{variable}: there is no folder {folder}{_beside(folder)}",
                ExitCode.INPUT_NOT_FOUND,
                "In .env, MODEL_DIR is the folder that holds checkpoints, and MODEL the name of the one to serve.",
            )
    config = model.folder / "config.json"
    if not config.exists():
        return failed(
            f"{model.folder} is no checkpoint: it has no config.json{_beside(config)}",
            ExitCode.BAD_CHECKPOINT,
            "MODEL in .env names a folder that config.json and *.safetensors are in.",
        )
    files = [config, *sorted(model.folder.glob("*.json")), *sorted(model.folder.glob("*.safetensors"))]
    outside = next((path for path in files if permissions.escapes(path, model.mounted)), None)
    if outside is not None:
        return failed(
            f"{outside} is a link to {outside.resolve()}, outside of MODEL_DIR, where {service.name} cannot follow it",
            ExitCode.BAD_CHECKPOINT,
            "Choose MODEL_DIR so that both are in it, such as the whole folder of the Hugging Face cache, or copy the "
            "files: cp -rL.",
        )
    folders = [model.mounted, *(part for part in model.folder.parents if part.is_relative_to(model.mounted))]
    wanted = [(path, permissions.ENTER) for path in (*folders, model.folder)]
    wanted += [(path, permissions.READ) for path in files]
    shut = next((path for path, bits in wanted if not permissions.may(service.user, path.stat(), bits)), None)
    if shut is not None:
        return failed(
            f"{service.name} (user {service.user.user}) may not read {shut} ({permissions.who(shut.stat())})",
            ExitCode.PERMISSION,
            f"`chmod -R a+rX {model.mounted}`: the container is a user of its own.",
        )
    return Check("checkpoint", f"{model.folder} can be read by {service.name}")


def _beside(path: Path) -> str:
    """Name the folders that are where `path` was looked for: often one of them was meant."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())[:5]
    except OSError:
        return ""
    return f"; beside it: {', '.join(names)}" if names else ""


def _check_secrets(project: Project) -> Iterator[Check]:
    needed = [(service, path) for service in project.services for path in service.secrets.values()]
    # what is wrong with a file -> the files
    wrong: dict[tuple[str, ExitCode], list[str]] = {}
    for service, path in needed:
        found = _wrong_with(service, path)
        if found is not None:
            wrong.setdefault(found, []).append(str(path))
    for (what, code), paths in wrong.items():
        remedy = "`step128 secrets` makes those that are missing, and all of them readable for the containers."
        yield Check("secrets", f"{', '.join(sorted(set(paths)))} {what}", code, remedy)
    if needed and not wrong:
        yield Check("secrets", f"{', '.join(sorted({path.name for _, path in needed}))} are there")


def _wrong_with(service: Service, path: Path) -> tuple[str, ExitCode] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return "not there", ExitCode.INPUT_NOT_FOUND
    except OSError as error:
        return f"cannot be looked at: {error.strerror}", ExitCode.PERMISSION
    if not path.is_file():
        return "not a file: remove it first", ExitCode.BAD_CONFIGURATION
    if not status.st_size:
        return "empty: remove it first", ExitCode.BAD_CONFIGURATION
    if not permissions.may(service.user, status, permissions.READ):
        who = f"{service.name} (user {service.user.user})"
        return f"may not be read by {who}: {permissions.who(status)}", ExitCode.PERMISSION
    return None


def _check_port(service: Service, port: Published, own_ports: Set[int]) -> Check:
    name, shown = "ports", f"{port.address}:{port.port}"
    if port.port in own_ports:
        return Check(name, f"{shown} is {service.name}'s already")
    number = _try(lambda: _bind(port))
    if number == errno.EADDRINUSE:
        return Check(
            name,
            f"{shown}, for {service.name}, is in use by another program",
            ExitCode.PORT_IN_USE,
            f"`sudo ss -ltnp 'sport = :{port.port}'` shows which; or set another in .env (PORT, PROMETHEUS_PORT, "
            "GRAFANA_PORT).",
        )
    if number in (None, errno.EACCES):  # ports below 1024: the engine may, although this user may not
        return Check(name, f"{shown} is free for {service.name}")
    return Check(
        name,
        f"{shown}, for {service.name}, cannot be opened: {os.strerror(number)}",
        ExitCode.BAD_CONFIGURATION,
        "BIND_ADDRESS in .env must be an address of this machine (`ip address` lists them), or 0.0.0.0 for all.",
    )


def _bind(port: Published) -> None:
    family = socket.AF_INET6 if ":" in port.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((port.address, port.port))


def _try(action: Callable[[], None]) -> int | None:
    """Return the errno that an action fails with, or None."""
    try:
        action()
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno
    return None


def _shown(node: Path, root: Path) -> str:
    return f"/{node.relative_to(root)}"

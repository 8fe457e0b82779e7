"""What compose made of its files and .env: the few facts of each service that can be checked before it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MODELS_TARGET = PurePosixPath("/models")
SERVER = "serve"


@dataclass(frozen=True)
class Published:
    """A port of this machine that a service is reached by."""

    address: str
    port: int


@dataclass(frozen=True)
class User:
    """Who the programs of a container are, by number: `groups` holds the first and the added ones."""

    user: int
    groups: frozenset[int]


@dataclass(frozen=True)
class Model:
    """The checkpoint to serve: the folder that is mounted, and the one in it."""

    mounted: Path
    folder: Path


@dataclass(frozen=True)
class Service:
    """One service; `base_image` is what its image would be built on, None where it cannot be built here.

    `group_names` are added groups that are not numbers.
    """

    name: str
    image: str
    base_image: str | None
    user: User
    group_names: tuple[str, ...]
    devices: tuple[Path, ...]
    ports: tuple[Published, ...]
    secrets: Mapping[str, Path]
    model: Model | None


@dataclass(frozen=True)
class Project:
    """A compose project as it would be started."""

    name: str
    services: tuple[Service, ...]

    def service(self, name: str) -> Service | None:
        """Return the service of this name."""
        return next((service for service in self.services if service.name == name), None)


def read_project(document: Mapping[str, Any]) -> Project:
    """Return the project of the document that `docker compose config --format json` prints."""
    files = {name: Path(entry["file"]) for name, entry in (document.get("secrets") or {}).items() if "file" in entry}
    services = tuple(_service(name, entry, files) for name, entry in sorted(document["services"].items()))
    return Project(str(document["name"]), services)


def image_variables(document: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return (service, "image" or "base") -> variable, from the document before its variables were filled in."""
    found = {}
    for name, entry in document["services"].items():
        written = {"image": str(entry.get("image", "")), "base": _base_image(entry) or ""}
        for kind, text in written.items():
            if match := re.match(r"\$\{(\w+)", text):
                found[name, kind] = match[1]
    return found


def _service(name: str, entry: Mapping[str, Any], files: Mapping[str, Path]) -> Service:
    added = [str(group) for group in entry.get("group_add") or []]
    user, _, group = str(entry.get("user") or "0:0").partition(":")
    numbers = frozenset(int(each) for each in (*added, group or "0") if each.isdecimal())
    return Service(
        name=name,
        image=str(entry["image"]),
        base_image=_base_image(entry),
        user=User(int(user) if user.isdecimal() else 0, numbers),
        group_names=tuple(each for each in added if not each.isdecimal()),
        devices=tuple(Path(device["source"]) for device in entry.get("devices") or []),
        ports=tuple(_ports(entry)),
        secrets={
            secret["source"]: files[secret["source"]]
            for secret in entry.get("secrets") or []
            if secret["source"] in files
        },
        model=_model(entry),
    )


def _base_image(entry: Mapping[str, Any]) -> str | None:
    arguments = (entry.get("build") or {}).get("args") or {}
    if isinstance(arguments, list):  # as long as variables are not filled in
        arguments = dict(argument.partition("=")[::2] for argument in arguments)
    base = arguments.get("BASE_IMAGE")
    return None if base is None else str(base)


def _ports(entry: Mapping[str, Any]) -> list[Published]:
    listed = [(port.get("host_ip") or "0.0.0.0", str(port.get("published", ""))) for port in entry.get("ports") or []]
    return [Published(address, int(port)) for address, port in listed if port.isdecimal()]


def _model(entry: Mapping[str, Any]) -> Model | None:
    """Return the checkpoint: the argument of --model, on the side of the host."""
    command = [str(word) for word in entry.get("command") or []]
    volumes = [volume for volume in entry.get("volumes") or [] if volume.get("target") == str(MODELS_TARGET)]
    if "--model" not in command[:-1] or not volumes:
        return None
    inside = PurePosixPath(command[command.index("--model") + 1])
    if not inside.is_relative_to(MODELS_TARGET):
        return None
    mounted = Path(volumes[0]["source"])
    return Model(mounted, mounted / inside.relative_to(MODELS_TARGET))

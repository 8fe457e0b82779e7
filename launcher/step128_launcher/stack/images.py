"""Images of the stack: whether they are here or can be had, and the digests that pin them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from docker.errors import APIError, ImageNotFound

from step128_launcher.errors import ExitCode
from step128_launcher.stack.checks import Check
from step128_launcher.stack.project import Project, Service

_REFUSED = (401, 403, 404)
_ABSENT = ("not found", "denied", "unauthorized", "manifest unknown")
_HEADER = """\
# Images by digest, written by `step128 up --lock` on {date}. While this file is here, `step128 up` starts these and no
# others; by hand: docker compose --env-file .env --env-file images.lock.env up -d. Remove it to follow the tags again.
"""


@dataclass(frozen=True)
class Pin:
    """One image, the variable that chooses it, and what it is pinned to; `note`: where that is from, or why not."""

    variable: str
    image: str
    pinned: str | None
    note: str
    verified: bool = True


def check_images(client: Any, project: Project) -> Iterator[Check]:
    """Check that each image is here, or that the engine reaches the registry that has it."""
    for service in project.services:
        if is_here(client, service.image):
            yield Check("images", f"{service.image} is here")
        elif service.base_image is None:
            yield _check_remote(client, service, service.image, "is to be pulled")
        elif is_here(client, service.base_image):
            yield Check("images", f"{service.image} is to be built on {service.base_image}, which is here")
        else:
            yield _check_remote(
                client, service, service.base_image, f"is to be pulled, and {service.image} built on it"
            )


def is_here(client: Any, image: str) -> bool:
    """Whether the engine has the image."""
    try:
        client.images.get(image)
    except ImageNotFound:
        return False
    return True


def pin_images(client: Any, project: Project, variables: Mapping[tuple[str, str], str]) -> list[Pin]:
    """Return a pin for each image that a variable chooses; `variables` is project.image_variables'."""
    pins = []
    for service in project.services:
        for kind, image in (("image", service.image), ("base", service.base_image)):
            variable = variables.get((service.name, kind))
            if variable is not None and image is not None:
                pins.append(_pin(client, variable, image, built=kind == "image" and service.base_image is not None))
    return pins


def lock_text(pins: list[Pin], date: str) -> str:
    """Return the file of variables; an image without a digest leaves a line that says why."""
    lines = [_HEADER.format(date=date)]
    for pin in pins:
        lines.append(f"# {pin.image}: {pin.note}\n")
        if pin.pinned is not None:
            lines.append(f"{pin.variable}={pin.pinned}\n")
    return "".join(lines)


def _check_remote(client: Any, service: Service, image: str, what: str) -> Check:
    _, trouble = _ask_registry(client, image)
    if trouble is None:
        return Check("images", f"{image} {what}")
    absent = any(word in trouble.lower() for word in _ABSENT)
    return Check(
        "images",
        f"{image}, for {service.name}, is not here, and "
        + ("no registry gives it out" if absent else "its registry cannot be asked")
        + f": {trouble}",
        ExitCode.INPUT_NOT_FOUND if absent else ExitCode.SERVER_FAILED,
        "Check the name in .env, or `docker login`, if it is private."
        if absent
        else "Without a network: `docker save IMAGE -o FILE` on a machine that has it, `docker load -i FILE` here.",
    )


def _ask_registry(client: Any, image: str) -> tuple[str | None, str | None]:
    """Return the digest that the image's registry names, or why there is none."""
    try:
        return str(client.images.get_registry_data(image).id), None
    except APIError as error:
        trouble = str(error.explanation or error)
        status = error.status_code if error.response is not None else None
        return None, f"not found: {trouble}" if status in _REFUSED and "not found" not in trouble.lower() else trouble
    except OSError as error:  # requests' own errors are of this kind: the engine took too long
        return None, str(error)


def _pin(client: Any, variable: str, image: str, built: bool) -> Pin:
    repository = _repository(image)
    if "@" in image:
        return Pin(variable, image, image, "named by digest already")
    try:
        here = client.images.get(image)
    except ImageNotFound:
        here = None
    digests = [] if here is None else here.attrs.get("RepoDigests") or []
    known = next((each for each in digests if _same(each.partition("@")[0], repository)), None)
    if known is not None:
        return Pin(
            variable, image, f"{repository}@{known.partition('@')[2]}", "as it was pulled; the tag may have moved"
        )
    if built:
        what = "to be built here" if here is None else f"built here ({here.id})"
        return Pin(variable, image, None, f"{what}, so it has no digest of a registry; its base is what is pinned")
    digest, trouble = _ask_registry(client, image)
    if digest is not None:
        return Pin(variable, image, f"{repository}@{digest}", "as its registry says now")
    return Pin(variable, image, None, f"UNVERIFIED, by its tag still: {' '.join(str(trouble).split())}", verified=False)


def _repository(image: str) -> str:
    """Return the name without its tag; a colon before a slash is a registry's port."""
    name = image.partition("@")[0]
    head, colon, tail = name.rpartition(":")
    return head if colon and "/" not in tail else name


def _same(one: str, other: str) -> bool:
    """Whether two names of repositories mean the same: Docker Hub's may be written short."""
    short = [name.removeprefix("docker.io/").removeprefix("library/") for name in (one, other)]
    return short[0] == short[1]

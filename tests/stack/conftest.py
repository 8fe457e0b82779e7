"""Fixtures of the container proof: an engine, and the images, each once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import base_image
import pytest
from container_stack import Stack, Timed, build_base, build_monitoring, prepare
from docker_engine import EngineUnavailableError, docker_engine


@pytest.fixture(scope="session")
def times() -> Iterator[Timed]:
    """How long each part of the container proof took; printed in the end."""
    timed = Timed([])
    yield timed
    print("\ncontainer proof: " + "; ".join(timed.lines))


@pytest.fixture(scope="session")
def built(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, times: Timed) -> Iterator[Stack]:
    """The stack, built and not up; skipped with the reason where there can be no engine or no base image."""
    if reason := base_image.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("stack")
    models = folder / "models"
    models.mkdir()
    shutil.copytree(quantized("all-linears"), models / "tiny-nl4")
    try:
        with docker_engine() as engine:
            times.lines.append(f"{engine.versions}, installed in {engine.install_seconds:.0f} s")
            with times("base image"):
                base = build_base(engine)
            with times("images of Prometheus and the probe"):
                build_monitoring(engine, base, folder / "monitoring")
            stack = prepare(engine, folder, models, base)
            stack.compose("down", "--volumes", check=False)  # what an interrupted proof may have left
            with times("build of the image"):
                stack.compose("build", "serve")
            yield stack
            stack.compose("down", "--volumes", "--timeout", "30", check=False)
            if engine.cdi_dir is not None:  # the proof's own engine keeps the base image, and none that were replaced
                engine.docker("image", "prune", "--force")
    except EngineUnavailableError as error:
        pytest.skip(f"no container proof: {error}")

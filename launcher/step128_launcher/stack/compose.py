"""`docker compose` with the files and settings of one folder; compose stays what decides, nothing here repeats it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.reader import exists
from step128_launcher.stack.engine import DockerCommand

COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
DEFAULT_PROJECT = "step128"
SETTINGS = ".env"
LOCK = "images.lock.env"
# The overlay for machines without a GPU leaves both unused, and compose asks for them all the same.
_UNUSED_GROUPS = {"RENDER_GID": "1", "VIDEO_GID": "2"}


@dataclass(frozen=True)
class Compose:
    """How compose is called: in `folder`, with the overlays and profiles that were asked for.

    Without `overlays` the files are those of COMPOSE_FILE, or compose.yaml; `project` None: as the files say.
    """

    command: DockerCommand
    folder: Path
    overlays: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    project: str | None = None
    locked: bool = False

    def arguments(self) -> list[str]:
        """Return the arguments that stand before compose's own command."""
        found = ["compose"]
        if self.project is not None:
            found += ["--project-name", self.project]
        if self.locked:  # naming one file takes .env's place, so both are named
            found += [part for name in self._settings_files() for part in ("--env-file", name)]
        if self.overlays:
            files = ("compose.yaml", *(f"compose.{name}.yaml" for name in self.overlays))
            found += [part for name in files for part in ("--file", name)]
        return found + [part for name in self.profiles for part in ("--profile", name)]

    def call(self) -> DockerCommand:
        """Return the command with the environment that the files need."""
        if "cpu" not in self.overlays:
            return self.command
        return replace(self.command, environment={**self.command.environment, **_UNUSED_GROUPS})

    def read(self, *, filled_in: bool = True) -> dict[str, Any]:
        """Return the files as compose understands them, with or without variables filled in.

        Raises:
            LauncherError: 66, if there is no compose file or no .env; 78, if compose does not take them.

        """
        self._check_files()
        more = [] if filled_in else ["--no-interpolate"]
        result = self.call().capture(*self.arguments(), "config", "--format", "json", *more, folder=self.folder)
        if result.returncode == 0:
            return dict(json.loads(result.stdout))
        said = _last_line(result.stderr)
        if not exists(self.folder / SETTINGS):
            raise LauncherError(
                ExitCode.INPUT_NOT_FOUND,
                f"There is no {self.folder / SETTINGS}, which holds the settings of the stack. Compose says: {said}",
                "`cp .env.example .env`, and fill in its first part.",
            )
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"Compose does not take the settings in {self.folder}: {said}",
            f"They are in {self.folder / SETTINGS}; .env.example there explains each.",
        )

    def run(self, *arguments: str, to_stdout: bool = False) -> int:
        """Run one of compose's commands, what it says going to stderr or stdout; return its exit status."""
        return self.call().show(*self.arguments(), *arguments, folder=self.folder, to_stdout=to_stdout)

    def _settings_files(self) -> list[str]:
        return [name for name in (SETTINGS, LOCK) if exists(self.folder / name)]

    def _check_files(self) -> None:
        if not any(exists(self.folder / name) for name in COMPOSE_FILES):
            raise LauncherError(
                ExitCode.INPUT_NOT_FOUND,
                f"There is no compose.yaml in {self.folder}.",
                "Run this in the folder of the repository, or name it: --project-directory DIR.",
            )
        for name in self.overlays:
            if not exists(self.folder / f"compose.{name}.yaml"):
                raise LauncherError(
                    ExitCode.INPUT_NOT_FOUND,
                    f"There is no compose.{name}.yaml in {self.folder}.",
                    "Overlays are files of the repository beside compose.yaml: take them from the same release.",
                )


def project_name(asked: str | None, folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Return the name that the stack's containers go by: as asked, COMPOSE_PROJECT_NAME, .env's, or step128."""
    name = asked or environment.get("COMPOSE_PROJECT_NAME")
    if name:
        return name
    try:
        settings = (folder / SETTINGS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return DEFAULT_PROJECT
    found = re.search(r"^COMPOSE_PROJECT_NAME=[\"']?([\w.-]+)", settings, re.MULTILINE)
    return found[1] if found else DEFAULT_PROJECT


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"

"""`step128 secrets`: the files that compose.yaml mounts as secrets."""

import argparse
import os
from pathlib import Path

from step128_launcher import consoles
from step128_launcher.errors import ExitCode
from step128_launcher.stack.secret_files import make_secrets


def run_secrets(options: argparse.Namespace) -> ExitCode:
    """Make them and say where they are, never what. Arguments (argparse names): folder (Path or None), rotate (bool).

    Raises:
        LauncherError: 78, if others may enter the folder; 5 or 73, if it cannot be written.

    """
    folder = options.folder or Path(os.environ.get("SECRETS_DIR") or "secrets")
    console = consoles.stdout()
    made = make_secrets(folder, rotate=options.rotate)
    for secret in made:
        console.print(f"{secret.done:7} {secret.path} ({secret.opens})", markup=False, highlight=False, soft_wrap=True)
    if any(secret.done == "rotated" for secret in made):
        password = folder / "grafana_password"
        console.print(
            "Services that run go on with the old ones until `docker compose restart`. Grafana keeps its password in "
            "its own database from its first start on:\n  docker compose exec -T grafana grafana cli admin "
            f"reset-admin-password --password-from-stdin < {password}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return ExitCode.OK

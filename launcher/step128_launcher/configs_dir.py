"""Where the files of `configs/` are: a checkout has them beside the code, an installed wheel in its data folder."""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError

CONFIGS_DIR_VARIABLE = "STEP128_CONFIGS_DIR"


def find_configs_dir(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder holding `profiles/` and `quantization/`.

    Order: the environment variable STEP128_CONFIGS_DIR, the checkout's `configs/`, the wheel's data folder.

    Raises:
        LauncherError: 78, if none of them exists, or the variable names a folder that does not.

    """
    environment = os.environ if environment is None else environment
    override = environment.get(CONFIGS_DIR_VARIABLE)
    if override:
        if not Path(override).is_dir():
            raise LauncherError(
                ExitCode.BAD_CONFIGURATION,
                f"{CONFIGS_DIR_VARIABLE} is {override!r}, which is not a folder.",
                "Unset it, or let it name a folder that holds profiles/ and quantization/nl4.yaml.",
            )
        return Path(override)
    candidates = [
        Path(__file__).resolve().parents[2] / "configs",
        Path(sysconfig.get_path("data")) / "share" / "step128" / "configs",
    ]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise LauncherError(
        ExitCode.BAD_CONFIGURATION,
        "The configuration files of step128 were not found; looked in " + " and ".join(map(str, candidates)) + ".",
        f"Reinstall step128, or set {CONFIGS_DIR_VARIABLE} to a folder that holds profiles/ and quantization/nl4.yaml.",
    )

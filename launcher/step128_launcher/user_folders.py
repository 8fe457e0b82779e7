"""The user's own folders for step128, by the XDG Base Directory Specification."""

import os
from collections.abc import Mapping
from pathlib import Path

_DEFAULTS = {"XDG_STATE_HOME": ".local/state", "XDG_DATA_HOME": ".local/share", "XDG_CONFIG_HOME": ".config"}


def user_folder(variable: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return `step128` below the folder that `variable` (XDG_STATE_HOME, _DATA_HOME, _CONFIG_HOME) names.

    Without the variable, below its default in the home folder: `environment`'s HOME, else this user's.
    """
    home = Path(environment.get("HOME") or Path.home())
    return Path(environment.get(variable) or home / _DEFAULTS[variable]) / "step128"
